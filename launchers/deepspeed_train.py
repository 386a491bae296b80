"""`deepspeed --num_gpus N launchers/deepspeed_train.py CONFIG [key=value ...]`; also under torchrun, and under srun.

`distributed.num_workers` must be the number of processes. Every process runs this file and ends in the same `train` as
`flipkd train`. The teacher's store has to be there: `flipkd score CONFIG` fills it. With DRY_RUN=1 rank 0 prints its
command, and nothing is trained. See docs/launchers.md.
"""

import argparse
import os
import shlex
import sys

from flipkd_dist.config import load_config
from flipkd_dist.console import set_up_logging
from flipkd_dist.errors import StoppedAtOnce, StoppedOnRequest, UserError
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
    try:
        config = load_config(arguments.config, arguments.overrides)
        if os.environ.get("DRY_RUN"):
            if os.environ.get("RANK", "0") == "0":
                print(f"on {os.environ.get('WORLD_SIZE', 1)} processes:", shlex.join([sys.executable, *sys.argv]))
            return
        from flipkd_dist.pipeline import train_here

        with handling(stop_at_once):
            train_here(config)
    except (UserError, StoppedOnRequest, StoppedAtOnce) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # a mistake may be that of one host
            print(f"flipkd: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 75)


if __name__ == "__main__":
    main()
