"""An adapter that ZeRO-3 trained, in plain PEFT on the whole base."""

import numpy as np
import pytest
from gang import run_gang
from peft_reference import CARD, plain_peft
from tiny import pair_table, save_student
from zero import start_engine

from flipkd_dist.adapter import save_adapter
from flipkd_dist.batches import BatchMaker
from flipkd_dist.evaluate import pair_texts, student_scores
from flipkd_dist.world import World

pytestmark = pytest.mark.parity
TEXTS = pair_texts(pair_table(5))


def train_and_save(folder, target):
    """Scores before an update and after it; rank 0 leaves the adapter in `target`."""
    engine, encoder = start_engine(folder, 3)
    world, make_batch = World.current(), BatchMaker(encoder, engine.student, share_prefix=True)

    def scores():
        return student_scores(engine.student, world, make_batch, TEXTS, 8, forward=engine.forward)[0]

    before = scores()
    engine.student.train()
    logits, *_ = engine.forward(**make_batch(TEXTS[world.rank :: world.size]).tensors("cpu"))
    engine.backward(logits[:, 0].sum(), last=True)
    engine.step(0.05)
    state = engine.trained_state()
    if world.is_main:
        save_adapter(target, engine.student, state, encoder.tokenizer, CARD)
    return before, scores()


@pytest.mark.parametrize("family", ["glm", "qwen2"])
def test_plain_peft_answers_like_the_shards(tmp_path, family):
    folder = save_student(tmp_path / "base", family)
    (before, after), (_, other) = run_gang(2, train_and_save, folder, tmp_path / "adapter")
    np.testing.assert_allclose(plain_peft(folder, tmp_path / "adapter", TEXTS), after, rtol=0, atol=1e-6)
    assert np.abs(after - before).max() > 1e-3 and np.array_equal(after, other)
