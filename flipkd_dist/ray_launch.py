"""Ray: a cluster joined or started, and the training workers on it. Imports ray inside its functions."""

import logging
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from flipkd_dist.config import RunConfig, validate
from flipkd_dist.console import log_file
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.ray_pool import autoscales, task_options
from flipkd_dist.run_folder import RunFolder, write_whole

logger = logging.getLogger("flipkd_dist")


def join_or_start_ray(config: RunConfig, log_to_driver: bool = True) -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine.

    Args:
        log_to_driver: show here what workers print.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if not ray.is_initialized():
        # Without a named address ray.init would attach to whatever cluster ran here last.
        address = os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {
            "runtime_env": {"worker_process_setup_hook": "flipkd_dist.console.quiet_ray_worker"},
            "log_to_driver": log_to_driver,
        }
        if address == "local":
            options["include_dashboard"] = False
        taken = signal.getsignal(signal.SIGTERM)
        ray.init(address=address, logging_level=logging.WARNING, **options)
        signal.signal(signal.SIGTERM, taken)  # ray.init puts a handler of its own in its place


def check_room(config: RunConfig) -> None:
    """Refuse training workers that the joined cluster can never run.

    Raises:
        UserError: more than a cluster without autoscaling has.
    """
    import ray

    need = worker_resources(config)
    have = ray.cluster_resources()
    for resource, amount in need.items():
        wanted, there = amount * config.distributed.min_workers, have.get(resource, 0.0)
        if wanted > there and not autoscales():
            raise UserError(
                f"distributed.num_workers: {config.distributed.min_workers} workers need {wanted:g} {resource}, "
                f"the Ray cluster has {there:g}: lower num_workers or add nodes"
            )


def uses_gpu(config: RunConfig) -> bool:
    """Decided by the cluster, not by the head node, which may have no GPU."""
    import ray

    wanted = config.distributed.use_gpu
    return ray.cluster_resources().get("GPU", 0) > 0 if wanted == "auto" else wanted


def worker_resources(config: RunConfig) -> dict[str, float]:
    """What one training worker takes; a worker drives one GPU."""
    resources = {"CPU": 1.0, **({"GPU": 1.0} if uses_gpu(config) else {}), **config.distributed.resources_per_worker}
    if resources.get("GPU", 0) > 1:
        raise UserError("distributed.resources_per_worker: a worker drives one GPU: set GPU to 1 and raise num_workers")
    return resources


def _worker(work: dict[str, Any]) -> None:
    from flipkd_dist.console import set_up_logging
    from flipkd_dist.evaluation import evaluate
    from flipkd_dist.train import train
    from flipkd_dist.world import World

    set_up_logging(work["log"])
    config = validate(work["config"], "the driver's configuration")
    try:
        for stage in work["stages"]:
            if stage == "train":
                train(config, work["mlflow_run_id"])
            else:
                evaluate(config, untrained=stage == "untrained")
    except StoppedOnRequest as stopped:  # no failure, of which Ray would print a traceback
        if World.current().is_main:
            write_whole(RunFolder(config).stop, str(stopped))


def run_workers(config: RunConfig, stages: list[str], mlflow_run_id: str | None) -> None:
    """Run `train` and/or `evaluate`, or `untrained`, on `distributed.num_workers` workers of one process group.

    Raises:
        UserError, StoppedOnRequest: as raised in a worker.
        RuntimeError: the first worker's failure, with its rank.
    """
    gpu = uses_gpu(config)
    resolved = config.model_copy(update={"distributed": config.distributed.model_copy(update={"use_gpu": gpu})})
    work = {
        "config": resolved.model_dump(mode="json"),
        "stages": stages,
        "mlflow_run_id": mlflow_run_id,
        "log": log_file(),
    }
    _worker(work) if _is_the_worker(config) else _fit(resolved, work)
    stop = RunFolder(config).stop
    if stop.is_file() and (said := stop.read_text(encoding="utf-8")):
        stop.unlink()
        raise StoppedOnRequest(said)


def _fit(config: RunConfig, work: dict[str, Any]) -> None:
    """Let Ray Train start the workers; `config` says whether they have GPUs."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    distributed, gpu = config.distributed, config.distributed.use_gpu
    fixed = distributed.min_workers == distributed.max_workers
    trainer = TorchTrainer(
        _worker,
        train_loop_config=work,
        scaling_config=ScalingConfig(
            num_workers=distributed.max_workers if fixed else (distributed.min_workers, distributed.max_workers),
            use_gpu=gpu,
            resources_per_worker=worker_resources(config),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=distributed.timeout_s),
        run_config=TrainRunConfig(
            name="-".join([config.name, *work["stages"]]),
            storage_path=distributed.storage_path or str((config.run_dir / "ray").resolve()),
            failure_config=FailureConfig(max_failures=distributed.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        failures = getattr(error, "worker_failures", None) or {0: error}
        rank, cause = next(iter(sorted(failures.items())))
        while cause.__cause__ is not None or getattr(cause, "cause", None) is not None:
            cause = cause.__cause__ or cause.cause
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
        raise RuntimeError(
            f"worker of rank {rank}: {type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
        ) from error


def _is_the_worker(config: RunConfig) -> bool:
    """Whether this process is a task that may train by itself: another process would import everything again."""
    import ray

    return ray.get_runtime_context().worker.mode == ray.WORKER_MODE and trains_in_task(config)


def trains_in_task(config: RunConfig) -> bool:
    """One worker without DeepSpeed is a process like any other."""
    return config.distributed.max_workers == 1 and config.distributed.deepspeed is None


def places(config: RunConfig) -> int:
    """How many runs of this size the cluster has room for at once, at least one."""
    import ray

    have = ray.cluster_resources()
    each = {key: amount * config.distributed.min_workers for key, amount in worker_resources(config).items() if amount}
    return max(1, min((int(have.get(key, 0) // amount) for key, amount in each.items()), default=1))


def runs_at_once(configs: Sequence[RunConfig], jobs: int | None) -> int:
    """As many of these runs as there is room for, and no more than `jobs`; where nodes can be added, just `jobs`."""
    if jobs is not None and autoscales():
        return jobs
    room = min(places(config) for config in configs)
    return room if jobs is None else min(room, jobs)


class Tasks:
    """Calls of one function on the cluster, each in a process of its own; a process that is free takes the next."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.running = function, {}

    def start(self, key: Any, config: RunConfig, computes: bool, ends_process: bool, *arguments: Any) -> None:
        """Call the function with `arguments`.

        Args:
            computes: by itself: the call takes a worker's resources.
            ends_process: what it leaves in memory would count for the next one.
        """
        import ray

        options = task_options(worker_resources(config) if computes else {})
        if ends_process:
            options["max_calls"] = 1
        task = ray.remote(max_retries=0, **options)(self.function)  # with GPUs, Ray takes a new process for each call
        self.running[task.remote(*arguments)] = key

    def ended(self, timeout_s: float) -> list[tuple[Any, Any]]:
        """(key, result or exception) of each call that has ended, after waiting for one as long as told."""
        import ray

        if not self.running:
            return []
        done, _ = ray.wait(list(self.running), timeout=timeout_s)
        found = []
        for reference in done:
            try:
                result = ray.get(reference)
            except Exception as error:  # its process died, or could not start
                result = error
            found.append((self.running.pop(reference), result))
        return found
