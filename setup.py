"""Builds the native libraries with CMake and Ninja, and installs `kernels/` as `twinflow_rt.kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
GPU_LIBRARY = "libtwinflow_cuda.so"


class CMakeBuild(build_ext):
    """One CMake project makes everything native; setuptools only says where it goes.

    Environment: TWINFLOW_CUDA = AUTO (default), ON or OFF; CMake's own variables work too.
    """

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTWINFLOW_CUDA={os.environ.get('TWINFLOW_CUDA', 'AUTO')}",
        ]  # fmt: skip
        self._run(configure, "configuring the native code")
        self._run(["cmake", "--build", str(build)], "compiling the native code")
        self._run(["cmake", "--install", str(build), "--prefix", str(target)], "installing the native code")

    def copy_extensions_to_source(self) -> None:
        """Editable installs: setuptools copies the extension only, not the library that lies beside it."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split(".")).with_name(GPU_LIBRARY)
            beside = ROOT.joinpath(*ext.name.split(".")).with_name(GPU_LIBRARY)
            beside.unlink(missing_ok=True)
            if built.exists():
                shutil.copy2(built, beside)

    @staticmethod
    def _run(command: list[str], doing: str) -> None:
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit(f"twinflow_rt: {doing} needs {command[0]} on PATH: pip install cmake ninja") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"twinflow_rt: {doing} failed with status {error.returncode}; the compiler's words are above. "
                "If they are about CUDA, TWINFLOW_CUDA=OFF builds without the GPU kernels."
            ) from None


packages = find_packages(include=["twinflow_rt*"])
setup(
    packages=[*packages, "twinflow_rt.kernels"],
    package_dir={"twinflow_rt": "twinflow_rt", "twinflow_rt.kernels": "kernels"},
    ext_modules=[Extension("twinflow_rt._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
