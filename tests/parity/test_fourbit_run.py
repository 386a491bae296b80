"""Training on a four-bit base over two ranks of ZeRO-3, and what its adapter answers afterwards in one process."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from gang import run_gang
from tiny import fill_store, save_student, save_teacher, write_pairs

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.config import RunConfig
from flipkd_dist.evaluation import evaluate
from flipkd_dist.predict import Matcher
from flipkd_dist.run_folder import read_json, write_json
from flipkd_dist.train import train

pytestmark = pytest.mark.parity


def work(config: RunConfig):
    """Training and evaluation as in a worker; the log of this rank, and each rank's reading of its own adapter."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("flipkd_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    train(config)
    evaluate(config)
    return lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = {split: write_pairs(folder / f"{split}.jsonl", 20, seed) for seed, split in enumerate(("train", "test"))}
    student = {
        "model_name_or_path": str(save_student(folder / "student")),
        "prompt": "same ? {text_a} | {text_b} =",
        "answers": ["yes", "no"],
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    }
    config = RunConfig(
        name="tiny",
        output_dir=str(folder / "runs"),
        data={**data, "max_length": 64},
        teacher={"model_name_or_path": str(save_teacher(folder / "teacher")), "max_length": 32},
        student=student,
        loss={"threshold": None},
        train={"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
    )
    fill_store(config)
    logs = run_gang(2, work, config)
    return config, logs


def test_the_first_forward_is_checked_without_being_asked_for(run):
    _, (main, other) = run
    assert any(line.startswith("the first forward equals an unsharded one up to ") for line in main)
    assert not any("first forward" in line for line in other)
    assert any(line.startswith("adapter/ holds step 4") for line in main)


def test_the_adapter_says_how_its_base_was_loaded_and_answers_with_it(run):
    config, _ = run
    folder = config.run_dir / "adapter"
    card = AdapterCard.read(folder)
    assert (card.load_in_4bit, card.bnb_4bit_quant_type, card.bnb_4bit_use_double_quant) == (True, "fp4", False)
    records = [json.loads(line) for line in Path(config.data.test).read_text().splitlines()]
    texts = [(record["text_a"], record["text_b"]) for record in records]
    found, _ = Matcher(folder).predict(texts)
    np.testing.assert_allclose(Matcher(folder, streamed=True).predict(texts)[0], found, rtol=0, atol=1e-6)
    lines = (config.run_dir / "predictions-test.jsonl").read_text().splitlines()
    np.testing.assert_allclose(found, [json.loads(line)["student"] for line in lines], rtol=0, atol=1e-5)
    assert np.std(found) > 1e-4


@pytest.mark.parametrize("change", [{"load_in_4bit": False}, {"bnb_4bit_quant_type": "nf4"}])
def test_another_base_than_that_of_training_is_noticed_by_the_probe(run, change):
    config, _ = run
    path = config.run_dir / "adapter" / "flipkd.json"
    card = read_json(path)
    try:
        write_json(path, {**card, **change})
        with pytest.raises(RuntimeError, match="the adapter answers its probe pair with"):
            Matcher(path.parent)
    finally:
        write_json(path, card)
