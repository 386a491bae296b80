"""Full tuning: one process against ZeRO, a stop against none, and the saved folder against the training that wrote it.

Plain SGD without clipping first: AdamW and clipping hide a wrong scale of the gradient.
"""

import json
from functools import partial

import numpy as np
import pytest
import test_chunk_parity as in_chunks
from gang import run_gang
from plain_folder import plain_answers
from test_resume_parity import (
    adapter,
    assert_equal,
    first_step_of_train,
    has_line,
    kill_when,
    lines,
    prepared,  # noqa: F401, a fixture
    resume,
    run_config,
    stop_at,
)
from test_verify_parity import check, shard
from test_zero_parity import ADAMW, compare, long_and_short_pairs
from tiny import pair_table, save_student

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.checkpoint import best_checkpoint
from flipkd_dist.config import LossConfig, RunConfig, validate
from flipkd_dist.evaluate import pair_texts
from flipkd_dist.evaluation import evaluate
from flipkd_dist.pairs import read_pairs
from flipkd_dist.predict import Matcher
from flipkd_dist.progress import NUM_PROBES
from flipkd_dist.train import train

pytestmark = pytest.mark.parity
FULL = {"tuning": "full"}
SMOOTH = partial(ADAMW, eps=1e-3)
SUPERVISED = LossConfig(dist_weight=0.0, mcl_weight=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.mark.parametrize(("stage", "world_size"), [(3, 1), (3, 2), (2, 2), (1, 2)])
def test_zero_equals_one_process(folder, stage, world_size):
    """All three losses; every tensor has a gradient, the embedding and the answers' rows among them."""
    expected, _ = compare(folder, pair_table(22), stage, world_size, 8, accumulation=3, rate=0.05, **FULL)
    assert {"answer_rows", "model.embed_tokens.weight", "model.norm.weight"} < expected["weights"].keys()
    assert len(expected["weights"]) > 20 and not any("lora" in name for name in expected["weights"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_supervised_alone_with_tied_embeddings_and_biases(tmp_path, world_size):
    base = save_student(tmp_path, "qwen2")
    compare(base, pair_table(14), 3, world_size, 8, rate=0.05, loss=SUPERVISED, **FULL)


def test_texts_of_very_different_lengths(folder):
    compare(folder, long_and_short_pairs(), 3, 2, 8, rate=0.05, **FULL)


def test_adamw_with_an_active_clip(folder):
    """With a large epsilon: elements that hardly have a gradient would take whole steps out of rounding."""
    expected, _ = compare(folder, pair_table(14), 3, 2, 8, optimizer=SMOOTH, clip=0.05, rate=1e-3, **FULL)
    assert min(expected["norms"]) > 0.05


@pytest.mark.parametrize(("stage", "world_size", "checkpointing"), [(0, 1, False), (3, 2, False), (2, 2, True)])
def test_in_chunks(folder, stage, world_size, checkpointing, monkeypatch):
    """The read-outs of the first pass are the last hidden states here, for which the whole forward runs."""
    monkeypatch.setattr(in_chunks, "SGD_RATE", 0.05)
    in_chunks.compare(folder, stage, world_size, 8, 2, checkpointing=checkpointing, **FULL)


@pytest.mark.parametrize(("stage", "size"), [(0, 1), (3, 2), (1, 2)])
def test_the_first_forward_is_checked(folder, stage, size):
    ranks = run_gang(size, lambda: check(folder, stage, **FULL))
    assert all(error is None for error, *_ in ranks)
    assert any(line.startswith("the first forward equals an unsharded one") for line in ranks[0][1])


@pytest.mark.parametrize("tensor", ["layers.1.mlp.down_proj.weight", "embed_tokens.weight", "answer_rows"])
def test_a_spoilt_shard_stops_every_rank(folder, tensor):
    """Of weights as they were loaded: what the files say is what counts, not what the engine holds."""
    for error, *_ in run_gang(2, lambda: check(folder, 3, shard(1, tensor), updated=False, **FULL)):
        assert error.startswith("RuntimeError train.verify: on rank 0 the ") and "\n" not in error


def full_config(prepared, name, workers, stage=3, bf16=False, **train_settings) -> RunConfig:  # noqa: F811
    values = run_config(prepared, name, workers, stage, bf16, **FULL).model_dump()
    values["train"] |= {"learning_rate": 1e-3, "verify": "always"} | train_settings
    config = validate(values, "test")
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    return config


@pytest.fixture(scope="module")
def undisturbed(prepared):  # noqa: F811
    config = full_config(prepared, "full", 2)
    run_gang(2, train, config)
    return config


def test_kill_9_and_go_on(prepared, undisturbed):  # noqa: F811
    config = full_config(prepared, "full-killed", 2)
    kill_when(config, 2, has_line(config, 3))
    assert resume(config, 2) > 0
    assert_equal(config, undisturbed)
    assert lines(config) == lines(undisturbed)
    [move] = [line["moved_share"] for line in lines(config) if "moved_share" in line]
    assert move == 1


@pytest.mark.parametrize(("before", "after"), [((2, 3), (1, 0)), ((1, 0), (2, 2))])
def test_other_workers_and_other_stages(prepared, before, after):  # noqa: F811
    """Up to rounding. AdamW makes whole steps of it where there is hardly a gradient: a key's bias is left out."""
    settled = full_config(prepared, f"full-whole-{before[0]}", *before)
    run_gang(before[0], train, settled)
    moved = full_config(prepared, f"full-moved-{before[0]}", *before)
    stop_at(moved, before[0], 4)
    moved = full_config(prepared, moved.name, *after)
    assert resume(moved, after[0]) == 4
    found, wanted = adapter(moved), adapter(settled)
    assert found.keys() == wanted.keys()
    for name in (name for name in wanted if not name.endswith("k_proj.bias")):
        assert np.linalg.norm(found[name] - wanted[name]) < 1e-4 * np.linalg.norm(wanted[name]), name


def test_bf16_goes_on_from_the_fp32_masters(prepared):  # noqa: F811
    settled = full_config(prepared, "full-bf16", 2, bf16=True)
    run_gang(2, train, settled)
    killed = full_config(prepared, "full-bf16-killed", 2, bf16=True)
    stop_at(killed, 2, 6)
    assert resume(killed, 2) == 6
    assert_equal(killed, settled)
    assert {str(value.dtype) for value in best_checkpoint(killed.run_dir / "checkpoints").weights().values()} == {
        "torch.float32"
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_the_folder_answers_as_the_training_did(undisturbed, workers):
    """In a fresh process, in plain transformers, and in the workers that evaluate it."""
    folder = undisturbed.run_dir / "adapter"
    best = best_checkpoint(undisturbed.run_dir / "checkpoints")
    texts = pair_texts(read_pairs(undisturbed.data.validation, undisturbed.data, "data.validation"))
    expected = np.array(best.manifest["probes"])
    assert len(expected) == len(texts) < NUM_PROBES and expected.std() > 1e-3
    np.testing.assert_allclose(Matcher(folder).predict(texts)[0], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(plain_answers(folder, texts)[0], expected, rtol=0, atol=1e-5)
    config = undisturbed.model_copy(deep=True)
    config.train.per_device_train_batch_size = 8 // workers
    config.distributed.num_workers = workers
    run_gang(workers, evaluate, config)
    written = (undisturbed.run_dir / "predictions-validation.jsonl").read_text().splitlines()
    np.testing.assert_allclose([json.loads(line)["student"] for line in written], expected, rtol=0, atol=1e-5)
    card = AdapterCard.read(folder)
    assert (card.tuning, card.readout, card.encoder_module) == ("full", "mean", None)


def test_without_the_supervised_loss(prepared):  # noqa: F811
    """The answers' rows get no gradient, which is no error."""
    config = full_config(prepared, "full-unsupervised", 2)
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"sup_weight": 0.0})})
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    assert run_gang(2, first_step_of_train, config) == [0, 0]
