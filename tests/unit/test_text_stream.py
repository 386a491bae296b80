"""The shards of a stream are a function of its texts; a stream of any length needs the same memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flipkd_dist import text_stream
from flipkd_dist.key_table import KeyTable
from flipkd_dist.text_stream import LARGEST, MULTIPLE, WINDOW, shard_size, shards, windows

ROOT = Path(__file__).resolve().parents[2]


def test_windows_hold_first_occurrences_in_the_order_of_the_stream(monkeypatch):
    monkeypatch.setattr(text_stream, "WINDOW", 3)
    assert list(windows(["a", "b", "a", "c", "b", " a ", "d", "c", "e"])) == [["a", "b", "c"], ["d", "e"]]
    assert list(windows([])) == []


def test_long_texts_close_a_window_early(monkeypatch):
    monkeypatch.setattr(text_stream, "WINDOW_CHARACTERS", 10)
    assert list(windows(["a" * 6, "b" * 6, "c"])) == [["a" * 6, "b" * 6], ["c"]]


def test_shards_are_sorted_by_length_and_do_not_depend_on_the_order_within_the_window():
    texts = [f"{'x' * (number % 9)}{number}" for number in range(300)]
    found = list(shards(texts))
    assert found == list(shards(texts[::-1]))
    assert sorted(text for shard in found for text in shard) == sorted(texts)
    lengths = [len(text) for shard in found for text in shard]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(shard) for shard in found] == [64, 64, 64, 64, 44]


@pytest.mark.parametrize(
    "num_texts, size", [(1, 64), (2048, 64), (2049, 128), (20_000, 640), (WINDOW, LARGEST), (10 * WINDOW, LARGEST)]
)
def test_a_small_job_has_many_shards_and_a_large_one_large_ones(num_texts, size):
    assert shard_size(num_texts) == size and size % MULTIPLE == 0


def test_key_table_keeps_what_came_first():
    table = KeyTable()
    assert [table.add(key) for key in (b"a", b"b", b"a")] == [True, True, False]
    assert table.setdefault("one", 1) == 1 and table.setdefault("two", 2) == 2
    assert table.setdefault("one", 3) == 1 and table.setdefault("two", 2) == 2


DRIVER = """
import resource, sys
import numpy as np
from flipkd_dist.config import DataConfig
from flipkd_dist.pair_stream import PairStream
from flipkd_dist.text_stream import shards, windows

def peak(path):
    pairs = PairStream(DataConfig(train=path))
    num_texts = sum(map(len, windows(pairs.texts(check_ids=True))))
    num_sharded = sum(len(shard) for window in windows(pairs.texts()) for shard in shards(window))
    assert num_texts == num_sharded == 2 * pairs.num_pairs["train"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

few, many = map(peak, sys.argv[1:])
print(many - few)
"""


def test_ten_times_the_pairs_need_no_more_memory(tmp_path):
    """Peak memory of the driver in MiB: the texts of the long file alone are 60 MiB, its ids and places more."""
    paths = []
    for count in (36_000, 360_000):
        paths.append(tmp_path / f"{count}.jsonl")
        with paths[-1].open("w") as file:
            for number in range(count):
                texts = {f"text_{side}": f"{side} {'words ' * 12}{number}" for side in "ab"}
                file.write(json.dumps({"id": f"pair {number}", **texts, "label": number % 2}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 64, done.stdout
