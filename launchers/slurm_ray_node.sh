# A node of the job's own Ray, started by slurm_ray.sbatch as a task on each of them: the head is on the first.
# Two nodes may be one host: ports and folders differ from node to node. Ray's own processes find it by RAY_ADDRESS, too.
options="--block --disable-usage-stats --num-cpus=$SLURM_CPUS_ON_NODE --temp-dir=$RAY_TMPDIR/$SLURM_NODEID
  --dashboard-agent-listen-port=$((PORT + 2 + SLURM_NODEID % 16))"
if [ "$SLURM_NODEID" = 0 ]; then
  set -- --head --node-ip-address="$MASTER_ADDR" --port="$PORT" --ray-client-server-port=$((PORT + 1)) \
    --include-dashboard=false
else
  until (: <"/dev/tcp/$MASTER_ADDR/$PORT") 2>/dev/null; do sleep 1; done
  set -- --address="$RAY_ADDRESS"
fi
# On preemption Slurm sends TERM to every process of every step. It is blocked here, or Ray would be gone before the
# checkpoint; what ends this Ray is SIGKILL, by the batch script or by Slurm.
exec python -c 'import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.execvp(sys.argv[1], sys.argv[1:])' ray start "$@" $options
