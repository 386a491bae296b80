"""Training speed and memory of ours and of what users would pick instead: the same weights, pairs, batches and cores.

    python benchmarks/training_speed/compare.py                      # the headline, all three sizes
    python benchmarks/training_speed/compare.py --size short ours ours: hf_trainer

Every run is a process of its own. A round runs each variant once, the next round in the opposite order; a ratio is that
of two runs of one round. benchmarks/README.md tells the whole.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import click
from make_texts import SIZES
from measure import RESULT, Spec
from summary import markdown, rows, speed
from variants import BASELINE, VARIANTS, chosen

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def python_of(name: str, peers: Path) -> Path:
    """The interpreter of a variant; a peer that lives in ours too (Sentence-Transformers) may go without its own."""
    own = peers / VARIANTS[name].environment / "bin" / "python"
    return own if own.exists() or VARIANTS[name].environment not in ("own", "sentence_transformers") else sys.executable


def environment(threads: int) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
    return inherited | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(PROJECT),
        "DS_ACCELERATOR": "cpu",
    }


def run(name: str, spec: Spec, python: Path, threads: int, log: Path) -> dict | None:
    """One process; its result, or None and a line that says where its output is."""
    command = [str(python), str(HERE / VARIANTS[name].script), json.dumps(vars(spec))]
    with tempfile.TemporaryDirectory() as scratch:
        command[-1] = json.dumps(vars(spec) | {"scratch": scratch})
        done = subprocess.run(command, capture_output=True, text=True, env=environment(threads), cwd=scratch)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    results = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not results:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        click.echo(f"  {name}: failed ({last[:200]}), all of it in {log}")
        return None
    return json.loads(results[-1])


def compare(size: str, names: list[str], settings: dict, work: Path) -> dict:
    """All rounds of one size: `rows` of the table and every run."""
    prepared = work / size
    count = (settings["warmup"] + settings["steps"]) * settings["batch_size"]
    command = [sys.executable, str(HERE / "prepare.py"), str(prepared), size, str(count), str(settings["seed"])]
    with (work / f"{size}-prepare.log").open("w") as log:
        subprocess.run(command, check=True, env=environment(settings["threads"]), stdout=log, stderr=log)
    keys = ("batch_size", "warmup", "steps", "lora_r", "lora_dropout", "learning_rate", "seed")
    rounds: list[dict[str, dict]] = []
    for number in range(settings["rounds"]):
        rounds.append({})
        for name in names[:: 1 if number % 2 == 0 else -1]:
            spec = Spec(
                prepared=str(prepared),
                scratch="",
                group_size=SIZES[size].group,
                max_length=SIZES[size].max_length,
                options=VARIANTS[name].options | {"size": size},
                **{key: settings[key] for key in keys},
            )
            log = work / f"{size}-{name.replace(':', '-')}-{number}.log"
            result = run(name, spec, python_of(name, settings["peers"]), settings["threads"], log)
            if result is not None:
                rounds[-1][name] = result
                click.echo(
                    f"  round {number + 1}: {name}: {speed(result):.1f} sequences/s, {result['peak_mib']:.0f} MiB"
                )
    rounds = [{name: one[name] for name in names if name in one} for one in rounds]
    return {"table": rows(rounds, BASELINE), "rounds": rounds}


@click.command(help=__doc__.partition("\n")[0])
@click.argument("variants", nargs=-1)
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(SIZES)), help="Default: all.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--warmup", default=3, show_default=True, help="Steps before the clock counts.")
@click.option("--steps", default=10, show_default=True, help="Steps that it counts.")
@click.option("--batch-size", default=32, show_default=True, help="Sequences of a step; whole groups of 16.")
@click.option("--lora-r", default=384, show_default=True)
@click.option("--lora-dropout", default=0.05, show_default=True)
@click.option("--learning-rate", default=3e-5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--peers", default=".peers", show_default=True, type=click.Path(path_type=Path), help="Of peers.sh.")
@click.option("--work", default="runs/training_speed", show_default=True, type=click.Path(path_type=Path))
def main(variants, sizes, work, **settings) -> None:
    try:
        names = chosen(variants)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    settings["peers"], work = settings["peers"].resolve(), work.resolve()
    there = [name for name in names if Path(python_of(name, settings["peers"])).exists()]
    for name in set(names) - set(there):
        click.echo(f"{name}: left out, not installed: run benchmarks/peers.sh {VARIANTS[name].environment}")
    work.mkdir(parents=True, exist_ok=True)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "python": platform.python_version(),
        "settings": settings | {"peers": str(settings["peers"])},
        "sizes": {},
    }
    for size in sizes or SIZES:
        click.echo(f"{size}:")
        report["sizes"][size] = compare(size, there, settings, work)
        (work / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        click.echo(f"\n{size}\n\n{markdown(report['sizes'][size]['table'], BASELINE)}\n")
    click.echo(f"every run: {work / 'results.json'}")


if __name__ == "__main__":
    main()
