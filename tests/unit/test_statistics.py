"""The protocol by hand, the tests against scipy and worked examples, and what they call different when nothing is."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from statistics_cases import comparison_of, labelled, noisy_runs, pair_splits, two_rows

from flipkd_dist.comparison import METRICS, READINGS, REFERENCE, Comparison, Results, RowResult, RowScores, RunScores
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import best_threshold, binary_metrics, hard_negatives
from flipkd_dist.statistics import compare_rows, run_thresholds, table

SIZES = {"validation": 60, "test": 80}


def row(results: Results, name: str, reading: str = "p_match", split: str = "test") -> RowResult | None:
    wanted = (name, reading, split)
    return next((one for one in results.rows if (one.name, one.reading, one.split) == wanted), None)


def verdicts(results: Results, name: str = "flip") -> set[str]:
    return {value.verdict for one in results.rows if one.name == name for value in one.metrics.values()}


@pytest.fixture(scope="module")
def two() -> tuple[Comparison, Results]:
    pairs = pair_splits(SIZES, hard=0.4)
    comparison = two_rows(pairs, noisy_runs(pairs, 0.4, 3, 2, 1), noisy_runs(pairs, 0.6, 3, 2, 2))
    return comparison, compare_rows(comparison, resamples=400)


@pytest.mark.parametrize("name", [REFERENCE, "flip"])
@pytest.mark.parametrize("reading", READINGS)
def test_the_protocol_by_hand(two, name, reading):
    """Each checkpoint's own threshold from the easy validation pairs, mean over checkpoints, then over seeds."""
    comparison, results = two
    validation, test = comparison.pairs["validation"], comparison.pairs["test"]
    easy, hard = ~hard_negatives(validation), hard_negatives(test)
    parts = {"test": ~hard, "test_hard": hard | (test.label == 1)}
    for split, part in parts.items():
        found = row(results, name, reading, split)
        for metric in METRICS:
            by_seed = []
            for run in comparison.row(name).runs:
                scores = run.scores[reading]
                limits = [best_threshold(one[easy], validation.label[easy]) for one in scores["validation"]]
                each = zip(scores["test"], limits, strict=True)
                by_seed.append(
                    np.mean([binary_metrics(one[part], test.label[part], limit)[metric] for one, limit in each])
                )
            value = found.metrics[metric]
            assert value.values == pytest.approx(by_seed) and value.mean == pytest.approx(np.mean(by_seed))
            assert value.std == pytest.approx(np.std(by_seed, ddof=1))


def test_against_the_reference_by_hand(two):
    _, results = two
    for reading in READINGS:
        for split in ("test", "test_hard"):
            mine, theirs = (row(results, name, reading, split).metrics for name in ("flip", REFERENCE))
            for metric in METRICS:
                value, base = mine[metric], theirs[metric]
                assert value.difference == pytest.approx(value.mean - base.mean)
                assert value.low < value.difference < value.high
                assert value.p_seeds == pytest.approx(stats.ttest_rel(value.values, base.values).pvalue)
                assert value.p_corrected == max(value.p_pairs, value.p_seeds)  # one row is tested
                assert (base.difference, base.p_pairs, base.p_corrected, base.verdict) == (None,) * 4


def test_labels_of_the_test_set_change_no_threshold(two):
    comparison, _ = two
    test = comparison.pairs["test"]
    shuffled = dataclasses.replace(test, label=np.random.default_rng(5).permutation(test.label))
    other = dataclasses.replace(comparison, pairs={**comparison.pairs, "test": shuffled})
    runs = [run for found in comparison.rows for run in found.runs]
    before, after = (
        [run_thresholds(run, reading, one.pairs["validation"]).tolist() for run in runs for reading in READINGS]
        for one in (comparison, other)
    )
    assert before == after
    # A score is called a match or not as before: with all labels turned over, right and wrong change places.
    turned = dataclasses.replace(comparison, pairs={**comparison.pairs, "test": labelled(1 - test.label)})
    plain = dataclasses.replace(comparison, pairs={**comparison.pairs, "test": labelled(test.label)})
    mine, theirs = (row(compare_rows(one, resamples=200), "flip").metrics["accuracy"] for one in (plain, turned))
    assert mine.mean == pytest.approx(1 - theirs.mean)


def test_without_validation_the_threshold_is_a_half():
    run = RunScores(42, [2, 1], {"p_match": {"test": np.zeros((2, 4))}})
    assert run_thresholds(run, "p_match", None).tolist() == [0.5, 0.5]


def test_the_same_answers_are_no_difference(two):
    """In another order of seeds too, whose sums round otherwise."""
    runs = two[0].row("flip").runs
    results = compare_rows(two_rows(two[0].pairs, runs, runs[::-1]), resamples=400)
    for one in results.rows:
        for value in one.metrics.values():
            if one.name == "flip":
                assert (value.p_pairs, value.p_corrected, value.p_seeds) == (1, 1, None)
                assert value.verdict == "no difference" and abs(value.difference) < 1e-12
                assert (value.low, value.high) == (0, 0)
    assert table(results).count("no difference") == 12


def test_a_better_row_is_found_and_a_worse_one():
    pairs = pair_splits({"validation": 200, "test": 600})
    rows = {
        name: noisy_runs(pairs, strength, 5, 2, number)
        for number, (name, strength) in enumerate([(REFERENCE, 0.6), ("flip", 1.2), ("bad", 0.2)])
    }
    results = compare_rows(comparison_of(pairs, rows), resamples=1000)
    assert verdicts(results, "flip") == {"better"} and verdicts(results, "bad") == {"worse"}
    value = row(results, "bad").metrics["roc_auc"]
    assert value.high < 0 and value.p_corrected >= 2 * 2 / 1001  # corrected for two rows


def test_rows_of_one_distribution_are_seldom_called_different():
    """In 36 verdicts at 0.05 each; the two tests together are stricter than either."""
    called = 0
    for trial in range(6):
        pairs = pair_splits({"validation": 60, "test": 100}, seed=trial)
        rows = {name: noisy_runs(pairs, 0.5, 3, 1, 10 * trial + n) for n, name in enumerate([REFERENCE, "a", "b", "c"])}
        results = compare_rows(comparison_of(pairs, rows), alpha=0.05, resamples=200, seed=trial)
        found = [row(results, name, reading).metrics["roc_auc"] for name in "abc" for reading in READINGS]
        called += sum(value.verdict != "no difference" for value in found)
    assert called <= 4


def test_both_tests_must_agree_from_three_seeds_on():
    """One lucky pair of runs in three: the pairs are sure of it, the seeds are not."""
    pairs = pair_splits({"validation": 200, "test": 800})
    base = noisy_runs(pairs, 0.6, 3, 1, 1)
    lucky = [dataclasses.replace(one, seed=42 + n) for n, one in enumerate(noisy_runs(pairs, 0.55, 3, 1, 2))]
    lucky[0] = dataclasses.replace(noisy_runs(pairs, 3.0, 1, 1, 3)[0], seed=42)
    for count, verdict in ((3, "no difference"), (2, "better")):
        results = compare_rows(two_rows(pairs, base[:count], lucky[:count]), resamples=1000)
        value = row(results, "flip").metrics["roc_auc"]
        assert value.p_pairs < 0.01 < value.p_seeds and value.verdict == verdict


def test_runs_that_do_not_depend_on_a_seed_and_readings_that_are_not_there():
    pairs = pair_splits(SIZES)
    [once] = noisy_runs(pairs, 2.0, 1, 1, 5)
    teacher = dataclasses.replace(once, scores={"similarity": once.scores["similarity"]})
    rows = {REFERENCE: noisy_runs(pairs, 0.3, 3, 2, 1), "teacher": [teacher], "failed": []}
    results = compare_rows(comparison_of(pairs, rows), resamples=1000)
    assert row(results, "teacher") is None and row(results, "failed") is None and row(results, REFERENCE) is not None
    value = row(results, "teacher", "similarity").metrics["roc_auc"]
    assert (value.std, value.p_seeds, value.verdict) == (None, None, "better") and len(value.values) == 1


def test_seeds_are_paired_by_their_number():
    pairs = pair_splits(SIZES)
    base, other = noisy_runs(pairs, 0.4, 4, 1, 1), noisy_runs(pairs, 0.6, 3, 1, 2)
    results = compare_rows(two_rows(pairs, base[1:], other[::-1]), resamples=200)
    value, reference = (row(results, name).metrics["accuracy"] for name in ("flip", REFERENCE))
    assert value.p_seeds == pytest.approx(stats.ttest_rel(value.values[1::-1], reference.values[:2]).pvalue)


def test_scores_that_are_not_finite_are_left_out_and_it_is_said(caplog):
    pairs = pair_splits(SIZES)
    base, other = noisy_runs(pairs, 0.4, 2, 2, 1), noisy_runs(pairs, 0.6, 2, 2, 2)
    sound = compare_rows(two_rows(pairs, base, other[:1]), resamples=200)
    other[1].scores["p_match"]["test"][:, 3] = np.nan
    results = compare_rows(two_rows(pairs, base, other), resamples=200)
    assert row(results, "flip") == row(sound, "flip") and row(results, "flip", "similarity").metrics["f1"].std
    assert "flip: 1 of 2 runs have no finite p_match" in caplog.text


def test_labels_all_alike_have_no_roc_auc_and_a_lone_row_no_verdict():
    pairs = {"test": labelled(np.ones(30, int))}
    runs = noisy_runs(pairs, 0.4, 1, 1, 1)
    results = compare_rows(comparison_of(pairs, {"flip": runs}))
    assert row(results, "flip").metrics.keys() == {"accuracy", "f1"} and verdicts(results) == {None}
    assert compare_rows(Comparison("x", {}, [RowScores(two_rows({}, [], []).rows[0].row, runs)])).rows == []
    assert "no difference" not in table(results)


def test_too_few_resamples_are_refused():
    pairs = pair_splits(SIZES)
    comparison = two_rows(pairs, *(noisy_runs(pairs, 0.4, 1, 1, seed) for seed in range(2)))
    with pytest.raises(
        UserError, match=r"resamples: with 199 no p-value corrected for 1 rows can fall below 0\.01: take 200"
    ):
        compare_rows(comparison, resamples=199)
    assert compare_rows(comparison, resamples=200).resamples == 200


def test_a_long_table_takes_as_many_resamples_as_it_needs():
    pairs = pair_splits({"validation": 20, "test": 30})
    runs = noisy_runs(pairs, 0.4, 1, 1, 1)
    names = [REFERENCE, *(f"flip-{number}" for number in range(52))]
    lost = {name: runs if name in (REFERENCE, "flip-0") else [] for name in names}
    assert compare_rows(comparison_of(pairs, lost)).resamples == 10_400
    assert compare_rows(two_rows(pairs, runs, runs)).resamples == 10_000


def test_runs_of_fewer_checkpoints_are_said(two, caplog):
    comparison, _ = two
    assert not caplog.messages
    flip = comparison.row("flip")
    cut = {
        reading: {split: one[:1] for split, one in scores.items()} for reading, scores in flip.runs[0].scores.items()
    }
    runs = [dataclasses.replace(flip.runs[0], steps=flip.runs[0].steps[:1], scores=cut), *flip.runs[1:]]
    compare_rows(two_rows(comparison.pairs, comparison.row(REFERENCE).runs, runs), resamples=200)
    assert caplog.messages == [
        f"warning: runs are means over 2 checkpoints, but flip seed {runs[0].seed} of 1: fewer were kept or made"
    ]


def test_rows_are_told_apart_by_their_names_however_long():
    pairs = pair_splits(SIZES)
    runs = noisy_runs(pairs, 0.4, 1, 1, 1)
    names = ["flip-student.lora_target_modules-q_proj-1", "flip-student.lora_target_modules-q_proj-2"]
    lines = table(compare_rows(comparison_of(pairs, dict.fromkeys(names, runs)))).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == names
    assert lines[0].index("mean") + 4 == lines[1].index(lines[1].split()[2]) + 6


def test_results_are_deterministic_and_fit_into_json(two):
    comparison, results = two
    again = compare_rows(comparison, resamples=400)
    assert again == results != compare_rows(comparison, resamples=400, seed=1)
    kept = json.loads(json.dumps(results.as_dict(), allow_nan=False))
    assert kept["reference"] == REFERENCE and kept["rows"][1]["metrics"]["f1"]["verdict"] in (
        "better",
        "worse",
        "no difference",
    )


def test_the_table_for_the_terminal(two):
    lines = table(two[1]).split("\n")
    assert lines[0].split()[:2] == ["test,", "p(match)"] and lines[1].split()[:2] == ["lora_sup", "accuracy"]
    value = row(two[1], "flip").metrics["accuracy"]
    assert lines[2].split() == [
        *("flip", "accuracy", f"{value.mean:.4f}", f"{value.std:.4f}", f"{value.difference:+.4f}"),
        *(f"{value.low:+.4f}", f"{value.high:+.4f}", f"{value.p_corrected:.4f}", *value.verdict.split()),
    ]
    heads = [line.split(",")[0] for line in lines if "verdict" in line]
    assert heads == ["test"] * 6 + ["test_hard"] * 6 and max(map(len, lines)) < 120
