"""Metrics of rankings against their definitions and against scikit-learn, with many equal scores."""

import numpy as np
import pytest
from retrieval_reference import reference_metrics, reference_order
from sklearn.metrics import average_precision_score, ndcg_score

from flipkd_dist.retrieval_metrics import names, query_metrics


def random_case(seed, num_documents=150, listed=120):
    """Judgements and a run in which most scores stand several times; some judged documents are not listed."""
    draw = np.random.default_rng(seed)
    ids = [f"{'dé🔑'[n % 3]}{n}" for n in range(num_documents)]
    draw.shuffle(ids)
    grades = {name: int(draw.integers(-1, 4)) for name in draw.choice(ids, 30, replace=False)}
    grades[ids[0]] = 1
    scores = np.round(draw.normal(size=listed), int(draw.integers(0, 3)))
    scores += draw.choice([0, 1e-10], listed)  # which float32 does not see beside most of them
    return grades, dict(zip(ids, scores.tolist(), strict=False))


@pytest.mark.parametrize("top_k", [100, 120])
def test_definitions_on_random_rankings_with_ties(top_k):
    cases = {f"q{seed}": random_case(seed) for seed in range(60)}
    judged = {query: grades for query, (grades, _) in cases.items()}
    run = {query: scores for query, (_, scores) in cases.items()}
    found = list(query_metrics(judged, run, top_k))
    assert len(found) == len(cases)
    assert sum(len({*scores.values()}) < len(scores) for scores in run.values()) == len(cases)  # ties in all
    for query, values in zip(cases, found, strict=True):
        expected = reference_metrics(reference_order(run[query]), judged[query])
        assert values == pytest.approx(expected, rel=1e-12, abs=1e-12), query
    assert len({round(values["mrr@10"], 6) for values in found}) > 3


def test_scikit_learn_agrees():
    """Of complete rankings, in the order in which ties are broken; it has neither recall nor reciprocal ranks."""
    for seed in range(40):
        grades, scores = random_case(seed, listed=150)
        grades = {name: max(grade, 0) for name, grade in grades.items()}
        order = reference_order(scores)
        gains, falling = np.array([[grades.get(name, 0) for name in order]]), -np.arange(len(order))[None]
        [found] = query_metrics({"q": grades}, {"q": scores}, 150)
        assert found["ndcg@10"] == pytest.approx(ndcg_score(gains, falling, k=10, ignore_ties=True), rel=1e-9)
        assert found["map"] == pytest.approx(average_precision_score(gains[0] > 0, falling[0]), rel=1e-9)


def test_the_first_ten_alone_count_for_the_reciprocal_rank():
    run = {f"d{n:02}": float(-n) for n in range(12)}
    for place, expected in ((1, 1.0), (10, 0.1), (11, 0.0)):
        [found] = query_metrics({"q": {f"d{place - 1:02}": 1}}, {"q": run}, 100)
        assert found["mrr@10"] == pytest.approx(expected, abs=1e-12)


def test_nothing_found_and_short_lists():
    [found] = query_metrics({"q": {"a": 2}}, {}, 50)
    assert found == dict.fromkeys(names(50), 0.0)
    assert names(50) == ["ndcg@10", "mrr@10", "map", "recall@1", "recall@10"]
    assert names(100)[-1] == "recall@100"
