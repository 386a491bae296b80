"""`flipkd teach` with a tiny encoder: it learns, its folder is read alike everywhere, a killed one goes on."""

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import save_teacher

from flipkd_dist import teach as teach_module
from flipkd_dist import teach_trainer
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.evaluate import best_threshold, teacher_scores
from flipkd_dist.run_folder import read_json
from flipkd_dist.taught_folder import checkpoints_path, taught_path
from flipkd_dist.teach import teach
from flipkd_dist.teacher_source import text_teacher

pytestmark = pytest.mark.system
TOPICS = (["card", "lost", "stolen", "pin", "blocked"], ["account", "open", "close", "money", "change"])
FILLERS = ["my", "how", "do", "i", "where", "is", "the", "can", "you", "help", "with"]


def write_topics(path: Path, count: int, seed: int) -> str:
    """Two texts match where their topic is the same; every text has three words of its topic among fillers."""
    generator = np.random.default_rng(seed)

    def text(topic: int) -> str:
        words = [*generator.choice(TOPICS[topic], 3), *generator.choice(FILLERS, 5)]
        return " ".join(generator.permutation(words))

    with path.open("w") as file:
        for number in range(count):
            topic, label = int(generator.integers(2)), number % 2
            record = {"text_a": text(topic), "text_b": text(topic if label else 1 - topic), "label": label}
            file.write(json.dumps(record) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    data = {
        split: write_topics(folder / f"{split}.jsonl", count, seed)
        for seed, (split, count) in enumerate({"train": 120, "validation": 60, "test": 60}.items())
    }
    return {"data": data, "base": str(save_teacher(folder / "base"))}


def config(inputs: dict, output: Path, teach: dict | None = None, teacher: dict | None = None, **changes) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "output_dir": str(output),
            "data": inputs["data"],
            "teacher": {"model_name_or_path": inputs["base"], "max_length": 32, **(teacher or {})},
            "teach": {
                "loss": "contrastive",
                "max_steps": 20,
                "per_device_train_batch_size": 32,  # the last one of an epoch is shorter
                "learning_rate": 5e-3,
                "save_steps": 6,  # in the middle of epochs: four steps are one
                **(teach or {}),
            },
            **changes,
        }
    )


@pytest.fixture(scope="module")
def taught(inputs, tmp_path_factory) -> RunConfig:
    """A run with a taught teacher."""
    settings = config(inputs, tmp_path_factory.mktemp("undisturbed"))
    teach(settings)
    return settings


def weights(settings: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(taught_path(settings) / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("loss", ["contrastive", "cosine"])
def test_it_learns(loss, inputs, taught, tmp_path, capsys):
    settings = taught if loss == "contrastive" else config(inputs, tmp_path, {"loss": loss})
    teach(settings)
    manifest = read_json(taught_path(settings) / "flipkd.json")
    before, after = (manifest[key]["test"]["teacher"]["roc_auc"] for key in ("before", "after"))
    assert before < 0.75 and after > 0.95
    printed = capsys.readouterr().out
    assert f"{before:.4f}" in printed and f"{after:.4f}" in printed and "before" in printed


def test_the_folder_is_complete_and_read_alike(taught):
    from sentence_transformers import SentenceTransformer

    folder = taught_path(taught)
    files = {path.name for path in folder.rglob("*")}
    assert "model.safetensors" in files and not {name for name in files if name.endswith((".bin", ".pt", ".pth"))}
    assert not checkpoints_path(taught).exists()
    assert {path.name for path in folder.parent.iterdir()} == {"config.yaml", "taught"}
    texts = ["how do i open my account", "card lost", "money " * 50]
    model = SentenceTransformer(str(folder), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    theirs, ours = model.encode(texts, show_progress_bar=False), text_teacher(taught).load().encode(texts, 2)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert text_teacher(taught).spec.teacher_fingerprint == read_json(folder / "flipkd.json")["fingerprint"]


def test_the_same_seed_gives_the_same_weights(inputs, taught, tmp_path):
    again, other = config(inputs, tmp_path / "a"), config(inputs, tmp_path / "b", seed=7)
    teach(again)
    teach(other)
    assert equal(weights(again), weights(taught)) and not equal(weights(other), weights(taught))


def test_a_teaching_killed_in_the_middle_goes_on_as_if_undisturbed(inputs, taught, tmp_path, monkeypatch):
    settings = config(inputs, tmp_path)
    step_end = teach_trainer._Course.on_step_end

    def dying(self, args, state, control, **others):
        step_end(self, args, state, control, **others)
        if state.global_step == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(teach_trainer._Course, "on_step_end", dying)
    with pytest.raises(KeyboardInterrupt):
        teach(settings)
    monkeypatch.undo()
    checkpoints = checkpoints_path(settings)
    torn = checkpoints / "checkpoint-8"  # begun, without its mark
    torn.mkdir()
    assert not taught_path(settings).exists()
    with pytest.raises(UserError, match="not finished"):
        text_teacher(settings)
    seen = []
    monkeypatch.setattr(
        teach_trainer._Course,
        "on_step_end",
        lambda self, *a, **k: seen.append(a[1].global_step) or step_end(self, *a, **k),
    )
    teach(settings)
    assert seen == list(range(7, 21)) and equal(weights(settings), weights(taught))
    assert not checkpoints.exists()


def test_a_signal_saves_and_stops(inputs, taught, tmp_path, monkeypatch):
    assert threading.current_thread() is threading.main_thread()
    settings = config(inputs, tmp_path, {"save_steps": 100})
    step_end = teach_trainer._Course.on_step_end

    def signalling(self, args, state, control, **others):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        step_end(self, args, state, control, **others)

    monkeypatch.setattr(teach_trainer._Course, "on_step_end", signalling)
    with pytest.raises(StoppedOnRequest, match="same command"):
        teach(settings)
    assert [path.name for path in checkpoints_path(settings).iterdir()] == ["checkpoint-3"]
    monkeypatch.undo()
    teach(settings)
    assert equal(weights(settings), weights(taught))


def test_a_kill_after_training_trains_no_step_again(inputs, taught, tmp_path, monkeypatch):
    settings = config(inputs, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(teach_module, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            teach(settings)
    assert not taught_path(settings).exists()
    seen = []
    monkeypatch.setattr(teach_trainer._Course, "on_step_end", lambda *a, **k: seen.append(a))
    teach(settings)
    assert seen == [] and equal(weights(settings), weights(taught))


def test_the_same_again_is_skipped_and_other_inputs_are_taught_again(inputs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("flipkd_dist.teach.logger.propagate", True)
    caplog.set_level("INFO", "flipkd_dist")
    settings = config(inputs, tmp_path, {"max_steps": 2})
    teach(settings)
    first = weights(settings)
    with monkeypatch.context() as patch:
        patch.setattr(teach_module, "fine_tune", None)
        teach(config(inputs, tmp_path, {"max_steps": 2, "save_steps": 1}))  # checkpoints do not count
        assert "complete for the same inputs, skipped" in caplog.text
        caplog.clear()
        fewer = dict(inputs, data=dict(inputs["data"], test=inputs["data"]["validation"]))
        teach(config(fewer, tmp_path, {"max_steps": 2}))
        assert "other validation or test pairs are measured" in caplog.text
        metrics = read_json(taught_path(settings) / "flipkd.json")["after"]
        assert metrics["test"] == metrics["validation"]
    teach(config(inputs, tmp_path, {"max_steps": 3}))
    assert "is made again" in caplog.text and not equal(weights(settings), first)
    (settings.run_dir / "adapter").mkdir()
    with pytest.raises(UserError, match="holds a student trained with a teacher that was fine-tuned on other inputs"):
        teach(config(inputs, tmp_path, {"max_steps": 2}))
    teach(config(inputs, tmp_path, {"max_steps": 3}))  # nothing would change


def test_worse_on_validation_is_said(inputs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("flipkd_dist.teach.logger.propagate", True)
    wrong = tmp_path / "wrong.jsonl"
    records = [json.loads(line) for line in Path(inputs["data"]["train"]).read_text().splitlines()]
    wrong.write_text("".join(json.dumps(record | {"label": 1 - record["label"]}) + "\n" for record in records))
    teach(config(dict(inputs, data=dict(inputs["data"], train=str(wrong))), tmp_path, {"loss": "cosine"}))
    assert "worse on validation" in caplog.text and "teach.learning_rate" in caplog.text


def test_a_sentence_transformers_folder_keeps_its_modules_and_prompts(inputs, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    base = tmp_path / "base"
    words = Transformer(inputs["base"])
    SentenceTransformer(
        modules=[words, Pooling(16, pooling_mode="cls")], prompts={"ask": "help : "}, default_prompt_name="ask"
    ).save_pretrained(str(base))
    changed = dict(inputs, base=str(base), data={"train": inputs["data"]["train"]})
    settings = config(changed, tmp_path, {"max_steps": 2})
    teach(settings)
    model = SentenceTransformer(str(taught_path(settings)), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling"]
    assert (model[1].pooling_mode, model.default_prompt_name, model.prompts["ask"]) == ("cls", "ask", "help : ")
    assert model.max_seq_length == 32
    without = dict(changed, base=inputs["base"])
    plain = config(without, tmp_path / "plain", {"max_steps": 2}, {"pooling": "cls", "prompt": "help : "})
    teach(plain)
    other = SentenceTransformer(str(taught_path(plain)), device="cpu")
    assert (other[1].pooling_mode, other.prompts[other.default_prompt_name]) == ("cls", "help : ")


def test_the_prompt_is_read_in_training(inputs, tmp_path):
    """A prompt of words that the model knows changes what it learns."""
    first, second = (
        config(inputs, tmp_path / str(number), {"max_steps": 3}, {"prompt": prompt})
        for number, prompt in enumerate(("", "lost money "))
    )
    teach(first)
    teach(second)
    assert not equal(weights(first), weights(second))


def test_scores_of_the_taught_teacher_separate(taught):
    teaching = teach_module.check_inputs(taught)
    encoder, pairs = text_teacher(taught).load(), teaching.splits["test"]
    before, after = (
        teacher_scores(pairs, model.encode(pairs.texts, 16))
        for model in (text_teacher(taught, taught=False).load(), encoder)
    )
    gaps = [one[pairs.label == 1].mean() - one[pairs.label == 0].mean() for one in (before, after)]
    assert gaps[1] > gaps[0] + 0.1, gaps  # how far depends on the tiny tokenizer, which is another in each process
    after, validation = read_json(taught_path(taught) / "flipkd.json")["after"], teaching.splits["validation"]
    threshold = best_threshold(teacher_scores(validation, encoder.encode(validation.texts, 16)), validation.label)
    assert after["test"]["teacher"]["threshold"] == pytest.approx(threshold, abs=1e-6)  # never found on test
