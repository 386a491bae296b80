"""The command line `flipkd`: the verbs of a run, and how every verb ends.

Heavy imports happen inside the verbs, so that `--help` answers at once.
"""

import json
import logging
import os
import sys
from pathlib import Path

import click

from flipkd_dist import ray_head
from flipkd_dist.config import load_config, without_credentials
from flipkd_dist.console import set_up_logging
from flipkd_dist.durable import storage_line, storage_reason
from flipkd_dist.errors import HeadLost, StoppedAtOnce, StoppedOnRequest, UserError, WorkerFailed
from flipkd_dist.file_verbs import convert, export, pairs, store
from flipkd_dist.run_folder import RunFolder
from flipkd_dist.stop import handling, stop_at_once
from flipkd_dist.text_verbs import cluster, embed, predict, rank, retrieve

logger = logging.getLogger("flipkd_dist")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT, no_args_is_help=False)
@click.version_option(package_name="flipkd_dist", prog_name="flipkd")
def cli() -> None:
    """Flipped knowledge distillation for text matching: a small encoder teaches a large decoder.

    A verb takes CONFIG.yaml and any number of dotted overrides: flipkd run bank.yaml train.max_steps=100
    """


def configured(function):
    """CONFIG [key=value ...], as most verbs take it."""
    function = click.argument("overrides", nargs=-1, metavar="[key=value ...]")(function)
    return click.argument("config", type=click.Path(path_type=Path))(function)


def _pipeline(config: Path, overrides: tuple[str, ...], needs_adapter: bool = False):
    loaded = load_config(config, overrides)  # before the slow imports: a typing mistake is answered at once
    if needs_adapter:  # and before Ray is started
        RunFolder(loaded).require_adapter()
    from flipkd_dist.pipeline import Pipeline

    return Pipeline(loaded)


@cli.command()
@configured
def run(config: Path, overrides: tuple[str, ...]) -> None:
    """Score, train, evaluate and register; a stage that is complete for the same inputs is skipped."""
    _pipeline(config, overrides).run()


@cli.command()
@configured
def score(config: Path, overrides: tuple[str, ...]) -> None:
    """Fill the teacher's store with the vector of every text of train, validation and test."""
    loaded = load_config(config, overrides)
    from flipkd_dist.pipeline import score_files

    score_files(loaded)


@cli.command()
@configured
def teach(config: Path, overrides: tuple[str, ...]) -> None:
    """Fine-tune the teacher on data.train; from then on the run uses the result."""
    loaded = load_config(config, overrides)
    from flipkd_dist.teach import teach

    teach(loaded)


@cli.command()
@configured
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Fine-tune the student on Ray workers (scores first what the teacher's store lacks)."""
    pipeline = _pipeline(config, overrides)
    pipeline.score()
    pipeline.train()


@cli.command()
@configured
def evaluate(config: Path, overrides: tuple[str, ...]) -> None:
    """Metrics of the run's adapter on validation and test."""
    pipeline = _pipeline(config, overrides, needs_adapter=True)
    pipeline.score()
    pipeline.evaluate()


@cli.command()
@configured
@click.option("--alias", help="The alias that will mean it. Default: tracking.alias.")
def register(config: Path, overrides: tuple[str, ...], alias: str | None) -> None:
    """Add the run's adapter to the MLflow registry, load it back, compare, and move the alias to it."""
    if alias is not None:
        overrides = (*overrides, f"tracking.alias='{alias}'")
    _pipeline(config, overrides, needs_adapter=True).register()


@cli.command()
@configured
@click.option("--from", "source", default="challenger", show_default=True, help="The alias of the version to promote.")
@click.option("--to", "target", default="champion", show_default=True, help="The alias that will mean it.")
@click.option("--force", is_flag=True, help="Promote a version that is worse, or cannot be compared.")
def promote(config: Path, overrides: tuple[str, ...], source: str, target: str, force: bool) -> None:
    """Move an alias to a version that is not worse on the same test pairs; --from previous goes back."""
    loaded = load_config(config, overrides)
    from flipkd_dist import promotion

    for line in promotion.promote(loaded, source, target, force):
        click.echo(line)


@cli.command()
@configured
def show(config: Path, overrides: tuple[str, ...]) -> None:
    """Print the resolved configuration."""
    click.echo(load_config(config, overrides).to_yaml(), nl=False)


@cli.command()
@configured
@click.option("--device", help="Such as h100-80gb, a100-40gb, rtx4090, cpu. Default: h100-80gb, cpu without a GPU.")
@click.option("--device-memory", type=click.FloatRange(0, min_open=True), help="GiB of one device.")
@click.option("--tflops", type=click.FloatRange(0, min_open=True), help="Peak of one device, dense, 10^12 a second.")
@click.option("--num-workers", type=click.IntRange(1), help="Default: distributed.num_workers.")
@click.option("--tokens-per-pair", type=click.IntRange(1), help="Default: data.max_length, the most a pair can have.")
@click.option("--network", type=click.FloatRange(0, min_open=True), help="GB/s between machines, for each device.")
@click.option(
    "--scaling",
    type=click.Choice(["weak", "strong"]),
    help="The configured layout at 1 to 1,024 workers: weak keeps the pairs per device, strong the contrast batch.",
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, in bytes and seconds.")
def plan(
    config, overrides, device, device_memory, tflops, num_workers, tokens_per_pair, network, scaling, as_json
) -> None:
    """Memory per device, throughput and the cheapest layout that fits; starts nothing, loads no weights."""
    loaded = load_config(config, overrides)
    from flipkd_dist import plan_report, scaling_report

    options = (device, device_memory, tflops, num_workers, tokens_per_pair, network)
    if scaling:
        made, table = scaling_report.make_scaling(loaded, scaling, *options), scaling_report.table
    else:
        made, table = plan_report.make_plan(loaded, *options), plan_report.table
    click.echo(json.dumps(made.as_dict(), indent=2) if as_json else table(made))


@cli.command()
@configured
@click.option("--rows", help="Rows of the table, by comma; lora_sup is always one of them. Default: all.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Runs of each row, from seed on.")
@click.option(
    "--sweep", multiple=True, metavar="KEY=V1,V2", help="flip with each value of a setting (may be repeated)."
)
@click.option("--teachers", help="Further teachers, by comma: each alone and with flip.")
@click.option("--set", "settings", multiple=True, metavar="ROW.KEY=VALUE", help="A setting of one row alone.")
@click.option(
    "--checkpoints", type=click.IntRange(1), help="The best on validation, averaged. Default: train.test_checkpoints."
)
@click.option("--jobs", type=click.IntRange(1), help="The most runs at once. Default: what the cluster has room for.")
def compare(config, overrides, rows, seeds, sweep, teachers, settings, checkpoints, jobs) -> None:
    """Train the method, its ablations and its baselines on the same pairs: a table with statistics, and a report."""
    if checkpoints is not None:
        overrides = (*overrides, f"train.test_checkpoints={checkpoints}")
    loaded = load_config(config, overrides)
    from flipkd_dist.compare import compare

    if not compare(loaded, _names(rows), seeds, sweep, _names(teachers) or (), settings, jobs):
        sys.exit(1)


def _names(joined: str | None) -> list[str] | None:
    return None if joined is None else [name.strip() for name in joined.split(",") if name.strip()]


for verb in (predict, rank, embed, retrieve, cluster, export, pairs, convert, store):
    cli.add_command(verb)

GO_ON = {"run", "score", "teach", "train", "evaluate", "register", "compare"}  # commands that keep what they have done


def main() -> None:
    """Entry point; exit codes 0, 1, 2 and 75 as documented in docs/reference.md."""
    set_up_logging()
    # A local Ray says on every start that it has a token: stderr is for one line of ours.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    debug = bool(os.environ.get("FLIPKD_DEBUG"))
    try:
        with handling(stop_at_once):
            cli(prog_name="flipkd", standalone_mode=False)
    except click.ClickException as error:
        command = error.ctx.command_path if getattr(error, "ctx", None) else "flipkd"
        sys.exit(_fail(f"{error.format_message().rstrip('.')}: see {command} --help", 2))
    except (click.Abort, KeyboardInterrupt):
        if ray_head.LOST:
            _leave(ray_head.LOST[0])
        sys.exit(_fail("interrupted", 1))
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except HeadLost as error:
        _leave(str(error))
    except (StoppedOnRequest, StoppedAtOnce) as error:
        sys.exit(_fail(str(error), 75))
    except WorkerFailed as error:
        if debug:
            raise
        sys.exit(_fail(str(error), 1))
    except Exception as error:
        if debug:
            raise
        goes_on = next((word for word in sys.argv[1:] if not word.startswith("-")), None) in GO_ON
        if goes_on and (refused := storage_reason(error)) is not None:
            sys.exit(_fail(storage_line(error, refused), 75))
        reason = without_credentials(" ".join(str(error).split()))
        sys.exit(_fail(f"{type(error).__name__}: {reason} (FLIPKD_DEBUG=1 shows where)", 1))


def _leave(message: str) -> None:
    """End without leaving Ray in order, which needs the head."""
    _fail(message, 75)
    sys.stdout.flush()
    os._exit(75)


def _fail(message: str, code: int) -> int:
    print("flipkd:", *(line.strip() for line in message.splitlines()), file=sys.stderr)
    return code
