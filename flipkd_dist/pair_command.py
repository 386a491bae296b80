"""The verb `pairs`: a file of grouped texts in, files of labelled pairs out."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from flipkd_dist.errors import UserError
from flipkd_dist.grouped_texts import distinct_texts, normalise, split_texts
from flipkd_dist.pair_fields import Record, text_and_group, text_of
from flipkd_dist.pair_files import check_output, read_fields, write_records
from flipkd_dist.pair_maker import Encode, make_pairs


def pairs_command(
    input: str | Path,
    text_column: str,
    group_column: str,
    output: str | Path,
    seed: int,
    split: dict[str, float] | None = None,
    by: Literal["text", "group"] = "text",
    encode: Encode | None = None,
    exclude: Iterable[str | Path] = (),
    **counts: int,
) -> dict[str, Any]:
    """Make labelled pairs out of a file of grouped texts; nothing is written unless all of it can be.

    Args:
        output: its extension is the format. With `split`, `pairs.jsonl` becomes `pairs.train.jsonl` and so on.
        split: the share of each split, as `split_texts` takes it together with `by`.
        encode: see `make_pairs`.
        exclude: files of grouped texts or of pairs whose texts must not appear, the training file of a test set.
        counts: `positives_per_text` and the other numbers of `make_pairs`.
    Returns:
        How many texts were read, kept and left out, how many groups are left, and the pairs by kind of each file.
    Raises:
        UserError: a file cannot be read or written, or its texts do not give both matches and non-matches.
    """
    output, exclude = Path(output), list(exclude)
    outputs = _output_paths(output, split)
    for path in outputs.values():
        check_output(path)
        if any(path.resolve() == Path(source).resolve() for source in [input, *exclude]):
            raise UserError(f"{path}: this file is an input: name another output")

    records = read_fields(input, text_and_group, text_column, group_column)
    texts, groups = [text for text, _ in records], [group for _, group in records]
    excluded = {normalise(text) for path in exclude for pair in read_fields(path, _texts, text_column) for text in pair}
    allowed = [row for row, text in enumerate(texts) if normalise(text) not in excluded]
    distinct = distinct_texts([texts[row] for row in allowed], [groups[row] for row in allowed])
    kept_texts = [texts[allowed[row]] for row in distinct.rows]
    kept_groups = [groups[allowed[row]] for row in distinct.rows]
    _require_both_labels(input, group_column, Counter(kept_groups))

    everything = {"": list(range(len(kept_texts)))}
    parts = split_texts(kept_texts, kept_groups, split, by, seed) if split else everything
    made = {}
    for name, path in outputs.items():
        part_texts, part_groups = [kept_texts[row] for row in parts[name]], [kept_groups[row] for row in parts[name]]
        made[path] = make_pairs(part_texts, part_groups, seed, encode, **counts)
        if {pair["label"] for pair in made[path]} != {0, 1}:
            raise UserError(f"{path}: too few texts or pairs per text for both labels: give this file more of them")
    write_records(made)
    return {
        "texts_read": len(texts),
        "texts_kept": len(kept_texts),
        "excluded": len(texts) - len(allowed),
        "repeated": distinct.repeated,
        "ambiguous": distinct.ambiguous,
        "groups": len(set(kept_groups)),
        "pairs": {str(path): dict(Counter(pair["kind"] for pair in pairs)) for path, pairs in made.items()},
    }


def _output_paths(output: Path, split: dict[str, float] | None) -> dict[str, Path]:
    for name in split or ():
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"split {name!r}: it becomes part of a file name: use letters, digits, - and _")
    if not split:
        return {"": output}
    return {name: output.with_name(f"{output.stem}.{name}{output.suffix}") for name in split}


def _require_both_labels(input: str | Path, group_column: str, sizes: Counter) -> None:
    """Non-matches need two groups, matches a group of two texts; `sizes` counts the distinct texts of each group."""
    if len(sizes) < 2:
        found = f"fewer than two groups in column {group_column} hold distinct texts"
    elif max(sizes.values()) < 2:
        found = f"no group in column {group_column} holds two distinct texts"
    else:
        return
    raise UserError(f"{input}: {found}: add texts or name another column as --group")


def _texts(record: Record, text_column: str) -> list[str]:
    """The texts of a record of pairs or of grouped texts."""
    columns = ["text_a", "text_b"] if {"text_a", "text_b"} <= record.keys() else [text_column]
    return [text_of(record, column, "--text") for column in columns]
