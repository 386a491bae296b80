"""Further checkpoints of an evaluation: their weights, and nothing else of them."""

from types import SimpleNamespace

import pytest
import torch

from flipkd_dist import evaluation
from flipkd_dist.checkpoint import best_checkpoints, save_checkpoint
from flipkd_dist.engine import PlainEngine
from flipkd_dist.slices import MOMENTS
from flipkd_dist.world import World


@pytest.fixture
def engine():
    model = torch.nn.Linear(3, 2)
    model.trained_parameters = lambda: dict(model.named_parameters())
    return PlainEngine(model, lambda parameters: torch.optim.AdamW(parameters, lr=0.1), 1.0)


def fill(engine, value: float) -> None:
    for part in engine.slices().values():
        for view in part.values.values():
            view.fill_(value)


def test_weights_alone_are_read_and_restored(tmp_path, engine, monkeypatch):
    for step in (1, 2):
        fill(engine, step)
        manifest = {"shapes": engine.shapes(), "score": step / 10, "probes": [0.5]}
        save_checkpoint(tmp_path, step, engine.slices(), {}, manifest, World())
    fill(engine, 9)
    asked, read = [], evaluation.best_checkpoints(tmp_path, 1)[0].__class__.read
    monkeypatch.setattr(
        "flipkd_dist.checkpoint.Checkpoint.read", lambda self, *wanted: asked.append(wanted[1:]) or read(self, *wanted)
    )
    config = SimpleNamespace(train=SimpleNamespace(test_checkpoints=2))
    inputs = SimpleNamespace(config=config, folder=SimpleNamespace(checkpoints=tmp_path))
    bench = SimpleNamespace(inputs=inputs, world=World(), engine=engine)
    assert list(evaluation._other_checkpoints(bench, best_checkpoints(tmp_path, 1)[0].step)) == [1]
    assert asked == [(("weight",),)]
    for part in engine.slices().values():
        assert (part.values["weight"] == 1).all() and all((part.values[moment] == 9).all() for moment in MOMENTS)
