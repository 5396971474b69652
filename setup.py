"""Builds the native extension with CMake and Ninja, and installs `kernels/` as `twinflow_rt.kernels`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake project makes the one extension; setuptools only says where it goes."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(target)], check=True)


packages = find_packages(include=["twinflow_rt*"])
setup(
    packages=[*packages, "twinflow_rt.kernels"],
    package_dir={"twinflow_rt": "twinflow_rt", "twinflow_rt.kernels": "kernels"},
    ext_modules=[Extension("twinflow_rt._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
