"""The verb `convert`: pairs of any known format in, of any known format out, read and written as streams."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flipkd_dist.beir_folder import beir_documents, beir_pairs, folder_and_split, is_beir_folder
from flipkd_dist.beir_writer import check_beir_output, write_beir
from flipkd_dist.config import DataConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_export import EXPORTERS, NESTED, Survey, check_exportable, export_columns
from flipkd_dist.pair_fields import Record, text_and_group
from flipkd_dist.pair_files import check_output, known_extension, read_fields, write_records
from flipkd_dist.pair_formats import first_record, look, pair_records
from flipkd_dist.pair_importers import unread_fields
from flipkd_dist.pair_maker import make_pairs
from flipkd_dist.random_partners import TABLES, RandomPartners
from flipkd_dist.temporary_database import temporary_database


def convert(
    source: str,
    output: str,
    target: str,
    source_format: str = "auto",
    negatives: int = 0,
    seed: int = 42,
    min_relevance: float | None = None,
) -> dict[str, Any]:
    """Read pairs twice: first to check and count them, then to write them; nothing is written unless all of it can be.

    Args:
        source: a file, a hub split, or a BEIR folder `FOLDER` or `FOLDER:SPLIT`.
        output: a file whose extension is its form, or for `beir` a new folder.
        target: one of TARGETS.
        source_format: one of SOURCES; auto: what the first record looks like.
        negatives: random non-matches made for each match.
        seed: the only source of chance, of these and of the pairs made from `faq`.
        min_relevance: the lowest judgement of a BEIR folder that is a match; None: any above 0.
    Returns:
        The format read, the numbers of pairs, matches and non-matches, and what the target could not hold.
    Raises:
        UserError: the first mistake.
    """
    _check_output(source, output, target)
    source_format = guess(source) if source_format == "auto" else source_format
    lost = Counter()  # filled by the second reading alone
    if min_relevance is not None and source_format != "beir":
        raise UserError(f"--min-relevance: {source} is read as {source_format}, only beir has judgements: leave it out")
    with ExitStack() as stack:
        read = _reader(source, source_format, seed, min_relevance)
        if negatives:
            read = _with_partners(stack, read, source, source_format, negatives, seed)
        survey = Survey()
        for record in tqdm(read(Counter()), "read", unit=" pairs", disable=None, leave=False):
            survey.add(record)
        check_exportable(target, survey, source)
        stream = tqdm(read(lost), "write", survey.pairs, unit=" pairs", disable=None, leave=False)
        if target == "beir":
            write_beir(output, stream, lost)
        else:
            made = _some(EXPORTERS[target](stream, survey, lost), f"{source} as {target}")
            write_records({Path(output): made}, export_columns(target, survey))
    unread = unread_fields(first_record(source, source_format), source_format)
    columns = survey.left_out(target)
    left_out = [f"fields not read: {', '.join(unread)}"] if unread else []
    left_out += [f"columns that {target} cannot hold here: {', '.join(columns)}"] if columns else []
    left_out += [f"{count} {what}" for what, count in lost.items() if count]
    summary = {"read_as": source_format, "pairs": survey.pairs, "matches": survey.matches}
    return summary | {"non_matches": survey.pairs - survey.matches, "left_out": left_out}


def guess(source: str) -> str:
    """The format that a folder's files or a file's first record look like.

    Raises:
        UserError: it is like none of them.
    """
    if is_beir_folder(folder_and_split(source)[0]):
        return "beir"
    first = first_record(source)
    if {"text_a", "text_b"} <= first.keys():
        return "pairs"
    found = look(first) or ("faq" if {"text", "group"} <= first.keys() else None)
    if found is None:
        columns = ", ".join(map(str, first)) or "none"
        raise UserError(f"{source}: columns of no known format ({columns}): name it with --from")
    return found


def _check_output(source: str, output: str, target: str) -> None:
    if target == "beir":
        check_beir_output(output)
        return
    check_output(Path(output))
    if target in NESTED and known_extension(output) in ("csv", "tsv"):
        raise UserError(f"{output}: {target} holds lists in a record: name a .jsonl or .parquet file")
    if Path(output).resolve() == Path(source).resolve():
        raise UserError(f"--output {output}: this is the input: name another file")


def _reader(
    source: str, source_format: str, seed: int, min_relevance: float | None
) -> Callable[[Counter], Iterator[Record]]:
    """A function that begins to read anew each time; its argument counts what gets lost on the way."""
    if source_format == "beir":
        return lambda lost: _some((record for _, record, _ in beir_pairs(source, min_relevance)), source)
    if source_format == "faq":
        remedies = ("use flipkd pairs --text", "use flipkd pairs --group")
        rows = read_fields(source, lambda record: text_and_group(record, "text", "group", remedies))
        pairs = make_pairs([text for text, _ in rows], [group for _, group in rows], seed) if rows else []
        return lambda lost: iter(_some(pairs, source))
    data = DataConfig(format="auto" if source_format == "pairs" else source_format)
    return lambda lost: _some((record for _, record, _ in pair_records(source, data, "--from")), source)


def _some(records: Iterable[Record], source: str) -> Iterator[Record]:
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise UserError(f"{source}: no pairs in it: name another file")


def _with_partners(
    stack: ExitStack, read: Callable, source: str, source_format: str, count: int, seed: int
) -> Callable[[Counter], Iterator[Record]]:
    database = stack.enter_context(temporary_database(*TABLES))
    documents = beir_documents(source) if source_format == "beir" else ()
    partners = RandomPartners(database, read(Counter()), documents)
    return lambda lost: partners.after_matches(read(lost), count, seed, lost)
