#!/bin/sh
# Compiles the CPU kernels and tests/native/abi.c (as strict C99) with the address and undefined-behaviour
# sanitizers, and runs them. Usage: sanitize.sh [build folder]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$(mktemp -d)}
checks="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -I$root/csrc/include -I$root/csrc/cpu"
${CC:-cc} -std=c99 -pedantic -Wall -Wextra -Werror $checks -c "$root/tests/native/abi.c" -o "$out/abi.o"
${CXX:-c++} -std=c++17 -fopenmp $checks -DTWINFLOW_ISA=twinflow_kernels_baseline \
  "$root/csrc/cpu/kernels.cpp" "$root/csrc/cpu/dispatch.cpp" "$out/abi.o" -o "$out/abi"
"$out/abi"
