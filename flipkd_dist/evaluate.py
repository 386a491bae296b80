"""Scores of labelled pairs, sharded over ranks, and the metrics table: student, read-out, teacher, token overlap."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)
from torch import Tensor
from tqdm import tqdm

from flipkd_dist.batches import BatchMaker
from flipkd_dist.neighbours import words_of
from flipkd_dist.order import rows_of_rank
from flipkd_dist.pairs import PairTable
from flipkd_dist.student import Student
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")
ROWS = ("student", "student_readout", "teacher", "token_overlap")


def batch_scores(logits: Tensor, readout_a: Tensor, readout_b: Tensor) -> np.ndarray:
    """p(match) and the cosine of the read-outs of the m pairs of a forward, float64 [m, 2]."""
    p_match = torch.softmax(logits.double(), dim=1)[:, 0]
    cosine = torch.cosine_similarity(readout_a.double(), readout_b.double(), dim=1)
    return torch.stack([p_match, cosine], dim=1).cpu().numpy()


@torch.no_grad()
def student_scores(
    student: Student,
    world: World,
    make_batch: BatchMaker,
    texts: Sequence[tuple[str, str]],
    batch_size: int,
    description: str = "evaluate",
    forward: Callable[..., tuple] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """p(match) and the cosine of the two read-outs of every pair, on every rank: two float64 [N].

    Every rank runs the same number of forwards, with dummy pairs where its share has ended: under ZeRO-3 a forward is
    a collective.

    Args:
        forward: the engine's, where one holds the student; else the student's own.
    """
    forward = forward or student
    shares = [rows_of_rank(len(texts), rank, world.size) for rank in range(world.size)]
    own = texts[shares[world.rank]]
    most = max(share.stop - share.start for share in shares)
    was_training = student.training
    student.eval()
    found, num_truncated = [np.zeros((0, 2))], 0
    for at in tqdm(
        range(0, most, batch_size), description, unit="batch", disable=None if world.is_main else True, leave=False
    ):
        batch = own[at : at + batch_size]
        packed = make_batch(batch)
        found.append(batch_scores(*forward(**packed.tensors(world.device)))[: len(batch)])
        num_truncated += packed.num_truncated
    student.train(was_training)
    parts, cuts = zip(*world.gather_object((np.concatenate(found), num_truncated)), strict=True)
    if sum(cuts):
        logger.warning("%s: %d of %d pairs were cut to the maximum length", description, sum(cuts), len(texts))
    scores = np.concatenate(parts)
    return scores[:, 0], scores[:, 1]


def pair_texts(pairs: PairTable) -> list[tuple[str, str]]:
    return list(pairs.labelled_texts())


def teacher_scores(pairs: PairTable, vectors: np.ndarray) -> np.ndarray:
    """The teacher's cosine of every pair [N]; `vectors` are unit vectors, a row for each of `pairs.texts`."""
    return np.einsum("nd,nd->n", vectors[pairs.text_a], vectors[pairs.text_b]).astype(np.float64)


def token_overlap(pairs: PairTable) -> np.ndarray:
    """Jaccard overlap of the two texts' words (Chinese: characters), lower-cased [N]."""
    words = [words_of(text) for text in pairs.texts]
    return np.array(
        [
            len(words[a] & words[b]) / max(len(words[a] | words[b]), 1)
            for a, b in zip(pairs.text_a, pairs.text_b, strict=True)
        ]
    )


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the best F1; 0.5 where the labels are all alike."""
    if len(set(labels.tolist())) < 2:
        return 0.5
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[int(np.argmax(f1[:-1]))])


def binary_metrics(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float | int | None]:
    """Metrics of one row; the ranking metrics are None where the labels are all alike."""
    predicted = (scores >= threshold).astype(int)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="binary", zero_division=0)
    both = len(set(labels.tolist())) == 2
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1": float(f1),
        "precision": float(precision),
        "recall": float(recall),
        "roc_auc": float(roc_auc_score(labels, scores)) if both else None,
        "average_precision": float(average_precision_score(labels, scores)) if both else None,
        "threshold": float(threshold),
        "num_pairs": len(labels),
    }


def hard_negatives(pairs: PairTable) -> np.ndarray:
    """Which pairs are marked as hard, and do not match: bool [N]."""
    return (np.array(pairs.kind) == "hard") & (pairs.label == 0)


def parts_by_kind(pairs: PairTable, split: str) -> dict[str, np.ndarray]:
    """Which pairs each table of a split is about: bool [N] by name; `SPLIT_hard` where there are hard negatives.

    Both tables share the matching pairs.
    """
    hard = hard_negatives(pairs)
    parts = {split: ~hard}
    if hard.any():
        parts[f"{split}_hard"] = hard | (pairs.label == 1)
    return parts


def metrics_by_kind(
    rows: dict[str, np.ndarray], pairs: PairTable, thresholds: dict[str, float], split: str
) -> dict[str, dict[str, dict]]:
    """`{split: {row: metrics}}`; hard negatives get a table of their own, `SPLIT_hard`."""
    return {
        name: {row: binary_metrics(scores[mask], pairs.label[mask], thresholds[row]) for row, scores in rows.items()}
        for name, mask in parts_by_kind(pairs, split).items()
    }


def thresholds_from(rows: dict[str, np.ndarray] | None, pairs: PairTable | None) -> dict[str, float]:
    """Each row's threshold: the best F1 on validation pairs (hard negatives left out), 0.5 without validation."""
    if rows is None:
        return dict.fromkeys(ROWS, 0.5)
    mask = ~hard_negatives(pairs)
    return {row: best_threshold(scores[mask], pairs.label[mask]) for row, scores in rows.items()}


def tables_by_split(metrics: dict | None) -> dict[str, dict[str, dict]]:
    """The tables of metrics.json; what else stands there is left out."""
    return {
        name: value for name, value in (metrics or {}).items() if isinstance(value, dict) and name != "test_checkpoints"
    }


def format_table(metrics: dict[str, dict[str, dict]]) -> str:
    """The metrics as fixed-width text."""
    names = {
        "student": "student p(match)",
        "student_readout": "student read-out",
        "teacher": "teacher",
        "token_overlap": "token overlap",
    }
    lines = [
        f"{'split':<16}{'row':<20}{'accuracy':>9}{'f1':>8}{'roc_auc':>9}{'avg_prec':>9}{'threshold':>11}{'pairs':>8}"
    ]
    for split, table in metrics.items():
        for row, value in table.items():
            figures = [value["accuracy"], value["f1"], value["roc_auc"], value["average_precision"]]
            text = [f"{figure:.4f}" if figure is not None else "-" for figure in figures]
            lines.append(
                f"{split:<16}{names.get(row, row):<20}{text[0]:>9}{text[1]:>8}{text[2]:>9}{text[3]:>9}"
                f"{value['threshold']:>11.4f}{value['num_pairs']:>8}"
            )
    return "\n".join(lines)
