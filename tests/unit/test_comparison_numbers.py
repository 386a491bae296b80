"""What the report draws and finds, against values by hand and scikit-learn's."""

from dataclasses import replace

import numpy as np
import pytest
from report_cases import comparison, matrix, pair_table, results, row_scores
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from flipkd_dist.comparison import REFERENCE, Comparison, Row, RowScores, RunScores
from flipkd_dist.comparison_finds import agreement, sweep_values, sweeps, won_and_lost
from flipkd_dist.comparison_numbers import (
    BINS,
    GRID,
    curves,
    distributions,
    is_cosine_alone,
    not_finite,
    reliability,
    scorings,
    table_of,
)
from flipkd_dist.config import RunConfig
from flipkd_dist.evaluate import hard_negatives


@pytest.fixture(scope="module")
def found():
    return comparison()


def made(label, **rows):
    """A comparison of rows with these p(match), one run each."""
    table = pair_table(len(label), 0, label=np.array(label))
    runs = {
        name: [RunScores(1, [1], {"p_match": {"test": np.array([scores], float)}})] for name, scores in rows.items()
    }
    return Comparison("made", {"test": table}, [RowScores(Row(name, name, {}), run) for name, run in runs.items()])


def test_scorings_are_all_checkpoints_of_all_seeds(found):
    assert scorings(found.row("flip"), "p_match").shape == (10, 600)
    assert scorings(found.row("teacher"), "p_match") is None and scorings(None, "p_match") is None


def test_curves_by_hand():
    by_hand = made([1, 0, 1, 0], flip=[0.9, 0.8, 0.8, 0.1])  # a tie between the labels
    (roc,), (precision,) = curves(by_hand, ["flip"], "p_match")
    assert roc.area == pytest.approx(0.875) and precision.area == pytest.approx(0.5 + 0.5 * 2 / 3)
    # From half of the matches at no false alarm, straight to all at half of them.
    assert np.allclose(roc.mean[1:51], 0.5 + GRID[1:51]) and np.allclose(roc.mean[50:], 1) and roc.mean[0] == 0
    assert np.allclose(precision.mean[:51], 1) and np.allclose(precision.mean[51:], 2 / 3)


def test_curves_enclose_the_area_of_scikit_learn(found):
    roc, precision = curves(found, ["teacher", REFERENCE, "flip"], "p_match")
    table, easy = found.pairs["test"], ~hard_negatives(found.pairs["test"])
    for number, name in enumerate(("teacher", REFERENCE, "flip")):
        scores = scorings(found.row(name), "similarity" if name == "teacher" else "p_match")[:, easy]
        areas = [roc_auc_score(table.label[easy], one) for one in scores]
        assert roc[number].row == name and roc[number].area == pytest.approx(np.mean(areas))
        assert auc(GRID, roc[number].mean) == pytest.approx(np.mean(areas), abs=0.005)
        average = np.mean([average_precision_score(table.label[easy], one) for one in scores])
        assert precision[number].area == pytest.approx(average)
        assert precision[number].mean.mean() == pytest.approx(average, abs=0.01)
        assert (roc[number].low <= roc[number].mean + 1e-12).all() and (roc[number].mean <= roc[number].high).all()


def test_hard_non_matches_move_neither_curve_nor_calibration(found):
    hard = hard_negatives(found.pairs["test"])
    row = found.row("flip")
    runs = [replace(run, scores={"p_match": {"test": np.where(hard, 0.99, s)}}) for run, s in scored(row)]
    other = replace(found, rows=[replace(row, runs=runs)])
    for one, same in zip(curves(found, ["flip"], "p_match"), curves(other, ["flip"], "p_match"), strict=True):
        assert np.array_equal(one[0].mean, same[0].mean)
    assert reliability(found, "flip").error == reliability(other, "flip").error


def scored(row):
    return [(run, run.scores["p_match"]["test"]) for run in row.runs]


def test_an_encoder_that_is_no_teacher_has_no_curve_of_p_match(found):
    assert [curve.row for curve in curves(found, ["overlap", "flip"], "p_match")[0]] == ["flip"]


def test_one_class_has_no_curves():
    assert curves(made([1, 1], flip=[0.2, 0.4]), ["flip"], "p_match") == ([], [])


def test_calibration_is_that_of_scikit_learn(found):
    easy = ~hard_negatives(found.pairs["test"])
    label = found.pairs["test"].label[easy]
    scores = scorings(found.row("flip"), "p_match")[:, easy]
    share, mean = calibration_curve(np.tile(label, len(scores)), scores.ravel(), n_bins=BINS)
    ours = reliability(found, "flip")
    filled = np.isfinite(ours.mean)
    assert np.allclose(ours.mean[filled], mean) and np.allclose(ours.matches[filled], share)
    assert ours.pairs.sum() == pytest.approx(easy.sum())


def test_calibration_error_by_hand():
    # Two bins: |0.15 - 0.5| of two pairs, |1 - 0.5| of two.
    ours = reliability(made([0, 1, 1, 0], flip=[0.1, 0.19, 1.0, 1.0]), "flip")
    assert ours.error == pytest.approx((2 * abs(0.145 - 0.5) + 2 * 0.5) / 4)
    assert ours.pairs.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 2]


def test_distributions_are_shares_of_each_kind(found):
    before, after = distributions(found, ["untrained", "flip"], "similarity")
    assert np.array_equal(before.edges, after.edges) and before.edges[[0, -1]].tolist() == [0, 1]
    assert [pytest.approx(1)] * 6 == [shares.sum() for one in (before, after) for shares in one.shares]
    middle = (after.edges[1:] + after.edges[:-1]) / 2
    matches, others, hard = (float(shares @ middle) for shares in after.shares)
    assert matches > hard > others  # as the scores were made
    assert distributions(made([1, 0], flip=[-0.5, 2]), ["flip"], "p_match")[0].edges[[0, -1]].tolist() == [-0.5, 2]


def test_scores_that_are_not_finite_are_left_out_and_named(found):
    row = found.row("flip")
    broken = [replace(row.runs[0], scores={"p_match": {"test": np.full((2, 600), np.nan)}}), *row.runs[1:]]
    other = replace(found, rows=[replace(row, runs=broken)])
    assert scorings(other.row("flip"), "p_match").shape == (8, 600)
    assert not_finite(other) == {"flip": 2} and not_finite(found) == {}
    assert np.isfinite(curves(other, ["flip"], "p_match")[0][0].mean).all()


def test_pairs_won_and_lost_by_hand():
    label = [1, 0, 1, 0, 1]
    judged = made(label, **{REFERENCE: [0.2, 0.6, 0.9, 0.3, 0.5], "flip": [0.9, 0.5, 0.4, 0.7, 0.5]})
    reading, (won, lost) = won_and_lost(judged, REFERENCE)
    assert reading == "p_match"
    assert [pair.number for pair in won] == [0, 1]  # a non-match is won where its score falls
    assert [pair.number for pair in lost] == [2, 3]  # an unmoved pair is neither
    assert (won[0].before, won[0].after, won[0].gain) == pytest.approx((0.2, 0.9, 0.7))
    assert (won[0].id, won[0].label, won[0].text_a) == ("test:0", 1, "question 0 about cards")
    assert [len(pairs) for pairs in won_and_lost(judged, REFERENCE, count=1)[1]] == [1, 1]


def test_rows_without_p_match_are_judged_by_similarity(found):
    rows = [row_scores(Row(name, name, {}), found.pairs, {"similarity": 1.0}, [1], 1) for name in (REFERENCE, "flip")]
    assert won_and_lost(replace(found, rows=rows), REFERENCE)[0] == "similarity"
    assert won_and_lost(replace(found, rows=rows[:1]), REFERENCE)[1] == [[], []]


def test_a_sweep_is_flip_with_one_number_changed(found):
    (sweep,) = sweeps(found, RunConfig(name="bank"))
    assert sweep.key == "loss.margin"  # no_mcl, too, changes one number, and is an ablation
    assert [(point.value, point.row) for point in sweep.points] == [
        (0.0, "flip-loss.margin-0"),
        (0.02, "flip-loss.margin-0.02"),
        (0.06, "flip"),
        (0.1, "flip-loss.margin-0.1"),
    ]
    assert len(sweeps(found)[0].points) == 3  # without a configuration flip's own value is not known
    values = sweep_values(sweep, results(found), "p_match", "f1")
    assert values[:, 0].tolist() == [0, 0.02, 0.06, 0.1] and (values[:, 2] > 0).all()
    assert not sweeps(comparison(sweep=(), names=("flip", "no_mcl")))


@pytest.mark.parametrize("value", [None, "auto", True])
def test_what_is_no_number_is_no_point_of_a_sweep(found, value):
    row = replace(found.row("flip"), row=Row("flip-loss.margin-x", "flip", {"loss.margin": value}))
    assert not sweeps(replace(found, rows=[found.row("flip"), row]), RunConfig(name="bank"))


def test_agreement_of_matrices():
    assert agreement(matrix(1.0)) > agreement(matrix(0.1)) > 0
    exact = matrix(1.0)
    exact = replace(exact, student=3 * exact.teacher - np.diag(np.full(32, 9.0)))  # the diagonal does not count
    assert agreement(exact) == pytest.approx(1)
    assert agreement(replace(exact, student=np.full((32, 32), 0.5))) is None
    assert agreement(replace(exact, teacher=np.ones((1, 1)), student=np.ones((1, 1)))) is None


def test_texts_read_alone_are_noticed(found):
    row = found.row("flip")
    alone = [
        replace(run, scores={"p_match": {"test": (1 + s) / 2}, "similarity": {"test": s}}) for run, s in scored(row)
    ]
    assert is_cosine_alone(replace(found, rows=[replace(row, runs=alone)])) and not is_cosine_alone(found)


def test_a_row_without_runs_has_nothing():
    empty = Comparison("empty", {"test": pair_table(20, 0)}, [RowScores(Row("flip", "flip", {}), [])])
    assert reliability(empty, "flip") is None and distributions(empty, ["flip"], "p_match") == []
    assert curves(empty, ["flip", "teacher"], "p_match") == ([], []) and not_finite(empty) == {}
    assert table_of(Comparison("none", {}, [])) is None
