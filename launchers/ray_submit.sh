#!/usr/bin/env bash
# launchers/ray_submit.sh CONFIG [key=value ...]
# `flipkd run` as a job of the Ray cluster whose job server is at RAY_ADDRESS (http://HEAD:8265). See docs/launchers.md.
set -euo pipefail

VERB=${VERB:-run}                 # or score, teach, train, evaluate, register
WORKING_DIR=${WORKING_DIR:-$PWD}  # what the cluster gets a copy of; CONFIG and relative data paths count from here
WAIT=${WAIT:-1}                   # 0: leave the job alone once it is submitted
JOB_ID=${JOB_ID:-flipkd-$(date -u +%Y%m%d-%H%M%S)-$$}
PASS_ENV=${PASS_ENV:-}            # names of further variables for the job; no secrets, they belong on the nodes
PIP=${PIP:-}                      # a requirements file that Ray installs for the job
PY_MODULES=${PY_MODULES:-}        # folders of packages that the cluster lacks, such as flipkd_dist
export PASS_ENV PIP PY_MODULES

cd "$WORKING_DIR"

# Configuration and paths are checked here; a mistake ends this script with 2 before anything is sent.
runtime_env=$(python -m flipkd_dist.ray_job submission "$VERB" "$@")

submit=(ray job submit --submission-id "$JOB_ID" --no-wait --working-dir . --runtime-env-json "$runtime_env")
submit+=(-- python -m flipkd_dist "$VERB" "$@")

if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${submit[@]}" && echo
  exit 0
fi

# Following it comes after: a submission that is refused, as for a name in use, must not pass for the end of that job.
"${submit[@]}" || { echo "flipkd: job $JOB_ID: was not submitted: see above why" >&2; exit 1; }
if [ "$WAIT" = 0 ]; then exit 0; fi
ray job logs --follow "$JOB_ID" || true  # a connection may be lost: the job server knows how the job ended
exec python -m flipkd_dist.ray_job outcome "$JOB_ID"
