"""Whether every node of the cluster sees the run's folder: asked before a pool or a training relies on it."""

import logging
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flipkd_dist.durable import room_in
from flipkd_dist.errors import UserError

logger = logging.getLogger("flipkd_dist")
PATIENCE_S = 10.0  # what a network file system may take to show a new file
SHARD_PATIENCE_S = 35.0  # the same for a file of another node: NFS keeps what it knows of a folder up to 30 s
ANSWER_S = 60.0  # after that a node does not answer: its file system hangs, or it is out of reach

# (ids of nodes, file, content): which nodes find the content there; None for one that is no longer in the cluster
Ask = Callable[[list[str], Path, str], list[bool | None]]


def sees(path: Path, content: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether the file is here with this content, or comes within the time; runs on the node that is asked."""
    end = time.monotonic() + patience_s
    while True:
        try:
            if path.read_text(encoding="utf-8") == content:
                return True
        except OSError:
            pass
        if time.monotonic() >= end:
            return False
        time.sleep(0.2)


def _not_shared(node: str, folder: Path) -> UserError:
    return UserError(
        f"output_dir: node {node} of the Ray cluster does not see {folder}, which {socket.gethostname()} "
        "writes: put output_dir on storage that every node shares, under one path"
    )


def comes(path: Path, patience_s: float = SHARD_PATIENCE_S) -> bool:
    """Whether a file that another node has written is here, or comes within the time."""
    end = time.monotonic() + patience_s
    while True:
        with suppress(OSError):  # not there, or a stale handle
            path.stat()
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.2)


def check_reached(folder: Path, nodes: dict[str, str] | None = None, ask: Ask | None = None) -> None:
    """Refuse a cluster whose nodes do not all see `folder`; with one node there is nothing to ask.

    Args:
        nodes: names by id; those of the Ray cluster.
        ask: puts the question to nodes; by a Ray task on each.
    Raises:
        UserError: names the node.
    """
    nodes, ask = _nodes() if nodes is None else nodes, ask or _ask_by_task
    if len(nodes) < 2:
        return
    content = uuid.uuid4().hex
    token = folder / f".reached-{content[:8]}"
    try:
        with room_in(folder):
            folder.mkdir(parents=True, exist_ok=True)
            token.write_text(content, encoding="utf-8")
        for name, found in zip(nodes.values(), ask(list(nodes), token, content), strict=True):
            if found is None:
                logger.warning("node %s has left the Ray cluster: it is not asked for %s", name, folder)
            elif not found:
                raise _not_shared(name, folder)
    finally:
        token.unlink(missing_ok=True)


def check_written(path: Path, node: str, patience_s: float = SHARD_PATIENCE_S) -> None:
    """Refuse a node whose file does not come here: one that joined late, say, and has a disk of its own.

    Raises:
        UserError: names the node.
    """
    if not comes(path, patience_s):
        raise _not_shared(node, path.parent)


def _nodes() -> dict[str, str]:
    import ray

    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"]
    }


def _ask_by_task(nodes: list[str], path: Path, content: str) -> list[bool | None]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    task, options = ray.remote(sees), dict(num_cpus=0, max_retries=0)
    asked = [task.options(scheduling_strategy=on, **options).remote(path, content) for on in there]
    end = time.monotonic() + ANSWER_S
    return [_answer(reference, node, end) for reference, node in zip(asked, nodes, strict=True)]


def _answer(reference: Any, node: str, end: float) -> bool | None:
    """What a node says; False where it does not answer in time, None where it has left the cluster."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(reference, timeout=max(0.0, end - time.monotonic()))
    except GetTimeoutError:
        ray.cancel(reference, force=True)
    except RayError:
        pass
    return False if node in _nodes() else None
