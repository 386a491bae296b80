"""Seconds of a step by phase at 1, 2 and 4 processes of this machine, beside the planner's model.

    python benchmarks/scaling.py RUN.yaml train.per_device_train_batch_size=16 --worlds 1 2 4 --steps 40

Weak scaling: the pairs per device are kept. Every world is a training of its own through `launchers/deepspeed_train.py`
(gloo, one thread a process), after one `flipkd score`. Processes that share cores slow each other down, so only shares
and ratios mean something. The seconds are those of the last line of `metrics.jsonl`; the first step is in none of them.
`benchmarks/played_rank.py` plays larger worlds. Prints a table, whose last two columns are what the planner says and
nothing measured, and a line of JSON.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from flipkd_dist.config import RunConfig, load_config
from flipkd_dist.phases import PHASES
from flipkd_dist.run_folder import RunFolder
from flipkd_dist.scaling_report import make_scaling

LAUNCHER = Path(__file__).parents[1] / "launchers" / "deepspeed_train.py"


def overrides(options, world: int) -> list[str]:
    """Of one training: no validation and no checkpoint is among its steps."""
    steps = options.steps
    fixed = [f"train.max_steps={steps}", f"train.logging_steps={steps - 1}", f"train.save_steps={steps}"]
    fixed += [f"train.eval_steps={steps}", "data.validation=null", "data.test=null", "distributed.use_gpu=false"]
    return [*options.overrides, *fixed, f"name=scaling-{world}", f"distributed.num_workers={world}"]


def train(options, world: int) -> dict[str, float]:
    """Seconds of a step and of its phases, means over ranks and steps."""
    config = load_config(options.config, overrides(options, world))
    for part in ("checkpoints", "metrics.jsonl", "adapter", "stages.json"):
        path = config.run_dir / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(LAUNCHER), str(options.config), *overrides(options, world)]
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.DEVNULL)
        for rank in range(world)
    ]
    if any([rank.wait() for rank in ranks]):
        raise SystemExit(f"{world} processes: a training failed; run {' '.join(command)} by hand")
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "step_seconds" in line and line["step"] < options.steps]
    last = max(timed, key=lambda line: line["step"])
    return {"step": last["step_seconds"], **{phase: last[f"seconds_{phase}"] for phase in PHASES}}


def score(options) -> None:
    """One world's store serves all: the texts are the same."""
    configs: list[RunConfig] = [load_config(options.config, overrides(options, world)) for world in options.worlds]
    command = [
        sys.executable,
        "-m",
        "flipkd_dist",
        "score",
        str(options.config),
        *overrides(options, options.worlds[0]),
    ]
    subprocess.run(command, check=True)
    for config in configs[1:]:
        RunFolder(config).open()
        shutil.copytree(configs[0].run_dir / "teacher", config.run_dir / "teacher", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each world, interleaved; medians count")
    options = parser.parse_intermixed_args()
    score(options)
    rounds = [{world: train(options, world) for world in options.worlds} for _ in range(options.rounds)]
    found = {
        world: {name: median(one[world][name] for one in rounds) for name in rounds[0][world]}
        for world in options.worlds
    }
    scaling = make_scaling(load_config(options.config, overrides(options, 1)), "weak")
    model = {step.ranks: step for step in scaling.steps}
    head = "  ".join(f"{phase:>13}" for phase in PHASES)
    print(f"{'processes':>13}  {'step ms':>9}  {head}   model alone: sent MB, contrast's share of its step")
    for world, seconds in found.items():
        planned = model[world]
        sent = planned.wire_bytes / 1e6
        matrix = (planned.gather_s + planned.scatter_s + planned.matrix_s) / planned.step_s
        shares = "  ".join(f"{seconds[phase] / seconds['step']:>13.1%}" for phase in PHASES)
        print(f"{world:>13}  {seconds['step'] * 1e3:>9.1f}  {shares}   {sent:.1f}, {matrix:.2%}")
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "seconds": found}))


if __name__ == "__main__":
    main()
