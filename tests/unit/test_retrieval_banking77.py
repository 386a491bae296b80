"""The benchmark of retrieval: names of intents, draws, and rows that are not measured twice."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from encoders import made_up_vector
from test_predict_file import write_jsonl

from flipkd_dist.errors import UserError

PATH = Path(__file__).parents[2] / "benchmarks" / "retrieval_banking77.py"
TEXTS = [{"text": f"{n % 3} of some {n}", "category": ("lost card", "pin", "fee")[n % 3]} for n in range(30)]


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("retrieval_banking77", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_intents_are_one_a_line(benchmark, tmp_path):
    source, names = write_jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "names.txt"
    names.write_text("lost card\n\n fee \n")
    kept = benchmark.chosen_texts(source, "text", "category", names)
    assert len(kept) == 20 and {one.name for one in kept} == {"lost card", "fee"}
    names.write_text("lost card\nrates\nlost\n")
    with pytest.raises(UserError, match=r"no text of lost, rates in .*: correct"):
        benchmark.chosen_texts(source, "text", "category", names)


def test_a_text_of_each_intent_is_searched_by_the_others(benchmark):
    groups = np.arange(30) % 3
    assert [groups[row] for row in benchmark.drawn(groups, 4)] == [0, 1, 2]
    assert not np.array_equal(benchmark.drawn(groups, 4), benchmark.drawn(groups, 5))
    vectors = np.array([made_up_vector(one["text"]) for one in TEXTS])
    assert benchmark.searched(vectors, groups, 0) == dict.fromkeys(benchmark.METRICS, 1.0)
    turned = benchmark.searched(vectors, np.random.default_rng(0).permutation(groups), 0)
    assert turned["recall@1"] < 0.8


def test_a_row_is_measured_once_for_an_encoder(benchmark, encoders, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    texts, table = benchmark.chosen_texts(source, "text", "category", None), tmp_path / "out" / "table.json"
    with pytest.raises(UserError, match="nowhere"):
        benchmark.rows({"one": "adapter", "two": "nowhere"}, texts, 2, table)
    assert not encoders
    for _ in range(2):
        found = benchmark.rows({"one": "adapter"}, texts, 2, table)
    assert [sum(one.calls) for one in encoders] == [30] and found == json.loads(table.read_text())
    assert found["one"]["recall@1"] == [1.0, 1.0] and len(found["one"]["v_measure"]) == 2
    benchmark.rows({"one": "adapter"}, texts, 3, table)
    assert len(encoders) == 2
