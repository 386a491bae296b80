"""Scores of pairs from one process against several, with the student whole on every rank or sharded by ZeRO-3."""

import numpy as np
import pytest
from gang import run_gang
from tiny import pair_table, save_student
from zero import start_engine

from flipkd_dist.batches import BatchMaker
from flipkd_dist.evaluate import pair_texts, student_scores
from flipkd_dist.world import World

pytestmark = pytest.mark.parity
BATCH_SIZE = 2


@pytest.fixture(scope="module", params=["glm", "qwen2"])
def folder(tmp_path_factory, request):
    """An output matrix of its own, and one that is tied to the embeddings."""
    return save_student(tmp_path_factory.mktemp("student"), request.param)


def score(folder, num_pairs, stage):
    """Scores, and how many forwards this rank ran for how many pairs."""
    world = World.current()
    engine, encoder = start_engine(folder, stage)
    make_batch = BatchMaker(encoder, engine.student, share_prefix=True)
    sizes = []

    def forward(**batch):
        sizes.append(len(batch["answer_positions"]))
        return engine.forward(**batch)

    texts = pair_texts(pair_table(num_pairs))
    return np.stack(student_scores(engine.student, world, make_batch, texts, BATCH_SIZE, forward=forward)), sizes


def one_by_one(folder, num_pairs):
    """Scores of each pair in a forward of its own, in the order of the pairs."""
    engine, encoder = start_engine(folder, 0)
    make_batch = BatchMaker(encoder, engine.student, share_prefix=False)
    texts = pair_texts(pair_table(num_pairs))
    return np.concatenate([student_scores(engine.student, World(), make_batch, [pair], 1) for pair in texts], axis=1)


@pytest.mark.parametrize(
    ("num_pairs", "world_size", "stage"),
    [(7, 1, 0), (7, 2, 0), (7, 4, 0), (5, 2, 0), (7, 1, 3), (7, 2, 3), (5, 2, 3), (1, 2, 3)],
)
def test_scores_do_not_depend_on_the_world(folder, num_pairs, world_size, stage):
    [expected] = run_gang(1, one_by_one, folder, num_pairs)
    ranks = run_gang(world_size, score, folder, num_pairs, stage)
    for scores, _ in ranks:
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert num_pairs == 1 or np.abs(np.diff(expected, axis=1)).min() > 1e-4  # a change of order would show
    sizes = [sizes for _, sizes in ranks]
    assert len({len(batches) for batches in sizes}) == 1  # equally many forwards everywhere
    most = -(-num_pairs // world_size)  # pairs of the rank that has the most of them
    assert len(sizes[0]) == -(-most // BATCH_SIZE)
    if (num_pairs, world_size) == (5, 2):
        assert sizes == [[2, 1], [2, 1]]  # two pairs and a dummy, three pairs
    if (num_pairs, world_size) == (1, 2):
        assert sizes == [[1], [1]]  # a dummy, a pair


def update_score_update(folder, stage):
    """Scores between two updates, with batches that differ in shape from those of training."""
    engine, encoder = start_engine(folder, stage)
    make_batch, texts = BatchMaker(encoder, engine.student, share_prefix=True), pair_texts(pair_table(5))
    engine.student.train()
    scores = []
    for _ in range(2):
        logits, a, b = engine.forward(**make_batch(texts[:3]).tensors("cpu"))
        engine.backward(logits.square().sum() + (a * b).sum(), last=True)
        engine.step(0.01)
        found = student_scores(engine.student, World.current(), make_batch, texts, BATCH_SIZE, forward=engine.forward)
        scores.append(np.stack(found))
    assert engine.student.training
    return scores, {name: value.numpy() for name, value in engine.trained_state().items()}


def test_training_goes_on_after_scoring(folder):
    [(scores, weights)] = run_gang(1, update_score_update, folder, 0)
    assert np.abs(scores[1] - scores[0]).max() > 1e-3
    for found, state in run_gang(2, update_score_update, folder, 3):
        np.testing.assert_allclose(found, scores, rtol=0, atol=1e-5)
        for name, value in weights.items():
            assert np.linalg.norm(state[name] - value) / np.linalg.norm(value) < 1e-5, name
