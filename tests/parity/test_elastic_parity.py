"""Workers that come and go give the weights and the losses of workers that were left alone."""

import json
import logging
import shutil
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import torch
from gang import run_gang
from safetensors.torch import load_file
from tiny import fill_store, save_student, save_teacher, write_pairs

from flipkd_dist.checkpoint import newest_checkpoint
from flipkd_dist.chunks import ChunkedMicroStep
from flipkd_dist.config import RunConfig, validate
from flipkd_dist.errors import StoppedOnRequest
from flipkd_dist.metric_log import MetricLog
from flipkd_dist.progress import Progress
from flipkd_dist.step import TrainingStep
from flipkd_dist.train import train

pytestmark = pytest.mark.parity
STEPS = 6  # of two contrast batches of eight; in every third step the first has five pairs, the second none
TOLERANCE = 1e-5  # of a tensor's norm in fp32: sums in another order


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> RunConfig:
    """A configuration whose teacher's store is filled."""
    folder = tmp_path_factory.mktemp("elastic")
    for stage in (1, 2, 3):
        # A threshold above 0 would leave so small a model whole on every rank.
        policy = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        (folder / f"zero{stage}.json").write_text(json.dumps(policy))
    values = {
        "name": "prepared",
        "output_dir": str(folder),
        "data": {"train": write_pairs(folder / "train.jsonl", 37, 0), "max_length": 64},
        "teacher": {"model_name_or_path": str(save_teacher(folder / "teacher")), "max_length": 32},
        "student": {
            "model_name_or_path": str(save_student(folder / "student")),
            "prompt": "same ? {text_a} | {text_b} =",
            "answers": ["yes", "no"],
            "lora_dropout": 0.0,  # other ranks draw other numbers
        },
        "loss": {"threshold": None},
        "train": {
            "max_steps": STEPS,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "eval_steps": STEPS,
            "logging_steps": 1,
        },
        "distributed": {"timeout_s": 60},
    }
    config = validate(values, "test")
    fill_store(config)
    return config


def run_config(
    prepared: RunConfig, name: str, workers: int | list[int], stage: int, optimizer: str = "adamw"
) -> RunConfig:
    """The prepared run under another name; contrast batches of eight pairs."""
    values = prepared.model_dump()
    values["name"] = name
    most = workers if isinstance(workers, int) else workers[1]
    values["train"]["per_device_train_batch_size"] = 8 // most
    if optimizer == "sgd":
        values["train"] |= {"learning_rate": 0.5, "max_grad_norm": 0.0, "weight_decay": 0.0}
    values["distributed"] |= {"num_workers": workers, "deepspeed": f"{prepared.output_dir}/zero{stage}.json"}
    config = validate(values, "test")
    shutil.copytree(prepared.run_dir / "teacher", config.run_dir / "teacher")
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    return config


def attempt(config: RunConfig, optimizer: str, until: int) -> dict:
    """Train from where the last attempt ended until a stop after step `until`; runs in forked processes alone."""
    seen = {"chunked": 0, "said": []}
    resume, add, run_step = Progress.resume, MetricLog.add, TrainingStep.__call__

    def begin(progress):
        seen["first"] = resume(progress)
        return seen["first"]

    def add_and_ask(log, number, *rest):
        add(log, number, *rest)
        if number == until < STEPS:
            (config.run_dir / "stop").touch()

    def count(step, micro_steps, rate):
        seen["chunked"] += sum(isinstance(micro, ChunkedMicroStep) for micro in micro_steps)
        return run_step(step, micro_steps, rate)

    Progress.resume, MetricLog.add, TrainingStep.__call__ = begin, add_and_ask, count
    if optimizer == "sgd":
        torch.optim.AdamW.step = descend
    handler = logging.Handler()
    handler.emit = lambda record: seen["said"].append(record.getMessage())
    logging.getLogger("flipkd_dist").addHandler(handler)
    logging.getLogger("flipkd_dist").setLevel(logging.INFO)
    with suppress(StoppedOnRequest):
        train(config)
    return seen


@torch.no_grad()
def descend(optimizer: torch.optim.AdamW, closure=None) -> None:
    """Plain SGD in AdamW's place, which would hide a wrong scale of the gradient; its moments are there and zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            parameter.add_(parameter.grad, alpha=-group["lr"])


def go_on(config: RunConfig, workers: int, optimizer: str, until: int) -> dict:
    (config.run_dir / "stop").unlink(missing_ok=True)
    [main, *others] = run_gang(workers, attempt, config, optimizer, until)
    assert all(rank["first"] == main["first"] and rank["chunked"] == main["chunked"] for rank in others)
    found = newest_checkpoint(config.run_dir / "checkpoints")
    assert found.step == until and found.manifest["world_size"] == workers
    return main


def weights(config: RunConfig) -> dict[str, np.ndarray]:
    return {
        key: value.numpy() for key, value in load_file(config.run_dir / "adapter/adapter_model.safetensors").items()
    }


def lines(config: RunConfig) -> list[dict]:
    """Of the steps in metrics.jsonl."""
    found = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def compare(config: RunConfig, expected: RunConfig) -> None:
    found, wanted = weights(config), weights(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.linalg.norm(found[name] - value) < TOLERANCE * np.linalg.norm(value), name
    steps = lines(expected)
    assert [line["step"] for line in lines(config)] == list(range(1, STEPS + 1)) == [line["step"] for line in steps]
    for line, undisturbed in zip(lines(config), steps, strict=True):
        for key in ("loss", "loss_sup", "loss_dist", "loss_mcl", "grad_norm", "learning_rate", "epoch", "accuracy"):
            np.testing.assert_allclose(line[key], undisturbed[key], rtol=TOLERANCE, err_msg=f"{line['step']}: {key}")


@pytest.fixture(scope="module")
def undisturbed(prepared):
    """Two workers at a fixed number, under the stage that is asked for: AdamW sees rounding where gradients vanish."""

    @cache
    def run(stage: int, optimizer: str) -> RunConfig:
        config = run_config(prepared, f"undisturbed-{stage}-{optimizer}", 2, stage, optimizer)
        assert go_on(config, 2, optimizer, STEPS)["chunked"] == 0
        return config

    return run


@pytest.mark.parametrize(
    ("workers", "stage", "optimizer", "chunked"),
    [
        ([1, 2], 1, "adamw", 3),  # contrast batches that fewer workers take in chunks: eight, eight and five pairs
        ([1, 2], 2, "sgd", 3),
        ([1, 2], 3, "adamw", 3),
        ([1, 2], 3, "sgd", 3),
        ([3, 4], 3, "sgd", 2),  # five pairs are two at most for each of three workers: no chunks
    ],
)
def test_workers_that_are_lost_and_return(prepared, undisturbed, workers, stage, optimizer, chunked):
    """The most, then the least, then the most again."""
    least, most = workers
    config = run_config(prepared, f"range-{most}-{stage}-{optimizer}", workers, stage, optimizer)
    assert go_on(config, most, optimizer, 2)["chunked"] == 0
    fewer = go_on(config, least, optimizer, 4)
    assert (fewer["first"], fewer["chunked"]) == (2, chunked)
    kept, chunks = "contrast batches of 8 pairs as before", f"in chunks of at most {8 // most} pairs on each worker"
    counted = "1 worker" if least == 1 else f"{least} workers"
    assert f"train: resumed by {counted} in place of {most}: {kept}, {chunks}" in fewer["said"]
    again = go_on(config, most, optimizer, STEPS)
    assert (again["first"], again["chunked"]) == (4, 0)
    assert f"train: resumed by {most} workers in place of {least}: {kept}" in again["said"]
    compare(config, undisturbed(stage, optimizer))
