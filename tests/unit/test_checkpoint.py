"""Checkpoints: complete or absent, the newest and the best are kept."""

import pytest
import torch
from safetensors.torch import load_file

from flipkd_dist.adapter import WEIGHTS
from flipkd_dist.checkpoint import MANIFEST, best_checkpoint, checkpoints, keep_newest, save_checkpoint

STATE = {"layer.lora_A.default.weight": torch.ones(2, 3).T}  # not contiguous


def save(folder, **scores):
    """Checkpoints of `step_N=score`, in the order given."""
    for name, score in scores.items():
        save_checkpoint(folder, int(name.removeprefix("step_")), STATE, {"score": score})


def steps(folder) -> list[int]:
    return [manifest["step"] for _, manifest in checkpoints(folder)]


def test_what_a_checkpoint_holds(tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 100, STATE, {"score": 0.5, "probes": [0.1]})
    assert path == tmp_path / "checkpoints" / "step-000100"
    assert checkpoints(tmp_path / "checkpoints") == [(path, {"step": 100, "score": 0.5, "probes": [0.1]})]
    [(name, value)] = load_file(path / WEIGHTS).items()
    assert name == "layer.lora_A.weight" and torch.equal(value, STATE["layer.lora_A.default.weight"])
    assert sorted(found.name for found in path.parent.iterdir()) == ["step-000100"]


def test_oldest_first_by_number(tmp_path):
    save(tmp_path, step_1000000=0.1, step_999999=0.2, step_20=0.3)
    assert steps(tmp_path) == [20, 999999, 1000000]
    save(tmp_path, step_20=0.9)  # again
    assert steps(tmp_path) == [20, 999999, 1000000] and best_checkpoint(tmp_path)[1]["score"] == 0.9
    assert checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({"step_1": 0.7, "step_2": 0.9, "step_3": 0.8}, 2),
        ({"step_1": 0.9, "step_2": 0.9, "step_3": 0.8}, 2),  # the later of equals
        ({"step_1": None, "step_2": None, "step_3": None}, 3),  # nothing was validated
        ({"step_1": 0.0, "step_2": 0.0}, 2),
        ({"step_1": None, "step_2": 0.1, "step_3": None}, 2),
    ],
)
def test_best(tmp_path, scores, best):
    save(tmp_path, **scores)
    path, manifest = best_checkpoint(tmp_path)
    assert manifest["step"] == best and path.name == f"step-00000{best}"


@pytest.mark.parametrize("best", range(1, 7))
@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_newest_and_the_best_are_kept(tmp_path, best, count):
    save(tmp_path, **{f"step_{step}": 0.9 if step == best else 0.5 for step in range(1, 7)})
    keep_newest(tmp_path, count)
    assert steps(tmp_path) == sorted({*range(max(1, 7 - count), 7), best})


@pytest.mark.parametrize("lacks", [MANIFEST, WEIGHTS])
def test_an_incomplete_one_is_ignored(tmp_path, lacks):
    save(tmp_path, step_1=0.7, step_2=0.9)
    (tmp_path / "step-000002" / lacks).unlink()
    assert steps(tmp_path) == [1] and best_checkpoint(tmp_path)[1]["step"] == 1
    (tmp_path / "step-000001" / MANIFEST).write_text('{"step": 1')
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("failing", ["save_file", "write_json", "os.replace"])
def test_an_interrupted_one_is_absent(tmp_path, monkeypatch, failing):
    save(tmp_path, step_1=0.7)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"flipkd_dist.checkpoint.{failing}", die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, step_2=0.9)
    assert steps(tmp_path) == [1]
    save(tmp_path, step_2=0.9)  # what was left of it is in nobody's way
    assert steps(tmp_path) == [1, 2] and len(list(tmp_path.iterdir())) == 2
    assert best_checkpoint(tmp_path)[1]["step"] == 2
