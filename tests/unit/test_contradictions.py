"""The most contradictory pairs, whatever the chunks are."""

import numpy as np
import pytest

from flipkd_dist.contradictions import ContradictoryPairs


def found(similarity, label, chunk, limit=20):
    pairs = ContradictoryPairs(limit)
    names = [str(number) for number in range(len(label))]
    for at in range(0, len(label), chunk):
        part = slice(at, at + chunk)
        texts = [f"a{name}" for name in names[part]], [f"b{name}" for name in names[part]]
        pairs.add(similarity[part], label[part], *texts, names[part])
    return pairs.worst()


@pytest.mark.parametrize("chunk", [1, 7, 20, 21, 500])
def test_chunks_change_nothing_and_ties_go_to_the_first(chunk):
    generator = np.random.default_rng(0)
    similarity = generator.integers(0, 9, 500) / 8  # many ties
    label = generator.integers(0, 2, 500)
    gap = np.abs(label - similarity)
    expected = np.lexsort((np.arange(500), -gap))[:20]
    pairs = found(similarity, label, chunk)
    assert [int(pair.id) for pair in pairs] == expected.tolist()
    assert [(pair.text_a, pair.text_b) for pair in pairs] == [(f"a{n}", f"b{n}") for n in expected]
    assert [pair.gap for pair in pairs] == gap[expected].tolist()
    assert {pair.label for pair in pairs} == {0, 1}


def test_few_pairs_and_none():
    assert found(np.zeros(0), np.zeros(0, int), 5) == []
    (first, second) = found(np.array([0.9, 0.2], np.float32), np.array([1, 1]), 5)
    assert (first.similarity, first.label, first.id) == (pytest.approx(0.2), 1, "1") and second.id == "0"


def test_what_is_not_finite_is_passed_over():
    pairs = found(np.array([np.nan, 0.4, np.inf, 0.3]), np.array([1, 1, 1, 1]), 2, limit=3)
    assert [pair.id for pair in pairs] == ["3", "1"]


def test_only_texts_that_are_kept_are_read():
    class Texts(list):
        reads = 0

        def __getitem__(self, row):
            Texts.reads += 1
            return super().__getitem__(row)

    texts = Texts("t" for _ in range(10_000))
    ContradictoryPairs(3).add(np.linspace(0, 1, 10_000), np.ones(10_000), texts, texts)
    assert Texts.reads == 6
