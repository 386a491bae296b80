# What both batch scripts do alike; they source it. A job is a row of stages; each is a Slurm step that this shell waits
# for, so that signals come to the step and its exit code decides what becomes of the job.
job=${SLURM_JOB_ID:-0}
port=$((20000 + job % 500 * 20))  # the job's own 20 ports on each of its nodes
command -v flipkd >/dev/null || [ ! -f .venv/bin/activate ] || . .venv/bin/activate
if [ -z "${DRY_RUN:-}" ] && ! command -v flipkd >/dev/null; then
  echo "flipkd: PATH: no flipkd there, nor in $PWD/.venv: install it there, or activate its environment, then submit" >&2
  exit 2
fi

# The first node is where processes meet, by the address at which Slurm reaches it: its name may mean nothing elsewhere.
first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2>/dev/null | head -n 1)
address=$(scontrol show node "$first" 2>/dev/null | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
first=${first:-FIRST_NODE}
export MASTER_ADDR=${MASTER_ADDR:-${address:-localhost}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export RAY_TMPDIR=/tmp/fk$job  # of this job alone, and short: a socket's path has 107 characters at most

# Whatever the site sets: a task that has ended early ends no other one.
srun=(srun --overlap --kill-on-bad-exit=0 --wait=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")

# Before the limit USR1 comes to this shell alone; it goes on to the step's tasks, which write a checkpoint and end with 75.
asked="" step="" ray=""
trap 'asked=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1

say() { echo "$(date '+%F %T') job $job: $*"; }

background() {  # a step that lasts as long as the job
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${srun[@]}" "${@:2}"; echo "&"; return; fi
  "${srun[@]}" "${@:2}" & ray=$!
}

stage() {  # NAME, then srun's options and the command; leaves the job if it fails
  local name=$1; shift
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${srun[@]}" "$@"; echo; return; fi
  [ -z "$asked" ] || leave 75
  say "$name, start $((${SLURM_RESTART_COUNT:-0} + 1))"
  "${srun[@]}" "$@" & local new=$!
  # Until srun is there, the process is a copy of this shell, and a signal would be lost in its trap.
  while [ "$(cat "/proc/$new/comm" 2>/dev/null)" = "$(cat /proc/$$/comm)" ]; do sleep 0.01; done
  step=$new
  [ -z "$asked" ] || kill -USR1 "$step" 2>/dev/null  # it came after the question above, when the trap knew no step
  local code=0; wait "$step" || code=$?
  while [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do code=0; wait "$step" || code=$?; done
  step=""
  [ "$code" = 0 ] || leave "$code"
}

ask() {  # scontrol; for a minute again where the controller is busy or its backup takes over. `answer` is what it said
  local try
  for try in {1..12}; do
    answer=$(scontrol "$@" 2>&1) && return
    [[ $answer == *@("timed out"|"Unable to contact"|"Zero Bytes")* ]] || return
    sleep "${ASK_EVERY_S:-5}"
  done
  false
}

leave() {
  trap '' USR1
  [ -z "${DRY_RUN:-}" ] || exit 0
  [ -z "$ray" ] || { kill "$ray"; wait "$ray"; } 2>/dev/null  # TERM to srun: it kills its tasks at once
  # On preemption Slurm asks the tasks by TERM and tells this shell nothing. A cancelled job is no longer RUNNING; one that
  # was stopped in another way (the file `stop`, a full disk) is for the user to start again.
  ask show job "$job"
  local now=$answer
  case $1 in
    0)
      local nodes=${SLURM_NNODES:-1}  # as many tasks: the job's number of them holds for each step otherwise
      srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 rm -rf "/tmp/fk$job"
      say "DONE" ;;
    75 | 138 | 143)  # 128 + USR1, 128 + TERM: the signal came before the process listened, nothing is lost
      local why="it stopped by itself, as said above"
      if [[ $now != *JobState=RUNNING* ]]; then
        why=$(grep -o 'JobState=[A-Z_]*' <<<"$now") || why="scontrol show job: ${now:-nothing}"
      elif [[ -n $asked || $now == *" PreemptTime=2"* ]]; then
        say "stopped before its end: back into the queue"
        # Then wait until Slurm ends this shell: an exit now would end the job instead.
        ask requeue "$job" && sleep infinity
        why="scontrol requeue: $answer"
      fi
      echo "flipkd: job $job: ended with $1 before it was done and is not put back (${why//$'\n'/; }):" \
        "submit it again to go on" >&2 ;;
    *) say "failed with exit code $1: not started again" ;;
  esac
  exit "$1"
}
