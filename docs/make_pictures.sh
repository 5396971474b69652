#!/bin/sh
# The README's pictures, from the shipped model: run it in the project's folder after `make demo`.
set -e
cd "$(dirname "$0")/.."
run=${TWINFLOW:-.venv/bin/twinflow-rt}
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
"$run" generate "a green triangle" "a black square" "three green squares" "a purple square right of a red triangle" \
    --num-images 6 --seed 0 -o "$folder/demo.png"
cp "$folder/demo-grid.png" docs/demo.png
"$run" eval --nfe 1 --per-kind 8 --sheet docs/sheet.png
