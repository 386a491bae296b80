"""Whether every node of the cluster sees the run's folder: asked before a pool or a training relies on it."""

import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from flipkd_dist.errors import UserError

PATIENCE_S = 10.0  # what a network file system may take to show a new file

Ask = Callable[[list[str], Path, str], list[bool]]  # (ids of nodes, file, content): which nodes find the content there


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
    folder.mkdir(parents=True, exist_ok=True)
    content = uuid.uuid4().hex
    token = folder / f".reached-{content[:8]}"
    try:
        token.write_text(content, encoding="utf-8")
        for name, found in zip(nodes.values(), ask(list(nodes), token, content), strict=True):
            if not found:
                raise UserError(
                    f"output_dir: node {name} of the Ray cluster does not see {folder}, which {socket.gethostname()} "
                    "writes: put output_dir on storage that every node shares, under one path"
                )
    finally:
        token.unlink(missing_ok=True)


def _nodes() -> dict[str, str]:
    import ray

    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"]
    }


def _ask_by_task(nodes: list[str], path: Path, content: str) -> list[bool]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    task = ray.remote(sees)
    return ray.get([task.options(num_cpus=0, scheduling_strategy=on).remote(path, content) for on in there])
