#!/bin/sh
# Everything this project can learn from a GPU machine, in one command:
#
#   benches/gpu.sh OUT [--dry] [part...]
#
# Parts (default: all): build env checks tests tests-compile sanitizer kernels-MODEL layers-MODEL rows-MODEL (of
# z-image, qwen-image) z-image sd3.5-m sana qwen-image MODEL-fp8 MODEL-int4 report. Each runs in a process of its own
# with a limit below eight minutes and leaves its log and JSON in OUT, whatever becomes of the others. Needs python
# >= 3.11 with torch >= 2.11 and, for the Triton kernels, triton >= 3.6; no installation, no network. --dry runs the
# same code on the CPU, at sizes that take seconds.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$root" exec "${PYTHON:-python3}" -P -m benches.gpu.kit "$@"
