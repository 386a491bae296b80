"""`deepspeed --num_gpus N launchers/deepspeed_train.py CONFIG [key=value ...]`; also under torchrun, and under srun.

`distributed.num_workers` must be the number of processes; under srun export MASTER_ADDR and MASTER_PORT. Every process
runs this file and ends in the same `train` as `flipkd train`. The teacher's store has to be there:
`flipkd score CONFIG` fills it.
"""

import argparse
import os
import sys

from flipkd_dist.config import load_config
from flipkd_dist.console import set_up_logging
from flipkd_dist.errors import StoppedAtOnce, StoppedOnRequest, UserError
from flipkd_dist.stop import handling, stop_at_once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    arguments = parser.parse_args()
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    for name, slurm in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"), ("WORLD_SIZE", "SLURM_NTASKS")):
        if name not in os.environ and slurm in os.environ:
            os.environ[name] = os.environ[slurm]
    set_up_logging()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if os.environ.get("DRY_RUN"):
            print(f"train {config.run_dir} on {os.environ.get('WORLD_SIZE', 1)} processes")
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
