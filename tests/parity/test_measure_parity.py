"""What a run says of itself: whole, consistent, and without any effect on what it computes."""

import gzip
import json
import time

import numpy as np
import pytest
from gang import run_gang
from test_zero_parity import LOSS
from tiny import (
    fill_store,
    pair_table,
    save_student,
    save_teacher,
    signals_of,
    started_student,
    unit_vectors,
    write_pairs,
)
from zero import start_engine

from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import RunConfig, validate
from flipkd_dist.meter import linear_weights
from flipkd_dist.order import Order, rows_of_rank
from flipkd_dist.phases import PHASES, PhaseClock
from flipkd_dist.preflight import check_inputs
from flipkd_dist.progress import Progress
from flipkd_dist.step import TrainingStep
from flipkd_dist.train import train
from flipkd_dist.world import World

pytestmark = pytest.mark.parity
STEPS, LOGGING_STEPS, PAIRS = 7, 3, 8
CHECKPOINT_S = 0.6  # seconds that each step waits where checkpoints are written
PROMPT = "same question or not ? {text_a} | {text_b} ="
MEASURED = {
    "pairs_per_second", "tokens_per_second", "tflops_4n", "step_seconds", "peak_memory_gib",
    *(f"seconds_{phase}" for phase in PHASES),
}  # fmt: skip


def steps(folder, measured: bool) -> tuple[list, dict, dict]:
    """Sums of two updates under ZeRO-3 with two micro-steps each, the weights, and seconds by phase."""
    world, pairs = World.current(), pair_table(30)
    engine, encoder = start_engine(folder, 3, accumulation=2)
    signals = signals_of(pairs, unit_vectors(len(pairs.texts)))
    step = TrainingStep(engine, world, signals, BatchMaker(encoder, engine.student, True), LOSS)
    clock = PhaseClock.of(world.device)
    if measured:
        step.clock = clock
    order = Order(len(pairs), PAIRS, 2, seed=3)
    found = [step(step.prepare(order.contrast_batches(number)), 0.5) for number in range(2)]
    sums = [(counts.tolist(), sums.tolist(), norm) for counts, sums, norm in found]
    return sums, {name: value.numpy() for name, value in engine.trained_state().items()}, clock.take()


def test_the_clock_changes_no_bit(tmp_path):
    folder = save_student(tmp_path)
    with_clock, without = (run_gang(2, steps, folder, measured) for measured in (True, False))
    for (sums, weights, seconds), (expected, expected_weights, unmeasured) in zip(with_clock, without, strict=True):
        assert sums == expected
        for name, value in expected_weights.items():
            np.testing.assert_array_equal(weights[name], value)
        assert all(seconds[phase] > 0 for phase in PHASES if phase != "data")  # which is made in another thread
        assert {phase for phase in PHASES if unmeasured[phase]} == {"other"}


def train_with_slow_checkpoints(config: RunConfig) -> None:
    save_if_due = Progress.save_if_due
    Progress.save_if_due = lambda *arguments: (time.sleep(CHECKPOINT_S), save_if_due(*arguments))  # in this fork alone
    train(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("measured")
    values = {
        "name": "measured",
        "output_dir": str(folder),
        "data": {"train": write_pairs(folder / "train.jsonl", 44, 0), "max_length": 64},
        "teacher": {"model_name_or_path": str(save_teacher(folder / "teacher")), "max_length": 32},
        "student": {
            "model_name_or_path": str(save_student(folder / "student")),
            "prompt": PROMPT,
            "answers": ["yes", "no"],
        },
        "loss": {"threshold": None},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": PAIRS // 2,
            "learning_rate": 1e-2,
            "logging_steps": LOGGING_STEPS,
            "eval_steps": 2,
            "profile": True,
        },
        "distributed": {"num_workers": 2, "deepspeed": "zero2.json", "timeout_s": 60},
    }
    config = validate(values, "test")
    fill_store(config)
    run_gang(2, train_with_slow_checkpoints, config)
    return config


def lines(config: RunConfig) -> list[dict]:
    found = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def test_every_line_has_it(run):
    assert [line["step"] for line in lines(run)] == [1, 3, 6, 7]
    pairs = {1: 8, 3: 16, 6: 20, 7: 8}  # the sixth contrast batch ends the epoch with the last four pairs
    for line, steps in zip(lines(run), (1, 2, 3, 1), strict=True):
        assert line.keys() >= MEASURED and "mfu_4n" not in line  # no peak of a CPU is known
        assert all(line[key] > 0 for key in MEASURED)
        assert sum(line[f"seconds_{phase}"] for phase in PHASES) == pytest.approx(line["step_seconds"])
        assert line["pairs_per_second"] == pytest.approx(pairs[line["step"]] / (steps * line["step_seconds"]))
        assert line["seconds_other"] < CHECKPOINT_S / 2  # validations and checkpoints are no part of a step
        assert 0.05 < line["peak_memory_gib"] < 20


def saved_share(config: RunConfig, steps: range) -> tuple[float, float]:
    """Share of tokens saved in `steps` and tokens that are not padding, counted pair by pair."""
    inputs = check_inputs(config)
    table, encoder = inputs.splits["train"], inputs.encoder
    packed = unpacked = 0
    for number in steps:
        for batch in Order(len(table), PAIRS, 1, config.seed).contrast_batches(number):
            for rank in range(2):
                heads, lengths, prefix = {}, [], len(encoder.prefix)
                for pair in batch[rows_of_rank(len(batch), rank, 2)]:
                    texts = table.texts[table.text_a[pair]], table.texts[table.text_b[pair]]
                    encoded = encoder.encode(*texts)
                    heads[tuple(encoded.ids[: encoded.text_b.start])] = encoded.text_b.start
                    packed += len(encoded.ids) - encoded.text_b.start
                    lengths.append(len(encoded.ids))
                packed += prefix + sum(heads.values())
                unpacked += len(lengths) * (prefix + max(lengths))
    return 1 - packed / unpacked, packed


def test_saved_tokens_and_tokens_equal_a_slow_count(run):
    before = 0
    for line in lines(run):
        share, tokens = saved_share(run, range(before, line["step"]))
        assert line["saved_tokens_share"] == pytest.approx(share) and share > 0.05
        seconds = line["step_seconds"] * (line["step"] - before)
        assert line["tokens_per_second"] * seconds == pytest.approx(tokens)
        before = line["step"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_trace_of_every_rank(run, rank):
    folder = run.run_dir / "profile"
    assert len(list(folder.iterdir())) == 4
    with gzip.open(folder / f"rank-{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    for phase in ("data", "forward", "loss", "backward", "optimizer"):
        assert names.count(phase) == 3, phase
    # In each step: counts, read-outs, their gradients, the request to stop; in the sixth the log's sums besides.
    assert names.count("communication") == 3 * 4 + 1
    assert [name for name in names if name.startswith("step ")] == [f"step {n} of this process" for n in (4, 5, 6)]
    assert "aten::mm" in (folder / f"rank-{rank}.txt").read_text()


def test_a_trace_changes_no_bit(run):
    values = {**run.model_dump(), "name": "unprofiled"}
    values["train"] = {**values["train"], "profile": False}
    config = validate(values, "test")
    fill_store(config)
    run_gang(2, train, config)
    assert not (config.run_dir / "profile").exists()
    for found, expected in zip(lines(config), lines(run), strict=True):
        assert found.keys() == expected.keys()
        for key in expected.keys() - MEASURED:
            assert found[key] == expected[key], key


def test_frozen_linear_weights_in_four_bits(tmp_path):
    folder = save_student(tmp_path)
    assert linear_weights(started_student(folder, load_in_4bit=True)[0]) == linear_weights(started_student(folder)[0])
