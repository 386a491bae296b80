#!/usr/bin/env bash
# Is a fine-tuned teacher worth its time? The same student with the teacher as it is and with the one `flipkd teach` makes.
# With flipkd on the path. Usage: examples/banking77_teach.sh FOLDER [key=value ...]; FOLDER as for banking77.sh.
set -euo pipefail
folder=$1; shift
here=$(dirname "$0")
config=$here/banking77.yaml
export HF_HUB_OFFLINE=1

# Makes the pairs, unless they are there, and runs with the teacher as it is.
"$here/banking77.sh" "$folder" name=banking77-untaught "$@"

# The taught teacher is part of its run: the verbs after this one find it.
flipkd teach "$config" name=banking77-taught "$@"
flipkd run "$config" name=banking77-taught "$@"

printf '\nteacher, before and after\n'
flipkd teach "$config" name=banking77-taught "$@"
for name in banking77-untaught banking77-taught; do
  printf '\n%s\n' "$name"
  flipkd evaluate "$config" name="$name" "$@"
done
