"""Metrics by hand and against scikit-learn, thresholds, tables, and scores over ragged batches."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from tiny import pair_table, save_student, started_student, unit_vectors

from flipkd_dist.batches import BatchMaker
from flipkd_dist.evaluate import (
    ROWS,
    best_threshold,
    binary_metrics,
    format_table,
    metrics_by_kind,
    pair_texts,
    student_scores,
    teacher_scores,
    thresholds_from,
    token_overlap,
)
from flipkd_dist.pairs import PairTable
from flipkd_dist.world import World


def table(text_pairs, label=None, kind=None) -> PairTable:
    texts = list(dict.fromkeys(text for pair in text_pairs for text in pair))
    text_a, text_b = np.array([[texts.index(text) for text in pair] for pair in text_pairs]).T
    none = np.full(len(text_pairs), -1)
    label = np.array([0] * len(text_pairs) if label is None else label)
    kind = [""] * len(text_pairs) if kind is None else kind
    return PairTable(texts, text_a, text_b, label, [str(i) for i in range(len(text_pairs))], kind, none, none)


def test_metrics_by_hand():
    scores, labels = np.array([0.9, 0.8, 0.7, 0.4, 0.3, 0.1]), np.array([1, 0, 1, 1, 0, 0])
    found = binary_metrics(scores, labels, 0.4)  # a score at the threshold is a match
    assert found == {
        "accuracy": pytest.approx(5 / 6),
        "f1": pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1)),
        "precision": 3 / 4,
        "recall": 1.0,
        "roc_auc": pytest.approx(7 / 9),  # of 3 x 3 pairs, the mismatch at 0.8 beats two matches
        "average_precision": pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3),
        "threshold": 0.4,
        "num_pairs": 6,
    }
    assert binary_metrics(scores, labels, 0.95)["precision"] == 0  # nothing is called a match
    assert all(type(value) in (int, float) for value in found.values())


def test_metrics_against_scikit_learn():
    generator = np.random.default_rng(0)
    for threshold in (0.2, 0.5, 0.8):
        scores, labels = generator.random(200).round(2), generator.integers(2, size=200)  # with ties
        found, predicted = binary_metrics(scores, labels, threshold), scores >= threshold
        wanted = [sk.accuracy_score, sk.f1_score, sk.precision_score, sk.recall_score]
        assert [found[key] for key in ("accuracy", "f1", "precision", "recall")] == pytest.approx(
            [metric(labels, predicted) for metric in wanted]
        )
        assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, scores))
        assert found["average_precision"] == pytest.approx(sk.average_precision_score(labels, scores))


@pytest.mark.parametrize("label", [0, 1])
def test_labels_all_alike_have_no_ranking_metrics(label):
    labels, scores = np.full(4, label), np.array([0.1, 0.6, 0.7, 0.9])
    found = binary_metrics(scores, labels, 0.5)
    assert found["roc_auc"] is None and found["average_precision"] is None
    assert found["accuracy"] == (0.75 if label else 0.25) and best_threshold(scores, labels) == 0.5


def test_best_threshold_is_the_best_of_all():
    generator = np.random.default_rng(1)
    for _ in range(20):
        labels = generator.integers(2, size=30)
        scores = generator.normal(labels * 0.8, 1).round(1)
        chosen = best_threshold(scores, labels)
        every = [sk.f1_score(labels, scores >= threshold) for threshold in scores]
        assert sk.f1_score(labels, scores >= chosen) == pytest.approx(max(every))


def test_thresholds_come_from_the_easy_pairs_of_validation():
    kinds = ["", "hard", "", "random", "hard", "hard", "hard"]
    pairs = table([(f"a{i}", f"b{i}") for i in range(7)], [1, 1, 0, 0, 0, 0, 0], kinds)
    scores = np.array([0.9, 0.3, 0.2, 0.1, 0.6, 0.5, 0.4])
    found = thresholds_from({"student": scores, "teacher": scores / 2}, pairs)
    assert found == {"student": 0.3, "teacher": 0.15}
    assert best_threshold(scores, pairs.label) == 0.9  # what the hard ones would make of it
    assert thresholds_from(None, None) == dict.fromkeys(ROWS, 0.5)


def test_hard_negatives_have_a_table_of_their_own():
    kinds = ["", "hard", "", "hard", "hard", "random"]
    pairs = table([(f"a{i}", f"b{i}") for i in range(6)], [1, 1, 0, 0, 0, 0], kinds)
    scores = np.array([0.9, 0.7, 0.3, 0.95, 0.8, 0.2])
    rows, thresholds = {"student": scores, "teacher": 1 - scores}, {"student": 0.5, "teacher": 0.6}
    found = metrics_by_kind(rows, pairs, thresholds, "test")
    easy, hard = [0, 1, 2, 5], [0, 1, 3, 4]  # a match is never a hard negative, whatever its kind
    assert found.keys() == {"test", "test_hard"}
    for row in rows:
        assert found["test"][row] == binary_metrics(rows[row][easy], pairs.label[easy], thresholds[row])
        assert found["test_hard"][row] == binary_metrics(rows[row][hard], pairs.label[hard], thresholds[row])
    assert found["test"]["student"]["roc_auc"] == 1 and found["test_hard"]["student"]["roc_auc"] == 0.25
    plain = dataclasses.replace(pairs, kind=[""] * 6)
    assert metrics_by_kind(rows, plain, thresholds, "validation").keys() == {"validation"}
    assert metrics_by_kind(rows, plain, thresholds, "test")["test"]["student"]["num_pairs"] == 6


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        ("Lost my card", "my card, LOST!", 1.0),
        ("lost card", "stolen card", 1 / 3),
        ("card card card", "card", 1.0),
        ("don't", "don t", 1.0),
        ("银行卡丢了", "我的银行卡", 3 / 7),
        ("我的card丢了", "card 我", 2 / 5),
        ("卡卡", "卡", 1.0),
        ("pin 12", "pin 13", 1 / 3),
        ("?!", "...", 0.0),
        ("straße", "Straße", 1.0),
    ],
)
def test_token_overlap(a, b, overlap):
    assert token_overlap(table([(a, b), (b, a)])).tolist() == pytest.approx([overlap, overlap])


def test_teacher_scores_are_cosines_of_the_texts():
    pairs = pair_table(9)
    vectors = unit_vectors(len(pairs.texts))
    expected = [vectors[a] @ vectors[b] for a, b in zip(pairs.text_a, pairs.text_b, strict=True)]
    np.testing.assert_allclose(teacher_scores(pairs, vectors), expected, rtol=1e-6)


def test_format_table():
    one = binary_metrics(np.array([0.9, 0.2]), np.array([1, 0]), 0.25)
    none = binary_metrics(np.array([0.4]), np.array([1]), 0.5)
    lines = format_table({"test": {"student": one, "student_readout": one}, "test_hard": {"teacher": none}}).split("\n")
    assert lines[0].split() == ["split", "row", "accuracy", "f1", "roc_auc", "avg_prec", "threshold", "pairs"]
    assert lines[1].split() == ["test", "student", "p(match)", *["1.0000"] * 4, "0.2500", "2"]
    assert lines[2].split()[:3] == ["test", "student", "read-out"]
    assert lines[3].split() == ["test_hard", "teacher", "0.0000", "0.0000", "-", "-", "0.5000", "1"]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("share_prefix", [True, False])
def test_ragged_batches_give_the_scores_of_single_pairs(tmp_path, share_prefix):
    student, encoder = started_student(save_student(tmp_path), lora_dropout=0.3)
    make_batch, texts = BatchMaker(encoder, student, share_prefix), pair_texts(pair_table(7))
    student.train()
    singles = [student_scores(student, World(), make_batch, [pair], 1) for pair in texts]
    expected = np.concatenate(singles, axis=1)
    for batch_size in (2, 3, 7, 64):
        found = student_scores(student, World(), make_batch, texts, batch_size)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (len(make_batch(texts).input_ids) < 7) == share_prefix
    assert student.training and expected.dtype == np.float64 and expected.shape == (2, 7)
    assert expected.std(axis=1).min() > 1e-3
    assert [part.shape for part in student_scores(student, World(), make_batch, [], 4)] == [(0,), (0,)]


@torch.no_grad()
def test_scores_are_the_softmax_and_the_cosine(tmp_path):
    student, encoder = started_student(save_student(tmp_path))
    make_batch, texts = BatchMaker(encoder, student, True), pair_texts(pair_table(3))
    logits, a, b = student.eval()(**make_batch(texts).tensors("cpu"))
    p_match, cosine = student_scores(student, World(), make_batch, texts, 3)
    np.testing.assert_allclose(p_match, 1 / (1 + np.exp((logits[:, 1] - logits[:, 0]).numpy())), rtol=1e-5)
    expected = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    np.testing.assert_allclose(cosine, expected.numpy(), rtol=1e-5)
    assert not student.training
