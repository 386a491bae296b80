"""The nearest documents of a BEIR folder for its queries, from the texts to the lists.

Shapes: Q queries, N documents, k the length of a list.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from flipkd_dist.durable import room_in
from flipkd_dist.judged_folder import JudgedFolder
from flipkd_dist.kept_vectors import kept_vectors
from flipkd_dist.text_encoder import BatchedEncoder, EncoderChoice, Located, encoded_windows
from flipkd_dist.text_records import NamedText
from flipkd_dist.vector_search import ApproximateIndex, exact_search, recall_against, vector_file

COMPARED = 200  # queries, spread evenly, on which an approximate search is compared with the exact one
Lists = tuple[np.ndarray, np.ndarray]  # scores float32 and rows int64 [Q, k]; row -1: no more


class FolderSearch:
    """The documents' vectors, the queries' and the nearest of them; an encoder is gone when it is done."""

    def __init__(
        self, found: Located, choice: EncoderChoice, judged: JudgedFolder, data: str, output: Path, kept: Path | None
    ):
        self.found, self.judged, self.data, self.output, self.kept = found, judged, data, output, kept
        self.prompts = [choice.prompt_of(side) for side in ("query", "document")]
        self.facts: dict[str, Any] = {"name": choice.name}
        self.seconds: dict[str, float] = {}
        self.began = 0.0

    def _load(self, side: str) -> BatchedEncoder:
        encoder = self.found.load(side)
        self.began = time.monotonic()
        return encoder

    def _lap(self, name: str) -> None:
        self.seconds[name], self.began = time.monotonic() - self.began, time.monotonic()

    def lists(self, top_k: int, ann: str | None) -> tuple[Lists, dict[str, Any]]:
        """The lists, and how they came about."""
        encoder = self._load("query")
        total = len(self.judged.queries)
        queries = np.concatenate(list(self._parts(encoder, self.judged.query_texts(), total, "queries")))
        self._lap("queries")
        if self.prompts[0] != self.prompts[1]:
            self.facts["query_prompt"] = encoder.facts.get("prompt")
            del encoder  # two need not be held
            encoder = self._load("document")
        self.facts |= encoder.facts
        with room_in(self.output), ExitStack() as held:
            vectors, search = self._documents(encoder, held)
            self._lap("documents")
            if ann is None:
                lists, how = exact_search(queries, vectors, top_k), {"kind": "exact"}
                self._lap("search")
            else:
                index = ApproximateIndex(ann, vectors)
                self._lap("index")
                lists = index.search(queries, top_k)
                self._lap("search")
                some = np.unique(np.linspace(0, len(queries) - 1, COMPARED).astype(int))
                recall = recall_against(lists[1][some], exact_search(queries[some], vectors, top_k)[1])
                how = {"kind": ann, "recall_against_exact": recall, "compared_queries": len(some)}
        return lists, {"search": how | search, "seconds": self.seconds}

    def _parts(
        self, encoder: BatchedEncoder, texts: Iterator[NamedText], total: int, description: str
    ) -> Iterator[np.ndarray]:
        return (vectors for _, vectors in encoded_windows(encoder, texts, total, description, self.data))

    def _documents(self, encoder: BatchedEncoder, held: ExitStack) -> tuple[np.ndarray, dict[str, int]]:
        shape = self.judged.num_documents, encoder.dimension

        def parts(first: int) -> Iterator[np.ndarray]:
            texts = islice(self.judged.document_texts(), first, None)
            return self._parts(encoder, texts, shape[0] - first, "documents")

        if self.kept:
            facts = {**encoder.facts, "documents": _digest(self.judged.document_texts())}
            vectors, before = kept_vectors(self.kept, facts, shape, parts)
            return vectors, {"documents_from_before": before}
        vectors, start = held.enter_context(vector_file(self.output, *shape)), 0
        for part in parts(0):
            vectors[start : start + len(part)] = part
            start += len(part)
        return vectors, {}


def _digest(texts: Iterator[NamedText]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for one in texts:
        digest.update(json.dumps([one.name, one.text]).encode())
    return digest.hexdigest()
