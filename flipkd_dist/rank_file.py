"""The verb `rank`: queries with their candidates in, each list sorted by p(match) out, window by window."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path

from flipkd_dist.durable import whole_file
from flipkd_dist.errors import UserError
from flipkd_dist.key_table import KeyTable
from flipkd_dist.pair_fields import Record, shown
from flipkd_dist.pair_files import check_output, known_extension, write_records
from flipkd_dist.predict import Matcher, Ranked, progress, ranked, saved_encoder
from flipkd_dist.predict_file import LIMITS, check_not_input, check_tokens, local_adapter
from flipkd_dist.rank_records import CandidateList, read_lists, run_reader
from flipkd_dist.record_writer import stream_columns
from flipkd_dist.token_batches import BatchLimits, windows

TREC = ".trec"
TAG = "flipkd"
# What is added to a record, by type.
EXAMPLE = {"ranking": [{"index": 0, "id": "", "p_match": 0.0, "similarity": 0.0}]}
Reader = Callable[[], Iterator[CandidateList]]
Rankings = Iterator[tuple[CandidateList, list[Ranked]]]


def list_source(
    source: Path, queries: Path | None, corpus: Path | None, text_a: str | None, candidates: str | None
) -> AbstractContextManager[Reader]:
    """What reads `source`: a file of lists, or with `queries` and `corpus` a TREC run.

    Raises:
        UserError: options that do not go together.
    """
    if queries is None and corpus is None:
        return nullcontext(partial(read_lists, source, text_a or "text_a", candidates or "candidates"))
    if queries is None or corpus is None:
        given, missing = ("--queries", "--corpus") if corpus is None else ("--corpus", "--queries")
        raise UserError(f"{given}: a run needs the texts of queries and documents: give {missing} too")
    for option, value in (("--text-a", text_a), ("--candidates", candidates)):
        if value is not None:
            raise UserError(f"{option}: a run has no columns: leave it out, or leave out --queries and --corpus")
    return run_reader(source, queries, corpus)


def rank_file(
    model: str,
    source: Path,
    output: Path,
    queries: Path | None = None,
    corpus: Path | None = None,
    text_a: str | None = None,
    candidates: str | None = None,
    top_k: int | None = None,
    limits: BatchLimits = LIMITS,
    base_model: str | None = None,
    tracking_uri: str | None = None,
) -> tuple[int, int]:
    """Write every query with its `ranking`; the numbers of queries and of pairs.

    The input is read twice, first to check it whole. What is held of it is one window, or one longer list.

    Raises:
        UserError: an unreadable input, an output that cannot be written, or no such model.
    """
    is_trec = output.suffix == TREC
    check_output(output, (TREC,))
    check_not_input(output, source, queries, corpus)
    format = "trec" if is_trec else known_extension(output)
    if format in ("csv", "tsv"):
        raise UserError(f"--output {output}: {format.upper()} holds no rankings: use .jsonl, .parquet or {TREC}")
    lists = list_source(source, queries, corpus, text_a, candidates)
    with lists as read, ExitStack() as held:
        if next(read(), None) is None:  # before a registered adapter is fetched
            raise UserError(f"--input {source}: no queries in it: name a file that has some")
        adapter = held.enter_context(local_adapter(model, tracking_uri))
        num_pairs = 0
        encoder = saved_encoder(adapter, base_model)

        def checked() -> Iterator[Record]:
            nonlocal num_pairs
            num_pairs = 0
            whole = check_tokens(read(), encoder)
            for one in check_names(whole, output) if is_trec else whole:
                num_pairs += len(one.candidates)
                yield {**one.record, **EXAMPLE}

        num_queries, columns = stream_columns(checked, format)
        matcher = Matcher(adapter, base_model)
        with progress(num_pairs, "rank") as done:
            rankings = rank_lists(matcher, read(), top_k, limits, done)
            if is_trec:
                write_trec(output, rankings)
            else:
                write_records({output: map(_with_ranking, rankings)}, columns)
    return num_queries, num_pairs


def rank_lists(
    matcher: Matcher,
    lists: Iterator[CandidateList],
    top_k: int | None,
    limits: BatchLimits,
    done: Callable[[int, int], None],
) -> Rankings:
    """Each list with its ranking, in the order of the lists; short lists of a window are computed together."""
    for window in windows(lists, lambda one: one.num_characters, lambda one: len(one.candidates)):
        scores = matcher.scores([(one.query, text) for one in window for text in one.candidates], limits, done)
        start = 0
        for one in window:
            own = scores[start : start + len(one.candidates)]
            start += len(own)
            yield one, ranked(own[:, 0], own[:, 1], top_k)


def _with_ranking(ranking: tuple[CandidateList, list[Ranked]]) -> Record:
    one, best = ranking
    entries = [
        {"index": entry.index}
        | ({"id": one.ids[entry.index]} if one.ids[entry.index] else {})
        | {"p_match": entry.p_match, "similarity": entry.similarity}
        for entry in best
    ]
    return {**one.record, "ranking": entries}


def check_names(lists: Iterator[CandidateList], output: Path) -> Iterator[CandidateList]:
    """The same lists, each known to fit into a TREC run: names without spaces, and every line for one pair alone.

    Raises:
        UserError: one that does not fit, with its place.
    """
    with KeyTable() as seen:
        for one in lists:
            where = f"--output {output}: {one.where}"
            if not one.query_id:
                raise UserError(f"{where}: no id, and a TREC run names queries: add the column id or write JSONL")
            names: dict[str, int] = {}
            for index in range(len(one.candidates)):
                name = _name(one, index)
                if name in names:
                    raise UserError(
                        f"{where}: candidates {names[name]} and {index} would both be called {shown(name)} in a TREC "
                        "run: make ids unique, give one to every candidate, or write JSONL"
                    )
                names[name] = index
            for name in (one.query_id, *names):
                if len(name.split()) > 1:
                    raise UserError(
                        f"{where}: {shown(name)} has a space in it, which a TREC run cannot hold: write JSONL"
                    )
            before = seen.setdefault(one.query_id, one.where)
            if before != one.where:
                raise UserError(
                    f"{where}: id {shown(one.query_id)} stands at {before} too, and a TREC run would mix the two: make "
                    "ids unique or write JSONL"
                )
            yield one


def _name(one: CandidateList, index: int) -> str:
    """A candidate's name in a TREC run: its id, or its place in the list."""
    return one.ids[index] or str(index)


def write_trec(output: Path, rankings: Rankings) -> None:
    """A line `QUERY Q0 DOCUMENT RANK SCORE TAG` for each candidate; one without an id goes by its index."""
    with whole_file(output) as file:
        for one, best in rankings:
            for rank, entry in enumerate(best, 1):
                name = _name(one, entry.index)
                file.write(f"{one.query_id} Q0 {name} {rank} {entry.p_match!r} {TAG}\n".encode())
