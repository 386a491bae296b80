"""What `flipkd teach` refuses before it starts, and how a run finds the teacher that was made."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import save_student, save_teacher, write_pairs

from flipkd_dist import preflight
from flipkd_dist.config import RunConfig, TeachConfig
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import fingerprint
from flipkd_dist.pipeline import Pipeline
from flipkd_dist.run_folder import write_json
from flipkd_dist.taught_folder import MANIFEST, checkpoints_path, read_manifest, taught_folder, taught_path
from flipkd_dist.teach import check_inputs, table, teach
from flipkd_dist.teach_trainer import MARK, Budget, _Batches, newest_checkpoint
from flipkd_dist.teacher_source import text_teacher


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "base": str(save_teacher(folder / "base")),
        "other": str(save_teacher(folder / "other", seed=2)),
        "student": str(save_student(folder / "student")),
    }


def config(models, tmp_path, teacher: dict | None = None, **sections) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "output_dir": str(tmp_path),
            "data": {"train": write_pairs(tmp_path / "train.jsonl", 12, 0), "max_length": 100},
            "teacher": {"model_name_or_path": models["base"], "max_length": 32, **(teacher or {})},
            "student": {"model_name_or_path": models["student"], "answers": ["yes", "no"]},
            **sections,
        }
    )


def as_taught(settings: RunConfig, models: dict[str, str], **changes) -> None:
    """What `teach` would leave behind, made by hand out of another model."""
    folder = taught_path(settings)
    shutil.copytree(models["other"], folder)
    reading = {key: getattr(settings.teacher, key) for key in ("pooling", "prompt", "max_length")}
    manifest = {
        "base": fingerprint(models["base"]),
        "fingerprint": fingerprint(folder),
        "reading": reading,
        "teach": settings.teach.model_dump(mode="json"),
    }
    write_json(folder / MANIFEST, {**manifest, "inputs": "x", **changes})


@pytest.mark.parametrize(
    ("teacher", "remedy"),
    [
        ({"model_name_or_path": ["a", "b"]}, "names several: give one of them"),
        ({"api_base": "http://127.0.0.1:1/v1"}, "teacher.api_base: .* name a model folder"),
        ({"cross_encoder": "c"}, "teacher.cross_encoder: .* set teacher.cross_encoder=null"),
        ({"scores": "s.jsonl"}, "teacher.scores: .* set teacher.scores=null"),
        ({"model_name_or_path": None}, "teacher.model_name_or_path is missing"),
        ({"model_name_or_path": "nowhere"}, "neither a folder nor a hub id"),
    ],
)
def test_only_one_encoder_can_be_taught(teacher, remedy, models, tmp_path):
    with pytest.raises(UserError, match=remedy):
        teach(config(models, tmp_path, teacher))
    assert not (tmp_path / "run").exists()


def test_a_cross_encoder_is_refused(models, tmp_path):
    folder = shutil.copytree(models["base"], tmp_path / "cross")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(UserError, match="cross-encoder"):
        check_inputs(config(models, tmp_path, {"model_name_or_path": str(folder)}))


def test_labels_that_are_all_alike_are_refused(models, tmp_path):
    settings = config(models, tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["label"]))
    with pytest.raises(UserError, match="all labels are alike"):
        check_inputs(settings)


def test_too_few_positions_and_a_missing_gpu_are_refused(models, tmp_path):
    with pytest.raises(UserError, match="positions"):
        teach(config(models, tmp_path, {"max_length": 65}))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            teach(config(models, tmp_path, distributed={"use_gpu": True}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trained", ["adapter", "checkpoints"])
def test_a_student_of_the_untaught_teacher_is_not_left_behind(trained, models, tmp_path):
    settings = config(models, tmp_path)
    preflight.RunFolder(settings).open()
    (settings.run_dir / trained).mkdir()
    with pytest.raises(UserError, match="holds a student trained with the teacher as it was named"):
        teach(settings)


def test_the_inputs_name_what_the_result_depends_on(models, tmp_path):
    def inputs(**changes) -> str:
        return check_inputs(config(models, tmp_path, **changes)).inputs

    plain = inputs()
    assert plain == inputs(teach={"save_steps": 3}) == inputs(loss={"margin": 0.1})
    different = [
        inputs(teacher={"model_name_or_path": models["other"]}),
        inputs(teacher={"max_length": 31}),
        inputs(teach={"learning_rate": 1e-4}),
        inputs(seed=1),
        inputs(data={"train": write_pairs(tmp_path / "more.jsonl", 13, 0)}),
    ]
    assert len({plain, *different}) == 6


def test_without_a_taught_teacher_the_named_one_is_used(models, tmp_path):
    settings = config(models, tmp_path)
    assert taught_folder(settings, fingerprint(models["base"])) is None
    assert str(text_teacher(settings).folders[0]) == models["base"]


def test_a_taught_teacher_takes_the_place_of_the_named_one(models, tmp_path):
    settings = config(models, tmp_path)
    preflight.RunFolder(settings).open()
    before = preflight.check_inputs(settings)
    as_taught(settings, models)
    after = preflight.check_inputs(settings)
    assert after.teacher.folders == [taught_path(settings)]
    assert (
        after.store.spec.teacher_fingerprint == fingerprint(models["other"]) and after.store.spec != before.store.spec
    )
    assert after.config.teacher.model_name_or_path == models["base"]
    assert text_teacher(settings, taught=False).spec == before.store.spec
    # A student that learned from the untaught one is not gone on with.
    before.folder.mark_done("train", before.digest("train"))
    before.folder.check_trained(before.digest("train"))
    with pytest.raises(UserError, match="other data or models"):
        after.folder.check_trained(after.digest("train"))


def test_the_taught_teacher_is_said_once_and_other_settings_of_teach_too(models, tmp_path, caplog):
    caplog.set_level("INFO", "flipkd_dist")
    settings = config(models, tmp_path)
    preflight.RunFolder(settings).open()
    as_taught(settings, models)
    Pipeline(settings, on_ray=False)
    line = f"teacher: the fine-tuned one in {taught_path(settings)}"
    assert [record.message for record in caplog.records] == [line]
    Pipeline(config(models, tmp_path, teach={"loss": "contrastive"}), on_ray=False)
    assert "teach.loss: not what" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"max_length": 16}}, "made with teacher.max_length = 32, which is 16 now"),
        ({"teacher": {"prompt": "ask: "}}, "made with teacher.prompt = None, which is 'ask: ' now"),
        ({"teacher": {"pooling": "cls"}}, "made with teacher.pooling = 'auto', which is 'cls' now"),
    ],
)
def test_a_taught_teacher_of_other_settings_is_refused(changes, message, models, tmp_path):
    as_taught(config(models, tmp_path), models)
    with pytest.raises(UserError, match=f"{message}: run `flipkd teach` again, or remove"):
        text_teacher(config(models, tmp_path, **changes))


def test_a_taught_teacher_of_another_base_is_refused(models, tmp_path):
    settings = config(models, tmp_path)
    as_taught(settings, models, base="0" * 32)
    with pytest.raises(UserError, match="made from another teacher"):
        text_teacher(settings)
    as_taught_of_one = fingerprint(models["base"])
    write_json(taught_path(settings) / MANIFEST, read_manifest(taught_path(settings)) | {"base": as_taught_of_one})
    assert text_teacher(settings)
    with pytest.raises(UserError, match="made from another teacher"):  # several teachers, or none here
        taught_folder(settings, as_taught_of_one, "1" * 32)
    with pytest.raises(UserError, match="made from another teacher"):
        taught_folder(settings)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"base": "x"}'])
def test_a_taught_folder_without_its_manifest_is_refused(text, models, tmp_path):
    settings = config(models, tmp_path)
    as_taught(settings, models)
    path = taught_path(settings) / MANIFEST
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match="missing or damaged: remove this folder"):
        text_teacher(settings)


def test_an_unfinished_teaching_is_refused(models, tmp_path):
    settings = config(models, tmp_path)
    checkpoints_path(settings).mkdir(parents=True)
    with pytest.raises(UserError, match="not finished: go on with `flipkd teach`"):
        text_teacher(settings)
    as_taught(settings, models)  # killed between the rename and the removal of the checkpoints
    assert text_teacher(settings).folders == [taught_path(settings)]


def test_the_newest_marked_checkpoint_of_the_same_inputs_counts(tmp_path):
    for step, inputs in ((9, "a"), (10, "a"), (12, "b"), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if inputs:
            write_json(folder / MARK, {"inputs": inputs, "step": step})
    assert newest_checkpoint(tmp_path, "a") == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert newest_checkpoint(tmp_path, "c") is None and not list(tmp_path.iterdir())


def test_a_budget_counts_steps():
    assert Budget.of(TeachConfig(num_train_epochs=2, per_device_train_batch_size=4), 9) == Budget(6, 3, 3)
    assert Budget.of(TeachConfig(max_steps=5, save_steps=2), 1000) == Budget(5, 16, 2)


def test_the_batches_of_two_epochs_hold_every_pair_twice():
    batches = list(_Batches(np.arange(10), 4, 3, 6))
    assert sorted(map(len, batches)) == [2, 2, 4, 4, 4, 4]
    first, second = (np.concatenate(batches[start : start + 3]) for start in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(_Batches(np.arange(10), 4, 3, 5)) == batches[:5]  # a shorter budget sees the same pairs
    assert list(_Batches(np.arange(10), 4, 4, 6)) != batches


def test_pairs_of_similar_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(5, 100, size=64 * 8)
    [*batches] = _Batches(lengths, 8, 0, 64)
    padded = sum(8 * lengths[batch].max() for batch in batches)
    assert padded < 1.1 * lengths.sum() and sorted(np.concatenate(batches)) == list(range(512))
    assert batches[0] != sorted(batches, key=lambda batch: lengths[batch].max())[0]


def test_the_table_puts_before_and_after_side_by_side():
    def metrics(area: float) -> dict:
        numbers = {"accuracy": 0.5, "f1": 0.5, "average_precision": None, "threshold": 0.5, "num_pairs": 3}
        return {split: {"teacher": {**numbers, "roc_auc": area}} for split in ("validation", "test", "test_hard")}

    _, *lines = table(metrics(0.25), metrics(0.75)).splitlines()
    words = [line.split() for line in lines]
    assert [(row[0], row[1], row[4]) for row in words] == [
        ("test", "before", "0.2500"),
        ("test", "after", "0.7500"),
        ("test_hard", "before", "0.2500"),
        ("test_hard", "after", "0.7500"),
        ("validation", "before", "0.2500"),
        ("validation", "after", "0.7500"),
    ]


def test_a_taught_teacher_with_another_byte_is_refused(models, tmp_path):
    settings = config(models, tmp_path)
    as_taught(settings, models)
    weights = taught_path(settings) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="not as `flipkd teach` left it: remove this folder"):
        text_teacher(settings)
