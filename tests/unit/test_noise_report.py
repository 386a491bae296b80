"""The report's numbers and text: it says when a teacher and the filter do not fit, whatever the pairs are."""

import re

import numpy as np
import pytest
from noise_cases import LABELLED, NEGATIVES, NOTHING, OFF_DIAGONAL, POSITIVES, degenerate_cases, hostile_pairs, narrow
from sklearn.metrics import roc_auc_score

from flipkd_dist import noise_numbers
from flipkd_dist.contradictions import ContradictoryPair
from flipkd_dist.filter_shares import filter_shares, suggested_threshold
from flipkd_dist.noise_report import noise_report, report


def test_report_of_a_teacher_that_fits():
    lines = report(*LABELLED, OFF_DIAGONAL, 0.5)
    text = "\n".join(lines)
    assert "8 labelled pairs" in text and "teacher ROC-AUC 0.719" in text  # 11.5 of 16 comparisons won
    assert "agree at 0.5: 62.5%; at the best threshold, 0.800: 75.0%" in text
    assert "keeps 75.0% of positives, 50.0% of labelled negatives, 80.0% of off-diagonal pairs" in text
    assert "median: matches 0.650, non-matches 0.500, off-diagonal pairs 0.300" in text
    assert not any(line.startswith("warning:") for line in lines)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_histogram(dtype):
    similarity = np.array([-0.3, 0.05, 0.7, 0.7, 0.95, 1.0000001], np.float32).astype(dtype)
    lines = report(similarity, np.array([0, 0, 1, 0, 1, 1]), OFF_DIAGONAL, None)
    rows = {line.split("  ")[0]: line[12:].split() for line in lines[2:12]}
    assert rows["below 0.1"] == ["0", "2", "#" * 14]
    assert rows["0.7 to 0.8"] == ["1", "#" * 7, "1", "#" * 7]
    assert rows["0.9 to 1.0"] == ["2", "#" * 14, "0"]
    assert sum(row != ["0", "0"] for row in rows.values()) == 3 and len(rows) == 10
    assert max(map(len, lines)) <= 80 and "filter is off" in lines[-1]


def test_a_narrow_encoder_is_warned_about_with_a_threshold_that_works():
    case = narrow(0.55, 0.95)
    (warning,) = [line for line in report(*case, 0.5) if line.startswith("warning:")]
    assert "labelled negatives and off-diagonal pairs" in warning and "positives" not in warning
    theta = suggested_threshold(*case)
    assert f"set loss.threshold to {theta:.2f}" in warning
    assert not any(line.startswith("warning:") for line in report(*case, theta))


def test_a_very_narrow_encoder_needs_no_filter():
    case = narrow(0.97, 0.999)
    assert "set loss.threshold to null" in report(*case, 0.5)[-1]
    assert not any(line.startswith("warning:") for line in report(*case, None))
    assert [row.threshold for row in noise_report(*case, 0.5).rows if row.is_suggested] == [None]


def test_report_of_one_class_and_of_nothing():
    lines = report(np.array([0.7, 0.9]), np.array([1, 1]), np.array([]), 0.5)
    assert "teacher ROC-AUC: not defined, the pairs are of one class" in lines
    assert "100.0% of positives, (no labelled negatives), (no off-diagonal pairs)" in lines[-1]
    nothing = noise_report(NOTHING, NOTHING, NOTHING, 0.5)
    assert nothing.rows == [] and nothing.suggested is None and nothing.agreement is None


@pytest.mark.parametrize("name, similarity, label, off_diagonal, theta", degenerate_cases())
def test_no_case_prints_nan_or_fails(name, similarity, label, off_diagonal, theta):
    found = noise_report(similarity, label, off_diagonal, theta)
    assert not re.search(r"\b(nan|inf|None)\b", "\n".join(found.lines()))
    assert sum(found.num_pairs) == found.counts.sum()
    assert sum(row.is_configured for row in found.rows) == bool(found.rows)
    assert found.edges[0] <= 0 and found.edges[-1] >= 1
    if found.best_threshold is not None:
        assert found.agreement_best >= found.agreement


def test_what_is_not_finite_is_left_out_with_a_warning():
    similarity, label = LABELLED
    with_nan = np.append(similarity, np.float32([np.nan, np.inf])), np.append(label, [1, 0])
    found = noise_report(*with_nan, np.append(OFF_DIAGONAL, np.nan), 0.5)
    assert found.lines()[-1].startswith("warning: 3 similarities are not finite and are left out")
    assert found.rows == noise_report(*LABELLED, OFF_DIAGONAL, 0.5).rows


def test_rows_say_what_each_theta_keeps_and_how_labels_agree_on_it():
    similarity, label = LABELLED
    rows = noise_report(*LABELLED, OFF_DIAGONAL, 0.37).rows
    assert [row.threshold for row in rows] == [None, 0.1, 0.2, 0.3, 0.37, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    for row in rows:
        assert row.shares == filter_shares(*LABELLED, OFF_DIAGONAL, row.threshold)
        theta = -9 if row.threshold is None else np.float32(row.threshold)
        keep = np.where(label == 1, similarity >= theta, similarity < np.float32(1 - theta))
        assert row.agreement == np.mean(((similarity >= 0.5) == label)[keep])
    assert {row.threshold: row.agreement for row in rows}[0.4] == 5 / 7  # 0.4 and 0.5 disagree, 0.6 is dropped
    assert [row.threshold for row in rows if row.is_configured] == [0.37]
    (suggested,) = [row.threshold for row in rows if row.is_suggested]
    assert suggested == suggested_threshold(*LABELLED, OFF_DIAGONAL) == 0.5


def test_marks_in_the_text():
    lines = noise_report(*LABELLED, OFF_DIAGONAL, 0.37).lines()
    assert [line.split()[:2] for line in lines if re.match(r"0\.\d+ +[*+]", line)] == [["0.37", "*"], ["0.5", "+"]]
    table = [line for line in lines if re.match(r"theta |off |0\.\d+ +[*+\d]+.*%$", line)]
    assert len(table) == 12 and {len(line) for line in table} == {57}  # aligned


def test_roc():
    found = noise_report(*LABELLED, OFF_DIAGONAL, 0.5)
    assert not found.roc.is_sampled
    assert found.roc.auc == pytest.approx(roc_auc_score(LABELLED[1], LABELLED[0]))
    assert (found.roc.false_positives[0], found.roc.true_positives[0]) == (0, 0)
    assert (found.roc.false_positives[-1], found.roc.true_positives[-1]) == (1, 1)
    assert found.half_point == (0.5, 0.75) and found.best_point == (0, 0.5)
    best = max(np.mean((LABELLED[0] >= cut) == LABELLED[1]) for cut in [*POSITIVES, *NEGATIVES])
    assert found.agreement_best == best


def test_a_large_roc_is_sampled_reproducibly_and_says_so(monkeypatch):
    generator = np.random.default_rng(1)
    label = (generator.random(50_000) < 0.02).astype(int)  # few positives: all of them are taken
    case = generator.normal(0.3 + 0.2 * label, 0.15), label, generator.normal(0.1, 0.1, 1000), 0.5
    whole = noise_report(*case)
    assert whole.agreement_best >= max(np.mean((case[0] >= cut) == label) for cut in np.linspace(0, 1.2, 61))
    monkeypatch.setattr(noise_numbers, "MOST_ROC_PAIRS", 5000)
    found, again = noise_report(*case), noise_report(*case)
    assert found.roc.is_sampled and not whole.roc.is_sampled
    assert found.roc.auc == again.roc.auc != whole.roc.auc
    assert found.roc.auc == pytest.approx(whole.roc.auc, abs=0.01)
    assert found.agreement_best == pytest.approx(whole.agreement_best, abs=0.002)
    assert len(found.roc.false_positives) <= noise_numbers.ROC_POINTS
    assert np.array_equal(found.counts, whole.counts) and found.agreement == whole.agreement
    assert any("sampled pairs of a label" in line for line in found.lines())


def test_facts_and_pairs_in_the_text_fit_a_terminal_and_leave_it_alone():
    facts = {"teacher": "some-encoder", "fingerprint": "0123abcd", "pooling": "mean", "note": "esc \x1b[2J" + "y" * 200}
    lines = noise_report(*LABELLED, OFF_DIAGONAL, None, hostile_pairs(), facts).lines()
    assert lines[0].startswith("teacher some-encoder, fingerprint 0123abcd, pooling mean")
    at = next(row for row, line in enumerate(lines) if line.startswith("where label and teacher differ most"))
    assert "3 of 6" in lines[at] and lines[at + 1] == "  label 0, similarity 0.900  file:0"
    assert "我的卡还没有到" in lines[at + 5] and lines[at + 8].endswith("x…")
    assert max(map(len, lines)) <= 80 and all(line.isprintable() for line in lines)


def test_wide_characters_count_twice_in_a_terminal():
    pair = ContradictoryPair(0.1, 1, "卡" * 200, "card " * 100)
    wide, narrow_line = noise_report(*LABELLED, OFF_DIAGONAL, None, [pair]).lines()[-3:-1]
    assert wide == "    " + "卡" * 37 + "…" and len(narrow_line) == 80
