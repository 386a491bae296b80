"""A gang of gloo processes forked from this one, so that imports are paid once."""

import multiprocessing
import os
import tempfile
import threading
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm


def _member(rank: int, size: int, store: str, function, arguments, queue) -> None:
    # tqdm's own lock is shared with every other fork: one that is killed while it holds it would stop them all.
    tqdm.set_lock(threading.RLock())
    # torch renews its thread pool after a fork at the first use and without a lock: here, before there are threads.
    torch.set_num_threads(torch.get_num_threads())
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        queue.put((rank, function(*arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        queue.close()
        queue.join_thread()
        os._exit(0)  # no clean-up of the parent's state in the fork


@contextmanager
def gang(size: int, function, *arguments):
    """`function(*arguments)` in `size` processes of one process group: the processes, and the queue of what they give.

    The queue gets (rank, value or None, error or None); values are numpy, not tensors.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        members = [
            context.Process(
                target=_member, args=(rank, size, f"{folder}/store", function, arguments, queue), daemon=True
            )
            for rank in range(size)
        ]
        for member in members:
            member.start()
        try:
            yield members, queue
        finally:
            for member in members:
                member.join(timeout=5)
                if member.is_alive():
                    member.kill()


def run_gang(size: int, function, *arguments, timeout_s: int = 240) -> list:
    """What `function(*arguments)` returned on each rank."""
    results = {}
    with gang(size, function, *arguments) as (_, queue):
        while len(results) < size:
            rank, value, error = queue.get(timeout=timeout_s)
            assert error is None, f"rank {rank} of {size}:\n{error}"
            results[rank] = value
    return [results[rank] for rank in range(size)]
