"""`deepspeed --num_gpus N launchers/deepspeed_train.py CONFIG [key=value ...]`; also under torchrun, and under srun.

`distributed.num_workers` must be the number of processes. Every process runs this file and ends in the same `train` as
`flipkd train`. The teacher's store has to be there: `flipkd score CONFIG` fills it. With DRY_RUN=1 configuration and
number are checked, rank 0 prints its command, and nothing is trained. See docs/launchers.md.
"""

import argparse
import os
import shlex
import sys
import traceback

from flipkd_dist.config import load_config
from flipkd_dist.console import set_up_logging
from flipkd_dist.errors import StoppedAtOnce, UserError
from flipkd_dist.slurm_world import slurm_world
from flipkd_dist.stop import handling, stop_at_once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    arguments = parser.parse_args()
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    os.environ.update(slurm_world(os.environ))
    set_up_logging()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dry = bool(os.environ.get("DRY_RUN"))
    try:
        config = load_config(arguments.config, arguments.overrides)
        if dry:
            config.distributed.check_started(size)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"flipkd: {error}", file=sys.stderr)
        sys.exit(2)
    if dry:
        if rank == 0:
            print(f"on {size} processes:", shlex.join([sys.executable, *sys.argv]))
        return
    try:
        with handling(stop_at_once):
            from flipkd_dist.failures import noting
            from flipkd_dist.train_here import train_here

            with noting(config.run_dir, rank, size):
                train_here(config)
    except (Exception, StoppedAtOnce) as error:
        from flipkd_dist.last_words import last_words

        if os.environ.get("FLIPKD_DEBUG"):
            traceback.print_exc()
        line, code = last_words(config.run_dir, rank, size, error)
        if line:
            print(f"flipkd: {line}", file=sys.stderr, flush=True)
        sys.exit(code)


if __name__ == "__main__":
    main()
