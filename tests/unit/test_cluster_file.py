"""The verb `cluster`: groups that vectors show are found, others are not; seeds, batches, mistakes."""

import json
from itertools import islice

import numpy as np
import pytest
from encoders import FACTS, flipkd, refused
from test_predict_file import write_jsonl

from flipkd_dist import cluster_file

pytestmark = pytest.mark.usefixtures("encoders")


def cluster(monkeypatch, *options):
    return flipkd(monkeypatch, "cluster", "adapter", "--input", "in.jsonl", *options)


def grouped(count, groups, seen=True):
    """With `seen` the first three words, which the made-up encoder reads, tell the group."""
    draw = np.random.default_rng(0)
    for n in range(count):
        group = int(draw.integers(groups))
        yield {"text": f"group {group if seen else n} has {n}", "group": group}


def test_groups_that_vectors_show(encoders, monkeypatch, capsys):
    write_jsonl("in.jsonl", grouped(200, 6))
    assert cluster(monkeypatch, "--json", "--seeds", 3) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["texts"], found["groups"], found["seeds"]) == (200, 6, 3)
    assert found["encoder"] == {"name": "adapter", **FACTS}
    assert found["mean"] == pytest.approx(dict.fromkeys(cluster_file.METRICS, 1.0))
    assert found["standard_deviation"] == pytest.approx(dict.fromkeys(cluster_file.METRICS, 0.0))
    write_jsonl("in.jsonl", grouped(200, 6, seen=False))
    assert cluster(monkeypatch, "--json", "--seeds", 3) == 0
    other = json.loads(capsys.readouterr().out)
    assert abs(other["mean"]["adjusted_rand"]) < 0.05 and other["mean"]["v_measure"] < 0.3
    assert other["standard_deviation"]["v_measure"] > 0
    assert cluster(monkeypatch, "--seeds", 3) == 0
    assert f"v_measure      {other['mean']['v_measure']:.4f} +-" in capsys.readouterr().out


def test_other_columns_and_seeds(monkeypatch, capsys):
    write_jsonl("in.jsonl", [{"q": f"{n % 3} a b", "intent": n % 3} for n in range(30)])
    assert cluster(monkeypatch, "--text", "q", "--group", "intent", "--seeds", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"] == 3 and found["standard_deviation"]["v_measure"] == 0


@pytest.mark.parametrize("many", [20_000, 100])
def test_clusters_of_few_and_of_many(monkeypatch, many):
    monkeypatch.setattr(cluster_file, "MANY", many)
    monkeypatch.setattr(cluster_file, "BATCH", 64)
    centres = np.eye(5, dtype=np.float32)
    groups = np.random.default_rng(0).integers(5, size=500)
    vectors = centres[groups] + np.random.default_rng(1).normal(0, 0.02, (500, 5)).astype(np.float32)
    found = cluster_file.clusters(vectors, 5, seed=3)
    assert cluster_file.agreement(groups, found) == pytest.approx((1, 1, 1, 1))
    assert np.array_equal(found, cluster_file.clusters(vectors, 5, seed=3))


def test_agreement_by_hand():
    """Two groups, one of them in two clusters: nothing is mixed, completeness is H(groups) / H(clusters)."""
    v_measure, homogeneity, completeness, rand = cluster_file.agreement(np.array([0, 0, 1, 1]), np.array([5, 5, 2, 3]))
    assert homogeneity == pytest.approx(1) and completeness == pytest.approx(2 / 3) and v_measure == pytest.approx(0.8)
    assert rand == pytest.approx(4 / 7)  # 1 pair together in both, expected 1/3, largest (2 + 1) / 2


@pytest.mark.parametrize("second", [150, 250])
def test_an_input_that_changed(monkeypatch, capsys, second):
    write_jsonl("in.jsonl", grouped(300, 6))
    counts, read = [200, second], cluster_file.read_grouped
    monkeypatch.setattr(cluster_file, "read_grouped", lambda *given: islice(read(*given), counts.pop(0)))
    refused(cluster(monkeypatch), capsys, "--input in.jsonl: 200 texts were checked and")


MISTAKES = {
    "one group": ([{"text": "a", "group": 1}] * 3, "--input in.jsonl: 1 groups in column group"),
    "all alone": ([{"text": "a", "group": n} for n in range(3)], "--input in.jsonl: every text has a group of its own"),
    "no group": ([{"text": "a", "group": 1}, {"text": "b"}], "in.jsonl:2: no column group"),
    "no tokens": ([{"text": "a", "group": 1}, {"text": "\ufffd", "group": 1}], "in.jsonl:2: the student's tokenizer"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(encoders, monkeypatch, capsys, mistake):
    records, where = MISTAKES[mistake]
    write_jsonl("in.jsonl", records)
    refused(cluster(monkeypatch), capsys, where)
    assert not encoders
