#!/bin/sh
# The README's pictures, from the shipped model: run it in the project's folder after `make demo`.
set -e
cd "$(dirname "$0")/.."
run=${TWINFLOW:-.venv/bin/twinflow-rt}
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
"$run" generate "a red circle above a blue square" "three green triangles" "a purple cross and a yellow circle" \
    "a black triangle left of a red cross" --num-images 4 --seed 0 -o "$folder/demo.png"
cp "$folder/demo-grid.png" docs/demo.png
"$run" eval --nfe 1 --per-kind 6 --sheet docs/sheet.png
