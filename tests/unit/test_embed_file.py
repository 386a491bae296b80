"""The verb `embed`: rows in their order, formats, mistakes found early, whole files, a bounded memory."""

import os
import tracemalloc
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
from encoders import WIDTH, flipkd, made_up_vector, refused
from test_predict_file import write_jsonl

from flipkd_dist import embed_file
from flipkd_dist.text_encoder import EncoderChoice
from flipkd_dist.token_batches import WINDOW_PAIRS

pytestmark = pytest.mark.usefixtures("encoders")


def texts(count):
    return ({"id": f"n{n}", "text": f"text {n // 2} of many words", "n": n} for n in range(count))


def expected(count):
    return np.array([made_up_vector(one["text"]) for one in texts(count)])


def embed(monkeypatch, *options):
    return flipkd(monkeypatch, "embed", "adapter", *options)


def test_an_array_of_all_windows(encoders, monkeypatch, said):
    count = WINDOW_PAIRS + 11
    write_jsonl("in.jsonl", texts(count))
    assert embed(monkeypatch, "--input", "in.jsonl", "--output", "out.npy") == 0
    found = np.load("out.npy", mmap_mode="r", allow_pickle=False)
    assert found.dtype == np.float32 and np.array_equal(found, expected(count))
    assert encoders[0].calls == [WINDOW_PAIRS // 2, 6]  # each text of a window once
    assert sorted(os.listdir()) == ["adapter", "in.jsonl", "out.npy", "pairs"]
    assert f"{count} vectors of {WIDTH} numbers -> out.npy" in said


def test_parquet_has_names_where_records_have_them(monkeypatch):
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 10)
    records = list(texts(25))
    del records[7]["id"]
    write_jsonl("in.jsonl", records)
    assert embed(monkeypatch, "--input", "in.jsonl", "--output", "out.parquet") == 0
    table = pq.read_table("out.parquet")
    assert table["id"].to_pylist() == [record.get("id") for record in records]
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), expected(25))
    assert pq.ParquetFile("out.parquet").num_row_groups == 3
    assert embed(monkeypatch, "--input", "in.jsonl", "--output", "other.parquet", "--text", "text", "--id", "n") == 0
    assert pq.read_table("other.parquet")["id"].to_pylist() == [str(n) for n in range(25)]


MISTAKES = {
    "far down": ("in.jsonl:9: text is empty", ["--output", "o.npy"]),
    "no column": ("in.jsonl:1: no column body", ["--output", "o.npy", "--text", "body"]),
    "no name": ("in.jsonl:10: no column id", ["--output", "o.parquet", "--id", "id"]),
    "names of an array": ("--id: an array holds no names", ["--output", "o.npy", "--id", "id"]),
    "csv": ("--output o.csv: vectors are written as .npy or .parquet", ["--output", "o.csv"]),
    "other": ("o.txt: unknown extension", ["--output", "o.txt"]),
    "no folder": ("nowhere/o.npy: there is no folder", ["--output", "nowhere/o.npy"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_the_model_is_loaded(encoders, monkeypatch, capsys, mistake):
    where, options = MISTAKES[mistake]
    records = list(texts(10))
    records[8]["text"] = " " if mistake == "far down" else "a"
    if mistake == "no name":
        del records[9]["id"]
    write_jsonl("in.jsonl", records)
    before = sorted(os.listdir())
    refused(embed(monkeypatch, "--input", "in.jsonl", *options), capsys, where)
    assert not encoders and sorted(os.listdir()) == before


def test_a_text_without_tokens_and_an_empty_file(encoders, monkeypatch, capsys):
    write_jsonl("in.jsonl", [*texts(3), {"text": "a \ufffd"}])
    refused(
        embed(monkeypatch, "--input", "in.jsonl", "--output", "o.npy"), capsys, "in.jsonl:4: the student's tokenizer"
    )
    write_jsonl("in.jsonl", [])
    refused(embed(monkeypatch, "--input", "in.jsonl", "--output", "o.npy"), capsys, "--input in.jsonl: no texts in it")
    write_jsonl("in.parquet", [])
    refused(
        embed(monkeypatch, "--input", "in.parquet", "--output", "in.parquet"), capsys, "--output in.parquet: this is"
    )
    assert not encoders


def test_nothing_stays_of_an_output_that_failed(encoders, monkeypatch, tmp_path):
    write_jsonl("in.jsonl", texts(30))
    (tmp_path / "out.npy").write_text("of before")

    def fail(*_):
        raise RuntimeError("half way")

    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 10)
    monkeypatch.setattr("encoders.made_up_vector", lambda text: made_up_vector(text) if "14" not in text else fail())
    for name in ("out.npy", "out.parquet"):
        with pytest.raises(RuntimeError, match="half way"):
            embed_file.embed_file(EncoderChoice("adapter"), tmp_path / "in.jsonl", tmp_path / name)
    assert (tmp_path / "out.npy").read_text() == "of before"
    assert sorted(os.listdir()) == ["adapter", "in.jsonl", "out.npy", "pairs"]


@pytest.mark.parametrize("output", ["out.npy", "out.parquet"])
def test_an_input_that_changed_leaves_no_output(monkeypatch, tmp_path, capsys, output):
    write_jsonl("in.jsonl", texts(30))
    reads, read = [], embed_file.read_named

    def shorter(*given):
        reads.append(given)
        return islice(read(*given), 30 if len(reads) < 3 else 20)  # the first look, the check, the encoding

    monkeypatch.setattr(embed_file, "read_named", shorter)
    refused(embed(monkeypatch, "--input", "in.jsonl", "--output", output), capsys, "--input in.jsonl: 30 texts were ch")
    assert sorted(os.listdir()) == ["adapter", "in.jsonl", "pairs"]


@pytest.mark.parametrize("output", ["out.npy", "out.parquet"])
def test_memory_does_not_grow_with_the_input(monkeypatch, tmp_path, output):
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 200)
    monkeypatch.setattr("encoders.made_up_vector", lambda text: np.ones(WIDTH, np.float32))

    def peak(count):
        source = write_jsonl(tmp_path / "in.jsonl", texts(count))
        tracemalloc.start()
        try:
            embed_file.embed_file(EncoderChoice("adapter"), source, tmp_path / output)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # imports
    assert peak(4000) < 1.3 * peak(400)
