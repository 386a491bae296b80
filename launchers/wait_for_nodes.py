"""`python launchers/wait_for_nodes.py NODES SECONDS`: wait until the Ray cluster at RAY_ADDRESS has so many nodes."""

import logging
import os
import socket
import sys
import time


def answers(address: str) -> bool:
    """Whether anything listens there; asked first, because Ray alone would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def nodes_at(address: str) -> int:
    """Nodes of the cluster that are alive; 0 where there is none yet."""
    import ray

    try:
        if not ray.is_initialized():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        return sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError):
        return 0


def main() -> None:
    wanted, patience_s = int(sys.argv[1]), float(sys.argv[2])
    address, deadline, there = os.environ["RAY_ADDRESS"], time.monotonic() + patience_s, 0
    while time.monotonic() < deadline:
        there = nodes_at(address) if answers(address) else 0
        if there >= wanted:
            return
        time.sleep(1)
    print(
        f"flipkd: RAY_ADDRESS: {there} of {wanted} Ray nodes at {address} within {patience_s:g} s: see what the "
        "missing ones said above, and whether they reach this address; export WAIT_S for more time",
        file=sys.stderr,
    )
    sys.exit(1)


if __name__ == "__main__":
    main()
