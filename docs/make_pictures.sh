#!/bin/sh
# The pictures of README and docs, from the shipped model, and the page of its record: run it in the project's folder after `make demo`.
set -e
cd "$(dirname "$0")/.."
run=${TWINFLOW:-.venv/bin/twinflow-rt}
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
"$run" generate "a green triangle" "a purple triangle right of a yellow circle" \
    "a blue circle left of a red square" "a black cross right of a green circle" \
    --num-images 6 --seed 0 -o "$folder/demo.png"
cp "$folder/demo-grid.png" docs/demo.png
"$run" eval --nfe 1 --per-kind 8 --sheet docs/sheet.png
.venv/bin/python -m benches.strengths docs/strengths.png
records=benches/records
.venv/bin/python -m benches.score_plot docs/scores.svg TwinFlow=$records/eval-twinflow.json \
    RCGM=$records/eval-rcgm.json "flow matching=$records/eval-flow.json" "flow matching=$records/eval-flow-50.json"
"$run" bench show $records/demo-cpu.json --html docs/benchmark.html >/dev/null
