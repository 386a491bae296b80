"""Ray: a cluster joined or started, and the training workers on it. Imports ray inside its functions."""

import logging
import os
import signal
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from flipkd_dist.config import RunConfig, validate
from flipkd_dist.console import log_file
from flipkd_dist.errors import StoppedOnRequest, UserError, WorkerFailed
from flipkd_dist.failures import first_cause, forget, one_line
from flipkd_dist.ray_head import check_head, die_with_head, end_with_head, head_lost, refusal
from flipkd_dist.ray_meeting import meeting
from flipkd_dist.ray_pool import autoscales, task_options
from flipkd_dist.ray_watch import Watch, callback, ended, is_exported
from flipkd_dist.run_folder import RunFolder, write_whole

logger = logging.getLogger("flipkd_dist")
RESIZE_INTERVAL = "FLIPKD_RESIZE_INTERVAL_S"
NO_ERROR = (  # of an actor of Ray Train's own, at each start of workers; it looks like an error, and nothing is amiss
    r"core_worker\.cc:\d+: Actor with class name: 'PreemptionWatcher' and ID: '\w+' "
    r"has constructor arguments in the object store and max_restarts > 0\."
)


def join_or_start_ray(config: RunConfig, log_to_driver: bool = True) -> None:
    """Join the cluster at RAY_ADDRESS, whose end will be ours, or start one on this machine.

    Args:
        log_to_driver: show here what workers print.
    Raises:
        UserError: there is no cluster at RAY_ADDRESS, or one of another version.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not os.environ.get("FLIPKD_DEBUG"):
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", NO_ERROR)  # lines to leave out; read as ray is imported
    import ray

    if ray.is_initialized():
        return
    # Without a named address ray.init would attach to whatever cluster ran here last.
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {
        "runtime_env": {"worker_process_setup_hook": "flipkd_dist.ray_process.set_up"},
        "log_to_driver": log_to_driver,
    }
    if address == "local":
        options["include_dashboard"] = False
    check_head(address)
    taken = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.WARNING, **options)
    except Exception as error:
        raise refusal(address, error) or error from None
    signal.signal(signal.SIGTERM, taken)  # ray.init puts a handler of its own in its place
    if address != "local" and not address.startswith("ray://"):  # whose proxy dies with the head
        end_with_head(ray.get_runtime_context().gcs_address)


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
    from flipkd_dist.failures import noting

    set_up_logging(work["log"])
    config = validate(work["config"], "the driver's configuration")
    if not work["here"]:
        die_with_head()
    with noting(config.run_dir, int(os.environ.get("RANK", 0))):
        _stages(config, work)


def _stages(config: RunConfig, work: dict[str, Any]) -> None:
    from flipkd_dist.engine import join_world
    from flipkd_dist.evaluation import evaluate
    from flipkd_dist.train import train

    folder, world = RunFolder(config), join_world(config.distributed.use_gpu, config.distributed.timeout_s)
    try:
        for stage in work["stages"]:
            if stage != "train":
                evaluate(config, untrained=stage == "untrained")
            elif world.any(world.is_main and is_exported(folder, work["trained"])):  # before a worker was lost
                logger.info("train: the adapter is complete, skipped")
            else:
                train(config, work["mlflow_run_id"])
                if world.is_main and work["trained"]:
                    folder.mark_done("exported", work["trained"])
    except StoppedOnRequest as stopped:  # no failure, of which Ray would print a traceback
        if world.is_main and not _leave_word(folder, stopped):
            raise


def _leave_word(folder: RunFolder, stopped: StoppedOnRequest) -> bool:
    """Whether the disk, which may be why it stops, has taken the line for the driver."""
    try:
        write_whole(folder.stop, str(stopped))
    except OSError:
        return False
    return True


def run_workers(config: RunConfig, stages: list[str], mlflow_run_id: str | None, trained: str | None = None) -> None:
    """Run `train` and/or `evaluate`, or `untrained`, on `distributed.num_workers` workers of one process group.

    Args:
        trained: what the stage `train` is of; workers that are started again leave out what is complete.
    Raises:
        UserError, StoppedOnRequest: as raised in a worker.
        WorkerFailed: the failure that came first, with its rank and host.
    """
    gpu = uses_gpu(config)
    resolved = config.model_copy(update={"distributed": config.distributed.model_copy(update={"use_gpu": gpu})})
    here = _is_the_worker(config)
    work = {
        "config": resolved.model_dump(mode="json"),
        "stages": stages,
        "trained": trained,
        "mlflow_run_id": mlflow_run_id,
        "log": log_file(),
        "here": here,
    }
    folder = RunFolder(config)
    forget(folder.path)
    folder.save.unlink(missing_ok=True)
    _worker(work) if here else _fit(resolved, work)
    if folder.stop.is_file() and (said := folder.stop.read_text(encoding="utf-8")):
        folder.stop.unlink()
        raise StoppedOnRequest(said)


def _fit(config: RunConfig, work: dict[str, Any]) -> None:
    """Let Ray Train start the workers; `config` says whether they have GPUs."""
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchTrainer

    distributed, gpu, need = config.distributed, config.distributed.use_gpu, worker_resources(config)
    fixed = distributed.min_workers == distributed.max_workers
    # Room for workers is asked for anew so often; `Watch` says how long in all.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(min(60, distributed.timeout_s)))
    trainer = TorchTrainer(
        _worker,
        train_loop_config=work,
        scaling_config=ScalingConfig(
            num_workers=distributed.max_workers if fixed else (distributed.min_workers, distributed.max_workers),
            use_gpu=gpu,
            resources_per_worker=need,
            elastic_resize_monitor_interval_s=resize_interval_s(),
        ),
        torch_config=meeting(),
        run_config=TrainRunConfig(
            name="-".join([config.name, *work["stages"]]),
            storage_path=distributed.storage_path or str((config.run_dir / "ray").resolve()),
            failure_config=FailureConfig(max_failures=distributed.max_failures),
            callbacks=[callback(Watch(config, work["stages"], work["trained"], need, work["log"]))],
            logging_config=LoggingConfig(log_level="WARNING"),  # tracebacks of every attempt; the first cause is ours
        ),
    )
    try:
        trainer.fit()
    except (KeyboardInterrupt, SystemExit):  # of Ray's own handler of Ctrl-C: it would say that all went well
        raise head_lost() or KeyboardInterrupt from None
    except Exception as error:
        raise head_lost() or _reason(config, error) from error


def resize_interval_s() -> float:
    """How often Ray Train looks for room for more workers of a range.

    Raises:
        UserError: FLIPKD_RESIZE_INTERVAL_S is no number of seconds.
    """
    value = os.environ.get(RESIZE_INTERVAL, "60")
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < inf:
        raise UserError(f"{RESIZE_INTERVAL} = {value!r}: not a number of seconds above 0: correct or unset it")
    return seconds


def _reason(config: RunConfig, error: Exception) -> Exception:
    """What ended the workers, as it is said to the user."""
    said = getattr(error, "controller_failure", None)
    if isinstance(said, UserError | StoppedOnRequest | WorkerFailed):
        return said
    if cause := first_cause(config.run_dir):
        return ended(cause, config)
    while (inner := said or error.__cause__ or getattr(error, "cause", None)) is not None:
        error, said = inner, None
    return WorkerFailed(f"Ray Train: {one_line(error)}")


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
