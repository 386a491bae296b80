"""The command line, with workers that rest before each step as long as the file at SLOW_STEPS says (seconds).

So a test has the time to do something to a training that is short by itself.
"""

import os
import time
from pathlib import Path

from flipkd_dist import ray_launch
from flipkd_dist.cli import main

ours = ray_launch._worker


def worker(work: dict) -> None:
    from flipkd_dist.step import TrainingStep

    run_step = TrainingStep.__call__

    def slowly(step, *arguments):
        time.sleep(float(Path(os.environ["SLOW_STEPS"]).read_text()))
        return run_step(step, *arguments)

    TrainingStep.__call__ = slowly
    ours(work)


if __name__ == "__main__":
    import slow_steps  # by which name the workers find it

    ray_launch._worker = slow_steps.worker
    main()
