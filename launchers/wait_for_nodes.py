"""`python launchers/wait_for_nodes.py NODES [SECONDS]`: wait until the Ray cluster at RAY_ADDRESS has so many nodes."""

import logging
import os
import sys
import time


def main() -> None:
    wanted, patience_s = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 300.0
    import ray

    deadline, there, reason = time.monotonic() + patience_s, 0, ""
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(os.environ["RAY_ADDRESS"], logging_level=logging.ERROR, log_to_driver=False)
            there = sum(node["Alive"] for node in ray.nodes())
        except (ConnectionError, RuntimeError) as error:  # the head is not there yet
            reason = " ".join(str(error).split())[:200]
        if there >= wanted:
            return
        time.sleep(1)
    said = f"{there} of {wanted} nodes" if there else f"no Ray ({reason})"
    print(
        f"flipkd: RAY_ADDRESS: {said} at {os.environ['RAY_ADDRESS']} within {patience_s:g} s: "
        "look for the missing nodes' errors above, and whether they reach this address",
        file=sys.stderr,
    )
    sys.exit(1)


if __name__ == "__main__":
    main()
