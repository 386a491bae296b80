"""The verb `retrieve`: the documents of a BEIR folder found for its queries, ranked again, and measured.

Shapes: Q queries, N documents, k the length of a list.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.durable import room_in, whole_file
from flipkd_dist.embedder import adapter_facts
from flipkd_dist.errors import UserError
from flipkd_dist.folder_search import FolderSearch, Lists
from flipkd_dist.judged_folder import JudgedFolder, judged_folder
from flipkd_dist.predict import Matcher, progress, saved_encoder
from flipkd_dist.predict_file import LIMITS, check_tokens, local_adapter
from flipkd_dist.rank_file import TAG, rank_lists
from flipkd_dist.rank_records import CandidateList
from flipkd_dist.retrieval_metrics import names, query_metrics
from flipkd_dist.run_folder import write_json
from flipkd_dist.text_encoder import EncoderChoice, located
from flipkd_dist.token_batches import BatchLimits
from flipkd_dist.vector_search import best_of, keys, scores_and_rows

logger = logging.getLogger("flipkd_dist")
BLOCK = 1000  # queries that are evaluated together
RUN, RERANKED, METRICS = "run.trec", "reranked.trec", "metrics.json"


@dataclass(frozen=True)
class Rerank:
    """Which adapter puts the first of each list into a new order by p(match), and how many of them."""

    model: str
    top_k: int = 20
    base_model: str | None = None
    tracking_uri: str | None = None
    limits: BatchLimits = LIMITS


def retrieve(
    choice: EncoderChoice,
    data: str,
    output: Path,
    top_k: int = 100,
    ann: str | None = None,
    rerank: Rerank | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Write `run.trec`, with `rerank` `reranked.trec`, and `metrics.json`, which is returned.

    Args:
        data: a BEIR folder, `FOLDER` or `FOLDER:SPLIT`.
        output: a new or empty folder.
        ann: None searches exactly; "hnsw" or "ivf" by FAISS.
        kept: a folder where the documents' vectors stay, and are found again; None: they go with the process.
    Raises:
        UserError: a mistake in the data, no such model, an output folder that is not empty, `kept` of another search.
    """
    if rerank and rerank.top_k > top_k:
        raise UserError(f"--rerank-top-k {rerank.top_k}: lists have {top_k} documents: raise --top-k or lower it")
    if ann:
        _require_faiss()
    _check_folder(output)
    if kept:
        _check_writable("--vectors", kept)
    with ExitStack() as held:
        found = held.enter_context(located(choice))
        adapter = _reranking_adapter(held, rerank)
        judged = held.enter_context(judged_folder(data))
        _warn(judged)
        again = saved_encoder(adapter, rerank.base_model) if rerank else None
        for tokens in (found.tokens, again):  # before any weights are loaded
            for _ in check_tokens(chain(judged.query_texts(), judged.document_texts()), tokens) if tokens else ():
                pass
        with room_in(output):
            output.mkdir(parents=True, exist_ok=True)
        search = FolderSearch(found, choice, judged, data, output, kept)
        lists, how = search.lists(top_k, ann)
        metrics = {"data": data, "encoder": search.facts, **_counts(judged), "top_k": top_k, **how}
        metrics["retrieval"] = _write_and_measure(output / RUN, judged, lists, top_k)
        write_json(output / METRICS, metrics)
        if rerank:
            began = time.monotonic()
            lists = _ranked_again(Matcher(adapter, rerank.base_model), judged, lists, rerank)
            metrics["rerank"] = {"model": rerank.model, **adapter_facts(adapter), "top_k": rerank.top_k}
            metrics["reranked"] = _write_and_measure(output / RERANKED, judged, lists, top_k)
            metrics["seconds"]["rerank"] = time.monotonic() - began
            write_json(output / METRICS, metrics)
    return metrics


def _require_faiss() -> None:
    from importlib.util import find_spec

    if find_spec("faiss") is None:
        raise UserError(
            "--ann: FAISS is not installed: pip install 'flipkd_dist[ann]', or search exactly without --ann"
        )


def _check_folder(output: Path) -> None:
    _check_writable("--output", output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is no empty folder: name another or remove it")


def _check_writable(option: str, folder: Path) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: {existing} is no folder or not writable: name another folder")


def _reranking_adapter(held: ExitStack, rerank: Rerank | None) -> Path | None:
    if rerank is None:
        return None
    adapter = held.enter_context(local_adapter(rerank.model, rerank.tracking_uri))
    if AdapterCard.read(adapter).mode != "pair":
        raise UserError(f"--rerank {rerank.model}: reads single texts: name an adapter of student.mode: pair")
    return adapter


def _warn(judged: JudgedFolder) -> None:
    if judged.num_without_text:
        logger.warning("%d documents have no text and are left out", judged.num_without_text)
    if judged.num_missing:
        logger.warning("%d relevant documents are not in the corpus and count as not found", judged.num_missing)


def _counts(judged: JudgedFolder) -> dict[str, int]:
    return {
        "queries": len(judged.queries),
        "queries_left_out": judged.num_left_out,
        "documents": judged.num_documents,
        "documents_left_out": judged.num_without_text,
        "relevant_documents_missing": judged.num_missing,
    }


def _write_and_measure(path: Path, judged: JudgedFolder, lists: Lists, top_k: int) -> dict[str, float]:
    """Write a TREC run; the mean of each metric over the queries."""
    sums = dict.fromkeys(names(top_k), 0.0)
    with whole_file(path) as file:
        for first in range(0, len(judged.queries), BLOCK):
            run, grades = {}, {}
            for number in range(first, min(first + BLOCK, len(judged.queries))):
                query = judged.queries[number]
                own = [(row, score) for score, row in zip(*(part[number] for part in lists), strict=True) if row >= 0]
                run[query] = {judged.document_id(row): float(score) for row, score in own}
                grades[query] = judged.judgements(query)
                for rank, ((_, score), name) in enumerate(zip(own, run[query], strict=True), 1):
                    file.write(f"{query} Q0 {name} {rank} {score} {TAG}\n".encode())
            for values in query_metrics(grades, run, top_k):
                sums = {name: total + values[name] for name, total in sums.items()}
    return {name: total / len(judged.queries) for name, total in sums.items()}


def _ranked_again(matcher: Matcher, judged: JudgedFolder, lists: Lists, rerank: Rerank) -> Lists:
    """The first `rerank.top_k` of each list by p(match); the others after them as they stood, scored -1, -2, ..."""
    scores, rows = (part.copy() for part in lists)
    num_pairs = int((rows[:, : rerank.top_k] >= 0).sum())
    scores[:, rerank.top_k :] = -np.arange(1, scores.shape[1] - rerank.top_k + 1)
    with progress(num_pairs, "rerank") as done:
        candidates = _candidates(judged, rows[:, : rerank.top_k])
        for number, (_, best) in enumerate(rank_lists(matcher, candidates, None, rerank.limits, done)):
            own = rows[number, [entry.index for entry in best]]
            found = keys(np.array([entry.p_match for entry in best], np.float32), own)
            scores[number, : len(best)], rows[number, : len(best)] = scores_and_rows(best_of(found[None], len(best)))
    return scores, rows


def _candidates(judged: JudgedFolder, rows: np.ndarray) -> Iterator[CandidateList]:
    for number, (query, own) in enumerate(zip(judged.query_texts(), rows, strict=True)):
        texts = [judged.document_text(row) for row in own if row >= 0]
        yield CandidateList({}, query.text, judged.queries[number], texts, [""] * len(texts), "")


def table(metrics: dict[str, Any]) -> str:
    """The metrics for people."""
    columns = list(metrics["retrieval"])
    found = {"retrieval": metrics["retrieval"], "reranked": metrics.get("reranked")}
    lines = [" ".join([f"{'':9}", *(f"{name:>10}" for name in columns)])]
    lines += [
        " ".join([f"{name:9}", *(f"{values[column]:10.4f}" for column in columns)])
        for name, values in found.items()
        if values
    ]
    counts = {key: value for key, value in metrics.items() if isinstance(value, int)}
    return "\n".join([*lines, json.dumps(counts | {"search": metrics["search"]})])
