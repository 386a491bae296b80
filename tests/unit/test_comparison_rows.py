"""Rows of a comparison: what each changes, sweeps, further teachers, and mistakes that name the row."""

import re

import pytest

from flipkd_dist.comparison_rows import chosen_rows, planned_runs, settings_of, standard_rows
from flipkd_dist.config import RunConfig, with_overrides
from flipkd_dist.errors import UserError

CONFIG = RunConfig(name="bank")


def by_name(*arguments, **options):
    return {row.name: row for row in chosen_rows(CONFIG, *arguments, **options)}


def mistake(*arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        chosen_rows(CONFIG, *arguments, **options)
    return str(error.value)


def test_every_row_changes_just_what_its_name_says():
    found = {row.name: settings_of(CONFIG, row) for row in chosen_rows(CONFIG)}
    assert list(found) == list(standard_rows(CONFIG))
    before = CONFIG.model_dump()
    changed = {
        name: {
            f"{section}.{key}"
            for section, value in config.model_dump().items()
            if isinstance(value, dict)
            for key in value
            if value[key] != before[section][key]
        }
        for name, config in found.items()
    }
    sup = {"loss.dist_weight", "loss.mcl_weight"}
    baseline = {"loss.contrastive", "loss.margin", "loss.temperature"}
    assert changed == {
        "overlap": set(),
        "teacher": set(),
        "untrained": set(),
        "full_sup": sup | {"student.tuning", "train.learning_rate"},
        "lora_sup": sup,
        "arccse": baseline | {"loss.dist_weight", "loss.threshold"},
        "kdmcse": baseline | {"loss.dist_weight"},
        "infonce": {"loss.contrastive", "loss.temperature"},
        "flip": set(),
        "no_mcl": {"loss.mcl_weight"},
        "no_dist": {"loss.dist_weight"},
        "no_filter": {"loss.threshold"},
        "classic": sup,
    }
    assert found["full_sup"].train.learning_rate == pytest.approx(3e-6)
    assert found["no_filter"].loss.threshold is None
    assert all(row.formula and row.title for row in chosen_rows(CONFIG) if row.kind == "student")


def test_the_reference_is_always_there_and_the_order_is_that_of_the_table():
    assert list(by_name(["no_mcl", "flip"])) == ["lora_sup", "flip", "no_mcl"]


def test_a_row_with_a_wrong_name_is_answered_with_the_nearest():
    said = mistake(["flipp"])
    assert said.startswith("--rows flipp: no such row: the nearest is flip; all are overlap, ")


def test_a_sweep_gives_a_row_for_each_value_but_the_own():
    found = by_name(["lora_sup"], sweeps=["loss.margin=0,0.02,0.06,1e-1", "loss.threshold=null,0.4"])
    assert list(found) == [
        "lora_sup",
        "flip",
        "flip-loss.margin-0",
        "flip-loss.margin-0.02",
        "flip-loss.margin-0.1",
        "flip-loss.threshold-None",
        "flip-loss.threshold-0.4",
    ]
    assert found["flip-loss.margin-0.1"].overrides == {"loss.margin": 0.1}
    assert settings_of(CONFIG, found["flip-loss.threshold-None"]).loss.threshold is None


def test_a_swept_value_may_be_a_list_and_no_folder_gets_an_odd_name():
    found = by_name(["lora_sup"], sweeps=["student.answers=[oui, non],[ja, nein]"])
    assert [row.overrides["student.answers"] for row in found.values() if row.overrides and row.name != "lora_sup"] == [
        ["oui", "non"],
        ["ja", "nein"],
    ]
    found = by_name(["lora_sup"], sweeps=['student.prompt="{text_a}/{text_b}","{text_a}:{text_b}"'])
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in found)
    assert len(found) == 4  # though both values become the same letters


@pytest.mark.parametrize(
    "sweep, said",
    [
        ("loss.margn=1,2", "row flip-loss.margn-1: unknown key loss.margn: the nearest known key is loss.margin"),
        ("loss.margin=-1", "row flip-loss.margin--1: loss.margin = -1: must be greater than or equal to 0"),
        ("loss.margin", "--sweep loss.margin: write it as dotted.key=value,value"),
        ("=1", "--sweep =1: write it as dotted.key=value,value"),
    ],
)
def test_a_mistake_in_a_sweep_names_it(sweep, said):
    assert mistake(sweeps=[sweep]).startswith(said)


def test_a_further_teacher_has_a_row_alone_and_one_that_it_teaches():
    found = by_name(["lora_sup"], teachers=["runs/bank/taught", "other/bank/taught"])
    assert list(found) == ["lora_sup", "flip", "teacher-bank-taught", "flip-bank-taught", "teacher-bank-taught-2",
                           "flip-bank-taught-2"]  # fmt: skip
    assert found["teacher-bank-taught"].kind == "teacher"
    assert settings_of(CONFIG, found["flip-bank-taught-2"]).teacher.model_name_or_path == "other/bank/taught"
    assert list(by_name(["lora_sup"], teachers=["a/b"])) == ["lora_sup", "flip", "teacher-a-b", "flip-a-b"]
    same = with_overrides(CONFIG, ["teacher.model_name_or_path=a/b"], "test")
    assert [row.name for row in chosen_rows(same, ["flip"], teachers=["a/b"])] == ["lora_sup", "flip"]


def test_a_setting_of_one_row_alone():
    found = by_name(["full_sup"], settings=["full_sup.train.learning_rate=3e-5", "lora_sup.student.answers=[a,b]"])
    assert settings_of(CONFIG, found["full_sup"]).train.learning_rate == 3e-5
    assert settings_of(CONFIG, found["lora_sup"]).student.answers == ["a", "b"]
    said = mistake(["lora_sup"], settings=["full_sup.seed=1"])
    assert said.startswith("--set full_sup: no such row: the nearest is lora_sup")
    assert mistake(settings=["flip.loss.margn=1"]).startswith("row flip: unknown key loss.margn")
    assert mistake(settings=["flip.loss.margin"]).startswith("--set flip.loss.margin: write it as ROW.")


def test_runs_come_seed_by_seed_the_reference_first_and_encoders_need_none():
    rows = chosen_rows(CONFIG, ["overlap", "teacher", "untrained", "full_sup", "classic"])
    runs = [(run.row.name, run.config.seed) for run in planned_runs(CONFIG, rows, 2)]
    assert runs == [("lora_sup", 42), ("untrained", 42), ("full_sup", 42), ("classic", 42), ("lora_sup", 43),
                    ("full_sup", 43), ("classic", 43)]  # fmt: skip
