"""A few matching test pairs, each first text against each second text: the teacher's cosine and the student's.

Shapes: s pairs.
"""

import math
from pathlib import Path

import numpy as np
import torch

from flipkd_dist.comparison import Matrix
from flipkd_dist.comparison_reading import MATRIX
from flipkd_dist.evaluate import pair_texts
from flipkd_dist.pairs import PairTable
from flipkd_dist.run_folder import write_json
from flipkd_dist.teacher_stage import open_signals
from flipkd_dist.workbench import Workbench

SIZE, SIDE_BY_SIDE = 32, 4  # pairs at most; those of one group, while there are other groups


def matrix_pairs(pairs: PairTable) -> np.ndarray:
    """Numbers of matching pairs of as many groups as fit, those of one group side by side: int64 [s]."""
    matching = np.flatnonzero(pairs.label == 1)
    groups: dict[int, list[int]] = {}
    for pair in matching.tolist():
        code = int(pairs.group_a[pair])
        groups.setdefault(-1 - pair if code == -1 else code, []).append(pair)  # without a code: a group of its own
    ranked = sorted(
        (place // SIDE_BY_SIDE, number, pair)
        for number, group in enumerate(groups.values())
        for place, pair in enumerate(group)
    )
    chosen = sorted((number, pair) for _, number, pair in ranked[:SIZE])
    return np.array([pair for _, pair in chosen], np.int64)


def similarity_matrix(bench: Workbench) -> Matrix | None:
    """Of the student as it is now; None without matching test pairs. Every rank calls it and computes the same.

    The student reads a second text behind its own pair's first text, as in training.
    """
    if "test" not in bench.inputs.splits:
        return None
    signals = open_signals(bench.inputs, "test")
    chosen = matrix_pairs(signals.pairs)
    if not len(chosen):
        return None
    texts = pair_texts(signals.pairs)
    first, second = _readouts(bench, [texts[pair] for pair in chosen])
    alpha, known = signals.of_batch(chosen, slice(0, len(chosen)))
    return Matrix(chosen.tolist(), np.where(known, alpha, np.nan).astype(np.float64), first @ second.T)


@torch.no_grad()
def _readouts(bench: Workbench, texts: list[tuple[str, str]]) -> list[np.ndarray]:
    """Unit read-outs of first and of second texts, float64 [s, r] each."""
    student, batch_size = bench.engine.student, bench.inputs.config.train.per_device_eval_batch_size
    was_training = student.training
    student.eval()
    found = []
    for at in range(0, len(texts), batch_size):
        batch = bench.make_batch(texts[at : at + batch_size]).tensors(bench.world.device)
        _, *sides = bench.engine.forward(**batch)
        found.append([torch.nn.functional.normalize(side.double(), dim=1).cpu().numpy() for side in sides])
    student.train(was_training)
    return [np.concatenate(side) for side in zip(*found, strict=True)]


def write_matrix(folder: Path, matrix: Matrix) -> None:
    def rows(values: np.ndarray) -> list[list[float | None]]:
        return [[None if math.isnan(value) else value for value in row] for row in values.tolist()]

    write_json(
        folder / MATRIX, {"pairs": matrix.pairs, "teacher": rows(matrix.teacher), "student": rows(matrix.student)}
    )
