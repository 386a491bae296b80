"""Checkpoints: complete or absent, sliced by rank, read in any other slices; the newest and the best are kept."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flipkd_dist import checkpoint
from flipkd_dist.checkpoint import (
    MANIFEST,
    amend_manifest,
    best_checkpoint,
    best_checkpoints,
    checkpoints,
    file_of_rank,
    keep_checkpoints,
    newest_checkpoint,
    remove_drafts,
    save_checkpoint,
)
from flipkd_dist.slices import KINDS, Slice
from flipkd_dist.world import World

WHOLE = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(100.0, 107.0)}
SHAPES = {name: list(value.shape) for name, value in WHOLE.items()}
CANDIDATE = {"score": None, "threshold": 0.5, "probes": [0.1], "shapes": SHAPES}


class Together(World):
    """A rank whose others are threads of this process."""

    def __new__(cls, *_):
        return object.__new__(cls)

    def __init__(self, rank: int, shared: dict):
        super().__init__(rank, shared["size"])
        object.__setattr__(self, "shared", shared)

    def barrier(self):
        self.shared["barrier"].wait(10)

    def gather_object(self, value):
        self.shared["values"][self.rank] = value
        self.barrier()
        found = [self.shared["values"][rank] for rank in range(self.size)]
        self.barrier()  # all have read before the next round writes
        return found


def slices_of(ranges: dict[str, tuple[int, int]]) -> dict[str, Slice]:
    """Kind k of an element is k * 1000 more than its weight."""
    return {
        name: Slice(start, {kind: WHOLE[name].flatten()[start:stop] + 1000 * k for k, kind in enumerate(KINDS)})
        for name, (start, stop) in ranges.items()
    }


def save(folder, step=1, ranks=({"a": (0, 12), "b": (0, 7)},), **manifest) -> None:
    shared = {"size": len(ranks), "barrier": threading.Barrier(len(ranks)), "values": {}}

    def one(rank: int) -> None:
        random = {"cpu": torch.full((8,), rank, dtype=torch.uint8)}
        world = Together(rank, shared)
        save_checkpoint(folder, step, slices_of(ranks[rank]), random, CANDIDATE | manifest, world)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(1, len(ranks))]
    for thread in threads:
        thread.start()
    one(0)
    for thread in threads:
        thread.join()


def save_scored(folder, **scores) -> None:
    """Checkpoints of `step_N=score`, in the order given."""
    for name, score in scores.items():
        save(folder, int(name.removeprefix("step_")), score=score)


def steps(folder) -> list[int]:
    return [found.step for found in checkpoints(folder)]


TWO_RANKS = ({"a": (0, 6), "b": (0, 4)}, {"a": (6, 12), "b": (4, 7)})
THREE_RANKS = ({"a": (0, 4)}, {"a": (4, 12), "b": (0, 1)}, {"b": (1, 7)})


@pytest.mark.parametrize("written", [({"a": (0, 12), "b": (0, 7)},), TWO_RANKS, THREE_RANKS])
@pytest.mark.parametrize("wanted", [{"a": (0, 12), "b": (0, 7)}, {"a": (3, 7)}, {"a": (5, 6), "b": (2, 7)}, {}])
def test_any_slices_can_be_read_from_any(tmp_path, written, wanted):
    save(tmp_path, ranks=written)
    found = newest_checkpoint(tmp_path).read(wanted)
    assert found.keys() == wanted.keys()
    for name, expected in slices_of(wanted).items():
        for kind in KINDS:
            assert torch.equal(found[name][kind], expected.values[kind])


def test_whole_weights_and_random_states(tmp_path):
    save(tmp_path, ranks=THREE_RANKS)
    found = newest_checkpoint(tmp_path)
    assert all(torch.equal(value, WHOLE[name]) for name, value in found.weights().items())
    assert found.random_state(2, "cpu").tolist() == [2] * 8 and found.random_state(2, "cuda") is None


def test_a_rank_opens_only_the_files_that_it_needs(tmp_path, monkeypatch):
    save(tmp_path, ranks=TWO_RANKS)
    found, opened = newest_checkpoint(tmp_path), []
    monkeypatch.setattr(
        checkpoint, "safe_open", lambda path, **options: opened.append(path) or safe_open(path, **options)
    )
    found.read({"a": (6, 12), "b": (5, 7)})
    assert opened == [found.path / file_of_rank(1)]


def test_a_tensor_that_is_not_there(tmp_path):
    save(tmp_path)
    with pytest.raises(RuntimeError, match="c is missing: the checkpoint belongs to another student"):
        newest_checkpoint(tmp_path).read({"c": (0, 1)})
    with pytest.raises(RuntimeError, match="b is not whole"):
        newest_checkpoint(tmp_path).read({"b": (0, 8)})


def test_what_a_checkpoint_holds(tmp_path):
    save(tmp_path / "checkpoints", 100, ranks=TWO_RANKS)
    [path] = (tmp_path / "checkpoints").iterdir()
    assert path.name == "step-000100"
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, file_of_rank(0), file_of_rank(1)]


class Apart(Together):
    """Rank 0 of two whose other one writes to another disk."""

    def __init__(self):
        super().__init__(0, {"size": 2})

    def barrier(self):
        pass

    def gather_object(self, value):
        return [value, value]


def test_a_file_that_rank_0_does_not_see(tmp_path):
    with pytest.raises(RuntimeError, match=r"rank-00001.* is not seen here: output_dir must lie on storage"):
        save_checkpoint(tmp_path, 1, slices_of({"a": (0, 12)}), {}, CANDIDATE, Apart())
    assert not checkpoints(tmp_path)


def test_oldest_first_by_number(tmp_path):
    save_scored(tmp_path, step_1000000=0.1, step_999999=0.2, step_20=0.3)
    assert steps(tmp_path) == [20, 999999, 1000000] and newest_checkpoint(tmp_path).step == 1000000
    save_scored(tmp_path, step_20=0.9)  # again
    assert steps(tmp_path) == [20, 999999, 1000000] and best_checkpoint(tmp_path).manifest["score"] == 0.9
    assert checkpoints(tmp_path / "absent") == [] and newest_checkpoint(tmp_path / "absent") is None


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
    save_scored(tmp_path, **scores)
    found = best_checkpoint(tmp_path)
    assert found.step == best and found.path.name == f"step-00000{best}"


def test_one_that_was_only_saved_is_no_candidate(tmp_path):
    save_scored(tmp_path, step_1=None)
    save(tmp_path, 2, probes=None)
    assert best_checkpoint(tmp_path).step == 1 and newest_checkpoint(tmp_path).step == 2


def test_the_best_come_first(tmp_path):
    save_scored(tmp_path, step_1=0.7, step_2=0.9, step_3=0.7, step_4=0.2)
    save(tmp_path, 5, probes=None)
    assert [found.step for found in best_checkpoints(tmp_path, 3)] == [2, 3, 1]
    assert [found.step for found in best_checkpoints(tmp_path, 9)] == [2, 3, 1, 4]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_newest_and_the_best_are_kept(tmp_path, count):
    scores = {1: 0.9, 2: 0.1, 3: 0.8, 4: 0.2, 5: 0.3, 6: 0.1}
    save_scored(tmp_path, **{f"step_{step}": score for step, score in scores.items()})
    keep_checkpoints(tmp_path, count)
    assert steps(tmp_path) == {1: [1, 6], 2: [1, 3, 5, 6], 9: [1, 2, 3, 4, 5, 6]}[count]


@pytest.mark.parametrize("lacks", [MANIFEST, file_of_rank(0)])
def test_an_incomplete_one_is_passed_over(tmp_path, caplog, lacks):
    save_scored(tmp_path, step_1=0.7, step_2=0.9)
    (tmp_path / "step-000002" / lacks).unlink()
    assert steps(tmp_path) == [1] and best_checkpoint(tmp_path).step == 1
    assert newest_checkpoint(tmp_path).step == 1
    assert f"{tmp_path / 'step-000002'} is not resumed from: {lacks}" in caplog.text


@pytest.mark.parametrize("failing", ["save_file", "write_json", "os.replace"])
def test_an_interrupted_one_is_absent(tmp_path, monkeypatch, failing):
    save_scored(tmp_path, step_1=0.7)
    replace = os.replace

    def die(*arguments):
        if failing == "os.replace" and Path(arguments[1]).name == MANIFEST:  # the folder's renaming is meant
            return replace(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"flipkd_dist.checkpoint.{failing}", die)
        with pytest.raises(KeyboardInterrupt):
            save_scored(tmp_path, step_2=0.9)
    assert steps(tmp_path) == [1] and newest_checkpoint(tmp_path).step == 1
    save_scored(tmp_path, step_2=0.9)  # what was left of it is in nobody's way
    assert steps(tmp_path) == [1, 2] and len(list(tmp_path.iterdir())) == 2


def test_drafts_of_kills_are_removed(tmp_path):
    save_scored(tmp_path, step_1=0.7)
    (tmp_path / ".step-000002.tmp").mkdir()
    remove_drafts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_copy_under_another_name_is_left_alone(tmp_path):
    save_scored(tmp_path, step_1=0.7, step_2=0.9)
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000001.mine")
    keep_checkpoints(tmp_path, 1)
    assert newest_checkpoint(tmp_path).step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001.mine", "step-000002"]


def test_a_manifest_is_amended(tmp_path):
    save(tmp_path, probes=None)
    amend_manifest(newest_checkpoint(tmp_path), {"score": 0.7, "probes": [0.2]})
    found = newest_checkpoint(tmp_path)
    assert (found.manifest["score"], found.manifest["probes"]) == (0.7, [0.2])
    assert torch.equal(found.weights()["a"], WHOLE["a"])
