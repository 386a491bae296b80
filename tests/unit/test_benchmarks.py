"""The comparison of training speed: its arithmetic, its texts, and that every contender is a program."""

import json
import py_compile
from pathlib import Path

import make_texts
import measure
import pytest
import summary
from variants import BASELINE, VARIANTS, chosen

FOLDER = Path(make_texts.__file__).parent


def result(seconds, peak=1000.0):
    return {
        "seconds": seconds,
        "sequences": 32,
        "peak_mib": peak,
        "libraries_mib": 500.0,
        "real_tokens": [100, 110],
        "computed_tokens": [128, 130],
    }


def test_speed_is_that_of_the_median_step_and_ratios_are_of_one_round():
    rounds = [
        {"ours": result([1.0, 2.0, 9.0]), BASELINE: result([4.0, 4.0])},
        {"ours": result([4.0]), BASELINE: result([16.0], peak=3000.0)},
        {"ours": result([1.0])},  # the baseline failed here
    ]
    table = summary.rows(rounds, BASELINE)
    assert table["ours"]["sequences_per_second"] == {"median": 16.0, "lowest": 8.0, "highest": 32.0}
    assert table["ours"]["over_baseline"] == {"median": 3.0, "lowest": 2.0, "highest": 4.0}
    assert table[BASELINE]["ours_over"] == table["ours"]["over_baseline"]
    assert (
        table[BASELINE]["over_baseline"]
        == table["ours"]["ours_over"]
        == dict.fromkeys(("median", "lowest", "highest"), 1.0)
    )
    assert table[BASELINE]["peak_mib"]["median"] == 2000.0 and table["ours"]["runs"] == 3
    line = "| ours | 16.0 (8.0 to 32.0) | 3.00 (2.00 to 4.00) | 1.00 (1.00 to 1.00) | 1000 (500) | 105, 129 |"
    assert line in summary.markdown(table, BASELINE).splitlines()


def test_a_run_without_the_baseline_has_no_ratio():
    table = summary.rows([{"ours": result([1.0])}], BASELINE)
    assert table["ours"]["over_baseline"] is None
    assert "| ours | 32.0 (32.0 to 32.0) |  | 1.00" in summary.markdown(table, BASELINE)


@pytest.mark.parametrize("name", make_texts.SIZES)
def test_pairs_are_of_their_size_and_the_same_every_time(name):
    size, count = make_texts.SIZES[name], 64
    pairs = make_texts.make_pairs(name, count, seed=3)
    assert pairs == make_texts.make_pairs(name, count, seed=3) != make_texts.make_pairs(name, count, seed=4)
    assert len(pairs) == count and [pair["label"] for pair in pairs[: size.group]] == [1] + [0] * (size.group - 1)
    for key, (least, most) in (("text_a", size.words_a), ("text_b", size.words_b)):
        lengths = {len(pair[key].split()) for pair in pairs}
        assert least <= min(lengths) < max(lengths) <= most
    first_texts = {pair["text_a"] for pair in pairs}
    assert len(first_texts) == (count // size.group if size.shared else count)


@pytest.mark.parametrize("name", make_texts.SIZES)
def test_a_group_costs_what_its_pairs_cost(name):
    size = make_texts.SIZES[name]
    pairs = make_texts.make_pairs(name, 64, seed=0)
    groups = make_texts.groups_of(pairs, size.group)
    second_texts = [text for group in groups for text in (*group["pos"], *group["neg"])]
    assert second_texts == [pair["text_b"] for pair in pairs]
    queries = [group["query"] for group in groups for _ in range(size.group)]
    assert [len(query.split()) for query in queries] == [len(pair["text_a"].split()) for pair in pairs]


def test_a_matching_text_holds_the_words_of_the_other():
    for pair in make_texts.make_pairs("faq", 64, seed=0):
        words = pair["text_b"].split()
        share = sum(word in pair["text_a"].split() for word in words) / len(words)
        assert share > 0.5 if pair["label"] else share < 0.5


def spec(**changed):
    values = {"prepared": "", "scratch": "", "batch_size": 4, "warmup": 2, "steps": 2, "group_size": 2}
    values |= {"max_length": 8, "lora_r": 1, "lora_dropout": 0.0, "learning_rate": 1.0, "seed": 0}
    return measure.Spec(**values | changed)


def test_the_clock_leaves_the_warm_up_out(monkeypatch, capsys):
    times, processor = iter([10.0, 11.0, 13.0, 16.0]), iter([1.0, 2.0, 6.0, 11.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(measure.time, "process_time", lambda: next(processor))
    clock = measure.StepClock(spec())
    for tokens in (1, 2, 3, 4):
        clock.computed[-1] += tokens
        clock.end_step()
    clock.print_result()
    line = capsys.readouterr().out.removeprefix(measure.RESULT)
    found = json.loads(line)
    assert found["seconds"] == [2.0, 3.0] and found["processor_seconds"] == [4.0, 5.0]
    assert found["computed_tokens"] == [3, 4] and found["sequences"] == 4
    assert found["peak_mib"] >= found["libraries_mib"] > 0


def test_a_run_that_ends_early_gives_no_result():
    clock = measure.StepClock(spec())
    clock.end_step()
    with pytest.raises(AssertionError, match="1 steps in place of 4"):
        clock.print_result()


def test_variants_are_chosen_by_name_or_by_what_they_begin_with():
    assert chosen(()) == ["ours", BASELINE, "flag_embedding", "sentence_transformers"]
    assert chosen(("ours", "ours:")) == [name for name in VARIANTS if name.startswith("ours")]
    with pytest.raises(ValueError, match=r"our: no such variant: take some of ours,"):
        chosen(("our",))


def test_every_contender_compiles(tmp_path):
    assert {variant.script for variant in VARIANTS.values()} <= {path.name for path in FOLDER.glob("*.py")}
    for path in FOLDER.glob("*.py"):
        py_compile.compile(str(path), cfile=str(tmp_path / "compiled"), doraise=True)
