"""The report says when a teacher and the filter do not fit, whatever the pairs are."""

import numpy as np

from flipkd_dist.filter_shares import FilterShares, filter_shares, suggested_threshold
from flipkd_dist.noise_report import report

POSITIVES, NEGATIVES = [0.9, 0.8, 0.5, 0.4], [0.1, 0.4999, 0.5, 0.6]
LABELLED = np.array(POSITIVES + NEGATIVES, np.float32), np.array([1] * 4 + [0] * 4)
OFF_DIAGONAL = np.array([0.0, 0.2, 0.3, 0.45, 0.55], np.float32)


def test_filter_shares_are_those_of_equation_3():
    assert filter_shares(*LABELLED, OFF_DIAGONAL, 0.5) == FilterShares(0.75, 0.5, 0.8)
    assert filter_shares(*LABELLED, OFF_DIAGONAL, 0.75) == FilterShares(0.5, 0.25, 0.4)  # negatives: below 0.25
    assert filter_shares(*LABELLED, OFF_DIAGONAL, None) == FilterShares(1.0, 1.0, 1.0)


def test_filter_shares_of_absent_kinds():
    shares = filter_shares(np.array([0.7]), np.array([1]), np.array([]), 0.5)
    assert shares == FilterShares(1.0, None, None) and shares.smallest == 1.0
    assert filter_shares(np.array([]), np.array([]), np.array([]), 0.5) == FilterShares(None, None, None)


def narrow(low, high, num=400):
    """An encoder that puts every cosine between `low` and `high`, matches in the upper half."""
    similarity = np.linspace(low, high, num, dtype=np.float32)
    return similarity, (np.arange(num) >= num // 2).astype(int), similarity[: num // 2]


def test_report_of_a_teacher_that_fits():
    lines = report(*LABELLED, OFF_DIAGONAL, 0.5)
    text = "\n".join(lines)
    assert "8 labelled pairs" in text and "teacher ROC-AUC 0.719" in text  # 11.5 of 16 comparisons won
    assert "agree at 0.5: 62.5%" in text
    assert "keeps 75.0% of positives, 50.0% of labelled negatives, 80.0% of off-diagonal pairs" in text
    assert not any(line.startswith("warning:") for line in lines)


def test_histogram():
    similarity = np.array([-0.3, 0.05, 0.7, 0.7, 0.95, 1.0000001], np.float32)
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
    assert filter_shares(*case, theta).smallest >= 0.5 > filter_shares(*case, theta + 0.05).smallest
    assert not any(line.startswith("warning:") for line in report(*case, theta))


def test_a_very_narrow_encoder_needs_no_filter():
    case = narrow(0.97, 0.999)
    assert suggested_threshold(*case) is None
    assert "set loss.threshold to null" in report(*case, 0.5)[-1]
    assert not any(line.startswith("warning:") for line in report(*case, None))


def test_report_of_one_class_and_of_nothing():
    lines = report(np.array([0.7, 0.9]), np.array([1, 1]), np.array([]), 0.5)
    assert "teacher ROC-AUC: not defined, the pairs are of one class" in lines
    assert "100.0% of positives, (no labelled negatives), (no off-diagonal pairs)" in lines[-1]
    assert not any("nan" in line for line in [*lines, *report(np.array([]), np.array([]), np.array([]), 0.5)])
