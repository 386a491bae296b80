"""The shards of a stream are a function of its texts; a stream of any length needs the same memory."""

import json
import os
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
    with KeyTable() as table:
        assert [table.add(key) for key in (b"a", b"b", b"a")] == [True, True, False]
        assert table.setdefault("one", 1) == 1 and table.setdefault("two", 2) == 2
        assert table.setdefault("one", 3) == 1 and table.setdefault("two", 2) == 2


FULL = """
import json, sys
from flipkd_dist import temporary_database
from flipkd_dist.config import DataConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_stream import PairStream
from flipkd_dist.text_stream import windows

temporary_database.CACHE_KIB = 64
with open(sys.argv[1], "w") as file:
    for number in range(20_000):
        file.write(json.dumps({"id": f"pair {number}", "text_a": "a", "text_b": "b", "label": 1}) + "\\n")
pairs = PairStream(DataConfig(train=sys.argv[1]))
for full in windows(f"text {number}" for number in range(20_000)), pairs.texts(check_ids=True):
    try:
        list(full)
    except UserError as error:
        print(error)
"""


def test_a_full_disk_for_keys_is_one_line(small_disk, tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "pairs.jsonl")]
    there = {**os.environ, "SQLITE_TMPDIR": str(small_disk)}  # SQLite asks once a process
    done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("temporary index: database or disk is full: free") for line in lines)


DRIVER = """
import resource, sys
import numpy as np
from flipkd_dist import score_stage, text_stream
from flipkd_dist.config import DataConfig
from flipkd_dist.pair_stream import PairStream
from flipkd_dist.score import score, survey

class Stub:
    def is_complete(self, texts): return False
    def holds(self, texts): return np.zeros(len(texts), bool)
    def publish(self): pass

def peak(path):
    pairs = PairStream(DataConfig(train=path))
    num_texts, _ = survey(pairs.texts(check_ids=True), Stub())
    num_pairs = pairs.num_pairs["train"]
    summary = score(pairs.texts(), Stub(), lambda shards: (len(shard) for shard in shards), num_texts)
    assert num_texts == summary.num_new == 2 * num_pairs
    labelled = ((pair.text_a, pair.text_b, pair.label, pair.id) for pair in pairs.pairs("train"))
    found = score_stage.similarities(labelled, num_pairs, lambda a, b: np.ones(len(a), np.float32), 0)
    assert len(found.similarity) == num_pairs
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

score_stage.NUM_OFF_DIAGONAL = 1_000
text_stream.WINDOW = 8_192
few, many = map(peak, sys.argv[1:])
print(many - few)
"""


@pytest.mark.parametrize("num_pairs", [8_000, pytest.param(30_000, marks=pytest.mark.soak)])
def test_ten_times_the_pairs_need_no_more_memory(tmp_path, num_pairs):
    """Peak memory in MiB: the longer file's texts alone would be 45 MiB (170 MiB)."""
    paths = []
    for count in (num_pairs, 10 * num_pairs):
        paths.append(tmp_path / f"{count}.jsonl")
        with paths[-1].open("w") as file:
            for number in range(count):
                texts = {f"text_{side}": f"{side} {'words ' * 40}{number}" for side in "ab"}
                file.write(json.dumps({"id": f"pair {number}", **texts, "label": number % 2}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 24, done.stdout
