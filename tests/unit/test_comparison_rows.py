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
    said = mistake(["lora_sup"], settings=["full_sup.train.max_steps=1"])
    assert said.startswith("--set full_sup: no such row: the nearest is lora_sup")
    assert mistake(settings=["flip.loss.margn=1"]).startswith("row flip: unknown key loss.margn")
    assert mistake(settings=["flip.loss.margin"]).startswith("--set flip.loss.margin: write it as ROW.")


def test_what_all_rows_share_is_no_rows_own():
    for key in ("seed=1", "name=x", "output_dir=x", "tracking.experiment=x", "data.test=x.csv", "data.text_a=q"):
        own = key.partition("=")[0]
        wanted = f"--set flip.{key}: {own} is the same for all rows of a table: set it for all of them, {own}=VALUE"
        assert mistake(settings=[f"flip.{key}"]) == wanted
        assert mistake(sweeps=[key]) == wanted.replace("--set flip.", "--sweep ")
    found = by_name(
        ["flip"], settings=["flip.data.train=x.csv", "flip.data.max_length=9", "flip.distributed.timeout_s=5"]
    )
    assert found["flip"].overrides == {"data.train": "x.csv", "data.max_length": 9, "distributed.timeout_s": 5}
    said = mistake(settings=["teacher.teacher.batch_size=2"])
    assert said.startswith("--set teacher.teacher.batch_size=2: teacher is no run of its own: set it for all rows, ")


def test_a_setting_of_flip_is_that_of_its_sweep_and_of_its_teachers():
    options = dict(sweeps=["loss.margin=0.02,0.06"], teachers=["a/b"], settings=["flip.train.max_steps=7"])
    found = by_name(["no_mcl"], **options)
    steps = {name: settings_of(CONFIG, row).train.max_steps for name, row in found.items()}
    sevens = {"flip", "flip-loss.margin-0.02", "flip-a-b"}
    assert steps == {**dict.fromkeys(["lora_sup", "no_mcl", "teacher-a-b"], -1), **dict.fromkeys(sevens, 7)}
    found = by_name(["flip"], sweeps=["loss.margin=0.02,0.06"], settings=["flip.loss.margin=0.02"])
    margins = {name: settings_of(CONFIG, row).loss.margin for name, row in found.items() if name != "lora_sup"}
    assert margins == {"flip": 0.02, "flip-loss.margin-0.06": 0.06}


def test_a_formula_is_of_what_the_row_trains_on():
    found = by_name(["flip", "no_mcl"], settings=["flip.loss.dist_weight=0.5", "flip.loss.contrastive=infonce"])
    assert found["flip"].formula.startswith("L_sup + 0.5 L_dist + 0.1 L_infonce; ") and "Oord" in found["flip"].source
    assert found["no_mcl"].formula.startswith("L_sup + 0.1 L_dist; ") and "L_mcl" not in found["no_mcl"].formula
    [unsupervised] = [
        row
        for row in chosen_rows(with_overrides(CONFIG, ["loss.sup_weight=0", "loss.dist_weight=1"], "test"), ["flip"],
                               settings=["lora_sup.loss.sup_weight=2"])
        if row.name == "flip"
    ]  # fmt: skip
    assert unsupervised.formula.startswith("L_dist + 0.1 L_mcl; ") and "p(y)" not in unsupervised.formula
    alone = with_overrides(CONFIG, ["student.mode=alone"], "test")
    assert all("p = (1 + cos θᵢᵢ)/2" in row.formula for row in chosen_rows(alone) if row.kind == "student")
    assert by_name(["no_filter"])["no_filter"].formula.endswith("; all φ = 1")
    changed = ["flip.loss.mcl_symmetric=true", "flip.loss.mcl_negative_margin=anchor"]
    assert by_name(["flip"], settings=changed)["flip"].formula.endswith(
        "; τᵢᵢ in place of τᵢⱼ; L_mcl is the mean of both directions"
    )


def test_rows_that_would_train_the_same_are_trained_once(caplog):
    caplog.set_level("INFO", "flipkd_dist")
    plain = with_overrides(CONFIG, ["loss.threshold=null", "loss.dist_weight=0"], "test")
    rows = [row.name for row in chosen_rows(plain, ["flip", "no_mcl", "no_dist", "no_filter", "classic"])]
    assert rows == ["lora_sup", "flip", "classic"]
    assert [message.split(": ")[0] for message in caplog.messages] == ["row no_mcl", "row no_dist", "row no_filter"]
    assert "its settings are those of lora_sup" in caplog.messages[0]
    # Settings of losses that have no weight make no difference.
    without = with_overrides(CONFIG, ["loss.mcl_weight=0"], "test")
    rows = [row.name for row in chosen_rows(without)]
    assert rows == ["overlap", "teacher", "untrained", "full_sup", "lora_sup", "flip", "no_filter", "classic"]


def test_a_base_that_cannot_be_tuned_in_full_and_settings_that_full_tuning_has_not(caplog):
    caplog.set_level("INFO", "flipkd_dist")
    named = with_overrides(CONFIG, ["student.encoder_module=q_proj"], "test")
    full = next(row for row in chosen_rows(named) if row.name == "full_sup")
    assert settings_of(named, full).student.encoder_module is None
    small = with_overrides(CONFIG, ["student.load_in_4bit=true"], "test")
    assert "full_sup" not in [row.name for row in chosen_rows(small)]
    assert caplog.messages == ["row full_sup: left out: a base in 4 bits cannot be tuned in full"]
    with pytest.raises(UserError, match=r"row full_sup: .*load_in_4bit"):
        chosen_rows(small, ["full_sup"])
    with pytest.raises(UserError, match=r"^student\.tuning: a table's rows are LoRA's.*leave it out"):
        chosen_rows(with_overrides(CONFIG, ["student.tuning=full"], "test"))


def test_runs_come_seed_by_seed_the_reference_first_and_encoders_need_none():
    rows = chosen_rows(CONFIG, ["overlap", "teacher", "untrained", "full_sup", "classic"])
    runs = [(run.row.name, run.config.seed) for run in planned_runs(CONFIG, rows, 2)]
    assert runs == [("lora_sup", 42), ("untrained", 42), ("full_sup", 42), ("classic", 42), ("lora_sup", 43),
                    ("full_sup", 43), ("classic", 43)]  # fmt: skip
