"""The run folder: who may use it, which stages are complete, and files that appear whole or not at all."""

import json
import os

import pytest
import yaml

from flipkd_dist import run_folder
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.run_folder import RunFolder, decisive_settings, digest, read_json, write_json, write_whole


def configured(tmp_path, **changes) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "output_dir": str(tmp_path / "runs"), **changes})


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(configured(tmp_path))


def mistake(folder: RunFolder, check=RunFolder.check) -> str:
    with pytest.raises(UserError) as caught:
        check(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


def test_a_shared_store_leaves_the_report_in_the_run_folder(tmp_path):
    shared = RunFolder(configured(tmp_path, teacher={"store_path": str(tmp_path / "shared")}))
    shared.open()
    assert shared.teacher == tmp_path / "shared" and not shared.teacher.exists()
    assert shared.report.parent == shared.notes == shared.path / "teacher" and shared.notes.is_dir()
    own = RunFolder(configured(tmp_path))
    assert own.teacher == own.notes == own.path / "teacher"


# --- files ---


def test_a_file_is_written_whole_and_nothing_else_stays(tmp_path):
    path = tmp_path / "a.json"
    for value in ({"text": "größer", "n": 1.5}, [1, None]):
        write_json(path, value)
        assert read_json(path) == value and names(tmp_path) == ["a.json"]
    assert path.read_text().endswith("]\n")
    write_json(path, "ü")
    assert "ü".encode() in path.read_bytes()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def fail(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(run_folder.os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert read_json(path) == {"old": True}


def test_the_text_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    events, path = [], tmp_path / "a"
    real = os.replace
    monkeypatch.setattr(run_folder.os, "fsync", lambda handle: events.append("fsync"))
    monkeypatch.setattr(run_folder.os, "replace", lambda *both: (events.append("replace"), real(*both)))
    write_whole(path, "text")
    assert events == ["fsync", "replace"] and path.read_text() == "text"


def test_what_cannot_be_read_is_none(tmp_path):
    assert read_json(tmp_path / "absent.json") is None
    for content in (b"", b'{"half": ', b"\xff"):
        (tmp_path / "broken.json").write_bytes(content)
        assert read_json(tmp_path / "broken.json") is None


# --- stages ---


def test_a_stage_is_done_for_the_inputs_it_was_marked_with(folder):
    assert not folder.done("train", "a")
    folder.open()
    folder.mark_done("train", "a")
    folder.mark_done("evaluate", "b")
    assert folder.done("train", "a") and folder.done("evaluate", "b")
    assert not folder.done("train", "b") and not folder.done("register", "a")
    folder.mark_done("train", "c")
    assert folder.done("train", "c") and not folder.done("train", "a") and folder.done("evaluate", "b")
    (folder.path / "stages.json").write_text('{"train": "c"')
    assert not folder.done("train", "c")


def test_digest_depends_on_every_part_and_not_on_the_order_of_keys():
    parts = ({"a": 1, "b": [2.5, None]}, "text")
    assert digest(*parts) == digest({"b": [2.5, None], "a": 1}, "text")
    others = [({"a": 2, "b": [2.5, None]}, "text"), ({"a": 1, "b": [None, 2.5]}, "text"), ("text", parts[0]), parts[:1]]
    assert len({digest(*parts), *(digest(*other) for other in others)}) == 5


# --- who may use it ---


def test_a_new_folder_an_empty_one_and_ones_own(folder):
    folder.check()
    assert not folder.path.parent.exists()
    folder.path.mkdir(parents=True)
    folder.check()
    assert names(folder.path) == []
    folder.open()
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == folder.config.model_dump()
    for part in (folder.adapter, folder.checkpoints):
        part.mkdir()
    folder.check()


def test_a_file_in_its_place_or_above_it(folder, tmp_path):
    (tmp_path / "runs").write_text("")
    assert mistake(folder) == f"output_dir: {tmp_path / 'runs'} is a file: choose another output_dir or name"
    (tmp_path / "runs").unlink()
    folder.path.parent.mkdir()
    folder.path.write_text("")
    assert f"{folder.path} is a file" in mistake(folder)


@pytest.mark.parametrize("existing", [".", "runs", "runs/x"])
def test_no_right_to_write(folder, tmp_path, monkeypatch, existing):
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    asked = []
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: asked.append((path, mode)) or False)
    assert f"output_dir: {tmp_path / existing} cannot be written" in mistake(folder)
    assert asked == [(tmp_path / existing, os.W_OK | os.X_OK)]


@pytest.mark.parametrize("content", [None, "", "[]", "name: [", "name: x\nnew_setting: 1\n", b"\xff"])
def test_a_folder_that_is_not_ours(folder, content):
    folder.path.mkdir(parents=True)
    (folder.path / "notes.txt").write_text("")
    if content is not None:
        (folder.path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    said = mistake(folder)
    assert f"{folder.path} exists and is not a run folder of this version: choose another name" in said


DECISIVE = [
    {"seed": 1},
    {"data": {"max_length": 9}},
    {"teacher": {"max_length": 9}},
    {"student": {"prompt": "{text_a} {text_b}"}},
    {"loss": {"margin": 0.5}},
    {"train": {"learning_rate": 0.5}},
    {"train": {"per_device_train_batch_size": 16}},
    {"distributed": {"num_workers": 2}},
    {"distributed": {"num_workers": [1, 2]}},
]
FREE = [
    {"data": {"train": "other.jsonl"}},
    {"teacher": {"batch_size": 9, "num_workers": 9}},
    {"train": {"per_device_eval_batch_size": 9, "logging_steps": 9, "keep_checkpoints": 9}},
    {"train": {"per_device_train_batch_size": 16}, "distributed": {"num_workers": 2}},  # the same contrast batch
    {"train": {"per_device_train_batch_size": 16}, "distributed": {"num_workers": [1, 2]}},
    {"distributed": {"num_workers": [1, 1]}},
    {"train": {"mini_batch_size": 4}},
    {"distributed": {"timeout_s": 9, "deepspeed": "ds_configs/zero1.json"}},
    {"tracking": {"alias": "other"}},
]


@pytest.mark.parametrize("part", ["adapter", "checkpoints"])
@pytest.mark.parametrize("change", DECISIVE, ids=str)
def test_another_run_that_has_trained_is_refused(folder, tmp_path, change, part):
    folder.open()
    changed = RunFolder(configured(tmp_path, **change))
    changed.check()  # nothing is lost yet
    (folder.path / part).mkdir()
    said = mistake(changed)
    [key] = [k for k, v in decisive_settings(changed.config).items() if decisive_settings(folder.config)[k] != v]
    value = decisive_settings(changed.config)[key]
    assert said.startswith(f"name: {folder.path} holds a run with {key} = ")
    assert f", now {value!r}: " in said and said.endswith("choose another name, or remove the folder")


@pytest.mark.parametrize("change", FREE, ids=str)
def test_what_does_not_decide_the_adapter_may_change(folder, tmp_path, change):
    folder.open()
    folder.adapter.mkdir()
    RunFolder(configured(tmp_path, **change)).check()


def test_a_range_of_another_contrast_batch_is_refused(folder, tmp_path):
    folder.open()
    folder.checkpoints.mkdir()
    said = mistake(RunFolder(configured(tmp_path, distributed={"num_workers": [1, 3]})))
    assert "holds a run with train.per_device_train_batch_size x distributed.num_workers = 32, now 96: " in said
    assert "keep their product (of [min, max] max counts; train.mini_batch_size bounds memory)" in said


def test_every_setting_either_decides_or_is_known_not_to():
    """A new setting must be sorted: this list grows on purpose only."""
    flat = {
        f"{section}.{key}"
        for section, value in RunConfig(name="x").model_dump().items()
        if isinstance(value, dict)
        for key in value
    }
    decisive = decisive_settings(RunConfig(name="x")).keys()
    free = {key for key in flat - decisive if key.split(".")[0] not in ("data", "distributed", "tracking", "teach")}
    counted_with_the_workers = {"train.per_device_train_batch_size"}
    assert free - counted_with_the_workers == {
        "teacher.batch_size",
        "teacher.num_workers",
        "teacher.num_cpus_per_worker",
        "teacher.num_gpus_per_worker",
        "teacher.api_base",
        "teacher.api_key_env",
        "teacher.requests_per_minute",
        "teacher.store_path",
        "train.per_device_eval_batch_size",
        "train.mini_batch_size",
        "train.logging_steps",
        "train.keep_checkpoints",
        "train.test_checkpoints",
        "train.profile",
        "train.verify",
        "student.bnb_4bit_quant_storage",
    }


def test_an_adapter_is_required(folder):
    assert ": no adapter yet: run `flipkd train`" in mistake(folder, RunFolder.require_adapter)
    folder.adapter.mkdir(parents=True)
    mistake(folder, RunFolder.require_adapter)
    (folder.adapter / "flipkd.json").write_text(json.dumps({}))
    folder.require_adapter()
