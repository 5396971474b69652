#!/bin/sh
# The CPU kernels under the sanitizers. Usage: sanitize.sh CHECK FOLDER [FLAGS...]
#   address   abi.c (as strict C99) drives the C interface under the address and undefined-behaviour sanitizers
#   thread    abi.c in eight threads at once, and threads.cpp, under ThreadSanitizer
#   python    test_native.py and test_rows.py on an extension built with the address and undefined-behaviour sanitizers
#   all       address and thread for each instruction set that the kernels are built for and this CPU has; python
# FOLDER: for what is built. FLAGS: of the instruction set, such as -mavx2. PYTHON: with torch, pytest and pip.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
check=$1 out=$2 here="$root/tests/native" cc=${CC:-cc} cxx=${CXX:-c++} python=${PYTHON:-python3}
shift 2
options="-g -O1 -fopenmp -fPIC -fno-sanitize-recover=all -I$root/csrc/include -I$root/csrc/cpu"

build() { # sanitizers, flags: the kernels as the one table that dispatch.cpp knows without TWINFLOW_X86
  sanitizers=$1
  shift
  for source in kernels dispatch; do
    $cxx -std=c++17 $options "-fsanitize=$sanitizers" -DTWINFLOW_ISA=twinflow_kernels_baseline "$@" \
      -c "$root/csrc/cpu/$source.cpp" -o "$out/$source.o"
  done
}

case $check in
address)
  build address,undefined "$@"
  $cc -std=c99 -pedantic -Wall -Wextra -Werror $options -fsanitize=address,undefined -c "$here/abi.c" -o "$out/abi.o"
  $cxx -fopenmp -fsanitize=address,undefined "$out/kernels.o" "$out/dispatch.o" "$out/abi.o" -o "$out/abi"
  "$out/abi"
  ;;
thread)
  build thread "$@"
  $cc -std=c99 $options -fsanitize=thread -Dmain=abi_main -c "$here/abi.c" -o "$out/abi.o"
  # linked without -fopenmp: openmp.cpp stands for its runtime
  $cxx -std=c++17 -g -O1 -fsanitize=thread "-I$root/csrc/include" "$here/threads.cpp" "$here/openmp.cpp" \
    "$out/kernels.o" "$out/dispatch.o" "$out/abi.o" -o "$out/threads"
  # a randomised address space can put code where ThreadSanitizer keeps its shadow
  $(command -v setarch >/dev/null && echo "setarch $(uname -m) -R") "$out/threads"
  ;;
python)
  $python -c "import pybind11" 2>/dev/null || $python -m pip install --quiet --target "$out/packages" "pybind11>=2.13"
  export PYTHONPATH="$out/packages:$root"
  include=$($python -c "import sysconfig, pybind11; print('-I' + sysconfig.get_path('include'), '-I' + pybind11.get_include())")
  build address,undefined "$@"
  $cxx -std=c++17 $options $include -fsanitize=address,undefined -fvisibility=hidden -shared "$root/csrc/bindings.cpp" \
    "$out/kernels.o" "$out/dispatch.o" -o "$out/_native.so"
  cd "$root"
  # leaks: the interpreter's own would drown ours. libstdc++: python is not linked with it, its exceptions are watched
  SANITIZED="$out/_native.so" ASAN_OPTIONS=detect_leaks=0 \
    LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so)" \
    $python -m pytest -s -p tests.native.sanitized tests/native/test_native.py tests/native/test_rows.py \
      -k "not emulated and not cuda"
  ;;
all)
  has() { grep -qw "$1" /proc/cpuinfo 2>/dev/null; }
  for each in address thread; do
    echo "== $each" && sh "$0" $each "$out"
    ! has avx2 || { echo "== $each, avx2" && sh "$0" $each "$out" -mavx2 -mfma; }
    ! { has avx512vl && has avx512dq; } ||
      { echo "== $each, avx512" && sh "$0" $each "$out" -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma; }
  done
  echo "== python" && sh "$0" python "$out"
  echo "== no findings"
  ;;
*)
  sed -n 2,8p "$0" >&2
  exit 2
  ;;
esac
