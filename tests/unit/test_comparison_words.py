"""The sentences say what the statistics say, "no difference" among it."""

import pytest
from report_cases import comparison, results

from flipkd_dist.comparison import REFERENCE, MetricResult, Results, RowResult
from flipkd_dist.comparison_words import difference_text, duration, headline, mean_text, p_text, size

FOUND = MetricResult(0.8746, 0.0031, [0.87, 0.88], 0.0081, -0.002, 0.0182, 0.2, 0.1, 0.3, "no difference")


def made(**verdicts):
    metrics = {
        name: MetricResult(0.8, 0.01, [0.8], 0.012, 0.001, 0.023, 0.1, 0.1, 0.1, said)
        for name, said in verdicts.items()
    }
    base = {name: MetricResult(0.79, 0.01, [0.79]) for name in verdicts}
    rows = [
        RowResult(REFERENCE, "LoRA", "p_match", "test", base),
        RowResult("flip", "flip", "p_match", "test", metrics),
    ]
    return Results(rows, REFERENCE, 0.01, 2000)


def test_no_difference_is_said_as_such():
    (said,) = headline(made(accuracy="no difference", roc_auc="no difference"))
    assert said == (
        "By p(match), there is no difference between flip and LoRA in accuracy (+1.2 points, 95 % interval +0.1 to "
        "+2.3) and ROC-AUC (+1.2 points, 95 % interval +0.1 to +2.3)."
    )


def test_a_mixed_result_names_every_verdict():
    (said,) = headline(made(accuracy="no difference", f1="worse", roc_auc="better"))
    better, worse, same = said.split("; ")
    assert better.startswith("By p(match), flip is better than LoRA in ROC-AUC (")
    assert worse.startswith("flip is worse than LoRA in F1 (") and same.startswith("there is no difference in accuracy")


def test_what_was_not_tested_is_no_verdict():
    (said,) = headline(made(f1=None))
    assert said.startswith("By p(match), not tested: F1") and "better" not in said
    assert headline(made()) == ["By p(match), there is nothing to compare: the labels are of one class."]


def test_each_reading_has_its_sentence_and_hard_pairs_have_none():
    said = headline(results(comparison(seeds=[1], checkpoints=1, sweep=())))
    assert len(said) == 2 and "p(match)" in said[0] and "read-outs" in said[1]


def test_without_flip_or_the_reference_there_is_no_statement():
    found = results(comparison(seeds=[1], checkpoints=1, sweep=(), names=(REFERENCE, "no_mcl")))
    assert headline(found) == ["No statement about flip: there is no result of flip."]
    assert headline(Results([], REFERENCE, 0.01, 0))[0].endswith("no result of flip and lora_sup.")


@pytest.mark.parametrize(
    "value, text", [(None, "-"), (float("nan"), "-"), (0.0002, "< 0.001"), (0.0123, "0.012"), (1, "1.000")]
)
def test_p_values(value, text):
    assert p_text(value) == text


def test_figures():
    assert mean_text(FOUND) == "0.8746 ± 0.0031" and difference_text(FOUND) == "+0.0081 (-0.0020 to +0.0182)"
    assert mean_text(MetricResult(0.5, None, [0.5])) == "0.5000" and difference_text(MetricResult(0.5, None, [])) == ""
    assert mean_text(None) == mean_text(MetricResult(float("nan"), None, [])) == "-"


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.6, "1 min 00 s"), (754, "12 min 34 s"), (7260, "2 h 01 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "count, text", [(12, "12 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (1 << 42, "4096.0 GiB")]
)
def test_sizes(count, text):
    assert size(count) == text
