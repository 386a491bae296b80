"""The verb `pairs` on files: every format, the splits, exclusion, one-line errors, Banking77."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from flipkd_dist import pair_files
from flipkd_dist.config import DataConfig
from flipkd_dist.errors import UserError
from flipkd_dist.grouped_texts import normalise
from flipkd_dist.pair_command import pairs_command
from flipkd_dist.pair_files import read_records, write_records
from flipkd_dist.pairs import read_pairs

BANKING77 = Path(__file__).resolve().parents[3] / "shared/data/banking77"
RECORDS = [{"q": f"question {row}, of {row // 8}?", "topic": row // 8} for row in range(40)]
THIRDS = {"train": 0.5, "validation": 0.25, "test": 0.25}


def letters(texts):
    """A toy teacher: how often each letter stands in a text."""
    counts = np.array(
        [[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float
    )
    return counts / np.linalg.norm(counts, axis=1, keepdims=True).clip(1e-9)


def texts_of(path):
    return {normalise(record[column]) for _, record in read_records(path) for column in ("text_a", "text_b")}


@pytest.fixture
def source(tmp_path):
    write_records({tmp_path / "faq.jsonl": RECORDS})
    return tmp_path / "faq.jsonl"


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_holds_the_same_pairs(tmp_path, source, extension):
    write_records({tmp_path / f"copy.{extension}": RECORDS})
    pairs_command(source, "q", "topic", tmp_path / "expected.jsonl", 3)
    summary = pairs_command(tmp_path / f"copy.{extension}", "q", "topic", tmp_path / f"pairs.{extension}", 3)
    expected, found = (
        read_pairs(tmp_path / name, DataConfig(), "data.train") for name in ("expected.jsonl", f"pairs.{extension}")
    )
    assert found.texts == expected.texts and found.ids == expected.ids and found.kind == expected.kind
    assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("text_a", "label", "group_b"))
    kinds = {"positive": 80, "random": 40}
    assert summary["pairs"] == {str(tmp_path / f"pairs.{extension}"): kinds} and summary["groups"] == 5
    assert not list(tmp_path.glob(".*"))  # no temporary file stays


@pytest.mark.parametrize("by", ["text", "group"])
def test_splits_are_written_beside_and_share_no_text(tmp_path, source, by):
    split = THIRDS if by == "text" else {"train": 0.6, "test": 0.4}
    summary = pairs_command(source, "q", "topic", tmp_path / "faq.pairs.csv", 0, split, by, letters)
    paths = [tmp_path / f"faq.pairs.{name}.csv" for name in split]
    assert list(summary["pairs"]) == list(map(str, paths)) and not (tmp_path / "faq.pairs.csv").exists()
    spellings = [texts_of(path) for path in paths]
    assert len(set().union(*spellings)) == sum(map(len, spellings)) == 40
    together = read_pairs(list(map(str, paths)), DataConfig(), "data.train")  # ids do not clash
    assert set(together.kind) == {"positive", "random", "hard"}


def test_excluded_texts_do_not_appear(tmp_path, source):
    write_records({tmp_path / "other.csv": [{"q": "QUESTION 0 of 0", "topic": "z"}, {"q": "new", "topic": "z"}]})
    write_records({tmp_path / "pairs.tsv": [{"text_a": "question 9 of 1", "text_b": "?", "label": 0}]})
    exclude = [tmp_path / "other.csv", tmp_path / "pairs.tsv"]
    summary = pairs_command(source, "q", "topic", tmp_path / "out.jsonl", 0, exclude=exclude)
    assert summary["excluded"] == 2 and summary["texts_kept"] == 38
    assert not texts_of(tmp_path / "out.jsonl") & {"question 0 of 0", "question 9 of 1"}


def test_counts_of_what_is_left_out(tmp_path):
    extra = [{"q": "Question 1 of 0", "topic": 0}, {"q": "question 2 of 0", "topic": 4}]
    write_records({tmp_path / "faq.jsonl": RECORDS + extra})
    summary = pairs_command(
        tmp_path / "faq.jsonl", "q", "topic", tmp_path / "out.jsonl", 0, random_negatives_per_text=3
    )
    assert summary.pop("pairs") == {str(tmp_path / "out.jsonl"): {"positive": 78, "random": 117}}
    assert summary == dict(texts_read=42, texts_kept=39, excluded=0, repeated=1, ambiguous=2, groups=5)


def run(tmp_path, records, output="out.jsonl", text="q", group="topic", **more):
    """The one line that making pairs ends with; nothing may have been written."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        pairs_command(tmp_path / "in.jsonl", text, group, tmp_path / output, 0, **more)
    assert sorted(tmp_path.rglob("*")) == before and "\n" not in str(caught.value)
    return str(caught.value)


MISTAKES = {
    "text column": (RECORDS, dict(text="question"), "in.jsonl:1: no column question; it has q, topic", "--text"),
    "group column": (RECORDS, dict(group="topics"), "in.jsonl:1: no column topics", "--group"),
    "empty text": ([*RECORDS, {"q": " ", "topic": 1}], {}, "in.jsonl:41: q is empty", "fill it in"),
    "number as text": ([{"q": 5, "topic": 1}], {}, "in.jsonl:1: q is 5, not a text", "write a text"),
    "empty group": ([*RECORDS, {"q": "x", "topic": None}], {}, "in.jsonl:41: topic is empty", "fill it in"),
    "no texts": ([], {}, "in.jsonl: fewer than two groups in column topic", "add texts"),
    "one group": (RECORDS[:8], {}, "in.jsonl: fewer than two groups in column topic", "add texts"),
    "groups of one": (RECORDS[::8], {}, "in.jsonl: no group in column topic holds two distinct texts", "add texts"),
    "no non-match": (RECORDS, dict(random_negatives_per_text=0), "out.jsonl: too few texts", "more of them"),
    "small split": (RECORDS[4:12], dict(split=THIRDS), "out.test.jsonl: too few texts", "more of them"),
    "shares": (RECORDS, dict(split={"a": 0.5}), "split {'a': 0.5}: the shares must", "correct them"),
    "split name": (RECORDS, dict(split={"a/b": 1.0}), "split 'a/b': it becomes part of a file name", "use letters"),
    "extension": (RECORDS, dict(output="out.txt"), "out.txt: unknown extension '.txt'", "use .jsonl"),
    "no folder": (RECORDS, dict(output="no/out.csv"), "no/out.csv: there is no folder", "create it first"),
    "under a file": (RECORDS, dict(output="in.jsonl/out.csv"), "in.jsonl/out.csv: there is no folder", "create it"),
    "input": (RECORDS, dict(output="in.jsonl"), "in.jsonl: this file is an input", "name another"),
    "excluded": (RECORDS, dict(exclude=["no.csv"]), "no.csv: no such file", "check the path"),
}


@pytest.mark.parametrize("records, arguments, what, remedy", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path, records, arguments, what, remedy):
    text = run(tmp_path, records, **arguments)
    assert what in text and remedy in text.partition(what)[2]


def test_unwritable_output(tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").mkdir()
    assert "out.jsonl: this is a folder: name a file" in run(tmp_path, RECORDS)
    monkeypatch.setattr(pair_files.os, "access", lambda path, mode: False)
    assert "is not writable: name another" in run(tmp_path, RECORDS, "out.csv")
    monkeypatch.undo()

    def full_disk(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pair_files.os, "replace", full_disk)
    assert "out.csv: cannot be written (No space left on device): check" in run(tmp_path, RECORDS, "out.csv")


@pytest.mark.skipif(not BANKING77.is_dir(), reason="the Banking77 files are not here")
def test_banking77(tmp_path):
    test = pairs_command(
        BANKING77 / "test.csv",
        "text",
        "category",
        tmp_path / "test.csv",
        0,
        encode=letters,
        exclude=[BANKING77 / "train.csv"],
    )
    assert test["texts_read"] == 3080 and test["excluded"] == 25 and test["groups"] == 77
    train = pairs_command(BANKING77 / "train.csv", "text", "category", tmp_path / "train.csv", 0)
    assert train["texts_read"] == 10003 and train["texts_kept"] + train["repeated"] + train["ambiguous"] == 10003
    assert not texts_of(tmp_path / "train.csv") & texts_of(tmp_path / "test.csv")
    table = read_pairs(tmp_path / "test.csv", DataConfig(), "data.test")
    rows = np.flatnonzero(np.array(table.kind) == "hard")[:500]
    a, b = letters([table.texts[t] for t in table.text_a[rows]]), letters([table.texts[t] for t in table.text_b[rows]])
    assert (a * b).sum(1).mean() > (a @ b.T).mean() + 0.1  # hard negatives are near, by this teacher
    every = np.arange(200)
    same_group = table.group_a[every][:, None] == table.group_b[every]
    assert np.array_equal(
        table.known_match(every, every) & ~np.eye(200, dtype=bool), same_group & ~np.eye(200, dtype=bool)
    )


@pytest.mark.skipif(not BANKING77.is_dir(), reason="the Banking77 files are not here")
def test_banking77_lines_are_right():
    with open(BANKING77 / "train.csv", encoding="utf-8") as file:
        lines = file.read().split("\n")
    for number, record in read_records(BANKING77 / "train.csv"):
        # A record may span lines; its first line begins with the beginning of its text.
        first = next(csv.reader([lines[number - 1]]))[0]
        assert record["text"].startswith(first.split("\n")[0])
