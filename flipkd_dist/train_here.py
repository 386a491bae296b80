"""Training in processes that a launcher has started: each of them is a worker, rank 0 is the driver too."""

import os

from flipkd_dist.config import RunConfig
from flipkd_dist.engine import join_world
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.pipeline import Pipeline, told
from flipkd_dist.rendezvous import master
from flipkd_dist.run_logger import RunLogger
from flipkd_dist.stop import StopRequest
from flipkd_dist.teacher_stage import is_scored
from flipkd_dist.together import together
from flipkd_dist.train import on_main, train
from flipkd_dist.workbench import use_gpu_here


def train_here(config: RunConfig) -> None:
    """Train in this process, one of those that `deepspeed`, torchrun or srun started; rank 0 is the driver too.

    Raises:
        UserError: the teacher's store lacks texts.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    config.distributed.check_started(started)
    if started > 1:
        master()
    pipeline = Pipeline(config, on_ray=False)
    world = join_world(use_gpu_here(config), config.distributed.timeout_s)
    begun: list[str] = []  # on rank 0, the MLflow run

    def begin() -> None:
        if not is_scored(pipeline.inputs):
            raise UserError(f"{pipeline.folder.teacher}: the teacher's store lacks texts: run `flipkd score` first")
        if pipeline.complete("train", pipeline.trained):
            return
        pipeline.folder.open()
        StopRequest(pipeline.folder.stop).forget()
        begun.append(pipeline.mlflow_run())

    # Rank 0 looks for all: file systems may show different things. A slow server must not look like an absent rank.
    together(world, pipeline.folder.path, lambda: on_main(world, begin))
    if not world.gather_object(begun)[0]:
        return
    run_id = begun[0] if begun else None
    tracker = RunLogger(pipeline.config, run_id)
    tracker.reopen()
    try:
        with told(tracker):
            train(pipeline.config, run_id)
    except StoppedOnRequest:
        world.barrier()  # the launcher ends all as soon as one is gone: rank 0 has told MLflow now
        raise
    if not world.is_main:
        return
    pipeline.conclude(tracker)
