"""Pairs read from every format, every mistake in a file as one line, and the pairs known to match."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd_dist import pairs as pairs_module
from flipkd_dist.config import DataConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_files import read_records, write_records
from flipkd_dist.pairs import PairTable, read_pairs

RECORDS = [
    {"id": "p1", "text_a": "Où est ma carte?", "text_b": "my card, where?", "label": 1, "group_a": "x", "group_b": "x"},
    {"id": "p2", "text_a": 'say "hi"\nthere', "text_b": "a\ttab", "label": 0, "group_a": "x", "group_b": "y"},
    {"id": "p3", "text_a": "a\ttab", "text_b": "Où est ma carte?", "label": 0, "group_a": "y", "group_b": ""},
]
HEADER = b"text_a,text_b,label\n"
GOOD = b'{"text_a": "a", "text_b": "b", "label": 1}\n'


def message(paths, key="data.train", **data):
    """The one line that reading ends with."""
    with pytest.raises(UserError) as caught:
        read_pairs(paths, DataConfig(**data), key)
    text = str(caught.value)
    assert text.startswith(f"{key}: ") and "\n" not in text
    return text


def pair(**changes):
    return json.dumps({"text_a": "a", "text_b": "b", "label": 1} | changes).encode() + b"\n"


def columns(table):
    return {name: getattr(table, name) for name in PairTable.__dataclass_fields__}


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_table(tmp_path, extension):
    path = tmp_path / f"pairs.{extension}"
    write_records({path: RECORDS})
    table = read_pairs(str(path), DataConfig(), "data.train")
    assert len(table) == 3 and table.texts == ["Où est ma carte?", "my card, where?", 'say "hi"\nthere', "a\ttab"]
    expected = dict(text_a=[0, 2, 3], text_b=[1, 3, 0], label=[1, 0, 0], group_a=[0, 0, 1], group_b=[0, 1, -1])
    for name, values in expected.items():
        assert getattr(table, name).dtype == np.int64 and getattr(table, name).tolist() == values, name
    assert table.ids == ["p1", "p2", "p3"] and table.kind == [""] * 3


def test_the_given_format_beats_the_extension(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_bytes(b"\xef\xbb\xbftext_a\ttext_b\tlabel\r\na\tb\t1\r\n")  # a BOM and Windows line ends
    assert read_pairs(path, DataConfig(format="tsv"), "data.train").texts == ["a", "b"]


def test_files_are_read_one_after_the_other_and_share_texts_and_groups(tmp_path):
    for folder, record in (("one", pair(group_a=7)), ("two", pair(text_a="c", group_b="7", kind="hard"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pairs.jsonl").write_bytes(b"\n" + record)
    paths = [str(tmp_path / folder / "pairs.jsonl") for folder in ("one", "two")]
    table = read_pairs(paths, DataConfig(), "data.train")
    assert table.texts == ["a", "b", "c"] and table.text_a.tolist() == [0, 2]
    assert table.group_a.tolist() == [0, -1] and table.group_b.tolist() == [-1, 0] and table.kind == ["", "hard"]
    assert table.ids == [f"{path}:2" for path in paths]  # equal stems: the paths tell them apart
    assert read_pairs(paths[0], DataConfig(), "data.train").ids == ["pairs:2"]


def test_other_column_names(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"q,r, same\n  a ,b,1\n")
    table = read_pairs(tmp_path / "p.csv", DataConfig(text_a="q", text_b="r", label="same"), "data.test")
    assert table.texts == ["a", "b"] and table.label.tolist() == [1]


@pytest.mark.parametrize("spelling", [1, "1", 1.0, "1.0", True, "true", "True", " 1 "])
def test_spellings_of_a_match(tmp_path, spelling):
    (tmp_path / "p.jsonl").write_bytes(pair(label=spelling) + pair(label=0) + pair(label="false") + pair(label=0.0))
    assert read_pairs(tmp_path / "p.jsonl", DataConfig(), "data.train").label.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "missing, expected", [(None, -1), ("", -1), (float("nan"), -1), ("g", 0), (3.0, 1), ("3", 1), (3, 1)]
)
def test_missing_and_numeric_groups(tmp_path, missing, expected):
    (tmp_path / "p.jsonl").write_bytes(pair(group_a="g", group_b=3) + pair(group_a=missing))
    assert read_pairs(tmp_path / "p.jsonl", DataConfig(), "data.train").group_a[1] == expected


JSONL_MISTAKES = {
    "broken JSON": (GOOD + b'\n{"text_a": "a",\n', ":3: broken JSON", "write one JSON object a line"),
    "deep JSON": (GOOD + b"[" * 200_000, ":2: broken JSON", "write one JSON object a line"),
    "JSON array": (b'[{"text_a": "a"}]\n', ":1: ", "write one object a line"),
    "invalid UTF-8": (GOOD * 9000 + b'{"text_a": "caf\xe9"}\n' + GOOD, ":9001: not UTF-8", "save the file as UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), ":1: not UTF-8", "save the file as UTF-8"),
    "missing column": (
        GOOD + b'{"text_a": "a", "textb": "b"}',
        ":2: no column text_b; it has text_a, textb; the nearest is textb",
        "or data.text_b",
    ),
    "empty object": (b"{}", ":1: no column text_a; it has none", "or data.text_a"),
    "no label": (b'{"text_a": "a", "text_b": "b"}', ":1: no column label", "or data.label"),
    "label 2": (GOOD + pair(label=2), ":2: label is 2", "write 0 or 1"),
    "label yes": (pair(label="yes"), ":1: label is 'yes'", "write 0 or 1"),
    "label NaN": (pair(label=float("nan")), ":1: label is nan", "write 0 or 1"),
    "label null": (pair(label=None), ":1: label is null", "write 0 or 1"),
    "label empty": (pair(label=""), ":1: label is ''", "write 0 or 1"),
    "label list": (pair(label=[1]), ":1: label is [1]", "write 0 or 1"),
    "label 0.5": (pair(label=0.5), ":1: label is 0.5", "write 0 or 1"),
    "number as text": (pair(text_a=7), ":1: text_a is 7, not a text", "write a text in quotes"),
    "null as text": (pair(text_b=None), ":1: text_b is null, not a text", "write a text in quotes"),
    "NaN as text": (pair(text_b=float("nan")), ":1: text_b is nan, not a text", "write a text in quotes"),
    "empty text": (GOOD + pair(text_a=""), ":2: text_a is empty", "fill it in"),
    "blank text": (pair(text_b=" \n\u3000"), ":1: text_b is empty", "fill it in"),
    "invisible text": (pair(text_b="\u200b\ufeff"), ":1: text_b is empty", "fill it in"),
    "half a surrogate": (pair(text_b="a\ud83d"), ":1: text_b holds half of a surrogate pair", "escapes"),
    "same id": (pair(id="x") + pair(id="y") + pair(id="x"), "p.jsonl:1 too", "make ids unique"),
    "list as group": (pair(group_a=[1]), ":1: group_a is [1]", "write a text or a number"),
    "empty file": (b"", "p.jsonl: no pairs in it", "add some"),
    "blank lines": (b"\n \n", "p.jsonl: no pairs in it", "add some"),
}


@pytest.mark.parametrize("content, what, remedy", JSONL_MISTAKES.values(), ids=JSONL_MISTAKES)
def test_mistakes_in_jsonl(tmp_path, content, what, remedy):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    text = message(str(path))
    assert f"data.train: {path}" in text and what in text and remedy in text.rpartition(": ")[2]


CSV_MISTAKES = {
    "missing column": (
        b"text_a,text_2,label\na,b,1\n",
        ":2: no column text_b; it has text_a, text_2, label",
        "data.text_b",
    ),
    "too few fields": (HEADER + b"a,b,1\na,b\n", ":3: fields found: 2, columns in the header: 3", "complete the line"),
    "too many fields": (HEADER + b"a,b,c,1\n", ":2: fields found: 4", "quote texts"),
    "after a quoted newline": (HEADER + b'"a\nb\nc",b,1\n\na,b,2\n', ":6: label is '2'", "write 0 or 1"),
    "in a quoted newline": (HEADER + b'a,b,1\n"a\nb\nc",b,2\n', ":3: label is '2'", "write 0 or 1"),
    "open quote": (HEADER + b'a,b,1\n"a,b,1\na,b,1\n', ":3: broken quoting", "double the quotes in them"),
    "quote in a field": (HEADER + b'"a" b,b,1\n', ":2: broken quoting", "double the quotes in them"),
    "invalid UTF-8": (HEADER + b"a,b,1\n" * 9000 + b"caf\xe9,b,1\n", ":9002: not UTF-8", "save the file as UTF-8"),
    "empty label": (HEADER + b"a,b,\n", ":2: label is ''", "write 0 or 1"),
    "empty text": (HEADER + b"a,  ,1\n", ":2: text_b is empty", "fill it in"),
    "two equal columns": (b"text_a,text_a,label\na,b,1\n", "two columns are named 'text_a'", "rename one"),
    "header only": (HEADER, "p.csv: no pairs in it", "add some"),
    "empty file": (b"", "p.csv: no pairs in it", "add some"),
}


@pytest.mark.parametrize("content, what, remedy", CSV_MISTAKES.values(), ids=CSV_MISTAKES)
def test_mistakes_in_csv(tmp_path, content, what, remedy):
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    text = message(str(path))
    assert f"data.train: {path}" in text and what in text and remedy in text.rpartition(": ")[2]


@pytest.mark.parametrize(
    "change, what",
    [
        ({"label": [1, None]}, "p.parquet row 2: label is null"),
        ({"text_a": ["a", None]}, "p.parquet row 2: text_a is null"),
        ({"text_b": [1.5, 2.5]}, "p.parquet row 1: text_b is 1.5"),
        ({"id": ["x", "x"]}, "row 2: id 'x' stands at"),
        ({"label": []}, "p.parquet: no pairs in it"),
    ],
)
def test_mistakes_in_parquet_name_the_row(tmp_path, change, what):
    path = tmp_path / "p.parquet"
    values = {"text_a": ["a", "b"], "text_b": ["c", "d"], "label": [1, 0]} | change
    pq.write_table(pa.table({name: column[: len(values["label"])] for name, column in values.items()}), path)
    assert what in message(str(path))


def test_parquet_rows_are_counted_over_batches(tmp_path):
    texts = ["a"] * 70_000  # more than a batch of the reader holds
    pq.write_table(pa.table({"text_a": texts, "text_b": texts, "label": [1] * 69_999 + [5]}), tmp_path / "p.parquet")
    assert "p.parquet row 70000: label is 5" in message(tmp_path / "p.parquet")


def test_what_is_no_parquet_or_no_utf8_in_it(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    assert "p.parquet: not readable" in message(tmp_path / "p.parquet")
    broken = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text_a": broken, "text_b": ["b"], "label": [1]}), tmp_path / "p.parquet")
    assert "p.parquet row 1 or later: a text is not UTF-8" in message(tmp_path / "p.parquet")


def test_ids_are_unique_across_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_bytes(pair(id=f"only {name}") + pair(id=7))
    text = message([str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")])
    assert "two.jsonl:2: id '7' stands at" in text and "one.jsonl:2 too: make ids unique" in text


def test_mistakes_in_the_setting(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(GOOD)
    (tmp_path / "p.txt").write_bytes(GOOD)
    for nothing in (None, "", [], ["p.jsonl", ""]):
        assert "no pairs are given: set it to" in message(nothing, key="data.validation")
    assert f"{tmp_path}/no.csv: no such file: check the path" in message(f"{tmp_path}/no.csv")
    assert "no such file: check" in message(str(tmp_path / "no"))
    assert "unknown extension '.txt': use .jsonl, .json, .csv" in message(str(tmp_path / "p.txt"))
    assert "this is a folder: name the files" in message(str(tmp_path))
    assert "not a hub id: write it as org/name:split" in message("name:train", format="hub")
    assert "listed twice: remove one" in message([str(tmp_path / "p.jsonl")] * 2)
    assert "both name the column q: name two" in message(str(tmp_path / "p.jsonl"), text_a="q", text_b="q")


def test_hub_split(monkeypatch):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        if split != "train":
            raise ConnectionError("no\nnetwork")
        return [{"text_a": "a", "text_b": "b", "label": 1}, {"text_a": "a", "text_b": "b", "label": -1}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert "org/name:train row 2: label is -1" in message("org/name:train")
    assert "org/name:test: not loaded from the hub (no network): check id" in message("org/name:test", format="hub")
    assert calls == [("org/name", "train"), ("org/name", "test")]


@pytest.mark.parametrize("matching", [1, 1.0, "1"])
def test_a_pair_set_of_mteb_is_read_by_its_name(matching, monkeypatch):
    rows = [{"sentence1": "借呗怎么还", "sentence2": "怎么还借呗", "score": matching}]
    rows += [{"sentence1": "借呗怎么还", "sentence2": "花呗是什么", "score": 0}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: rows))
    table = read_pairs("C-MTEB/ATEC:validation", DataConfig(format="mteb"), "data.validation")
    assert table.label.tolist() == [1, 0] and len(table.texts) == 3
    assert next(iter(table.labelled_texts())) == (rows[0]["sentence1"], rows[0]["sentence2"])
    assert "set data.format to" in message("C-MTEB/ATEC:validation")  # without the format


def test_a_file_whose_name_looks_like_a_hub_id_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name:train").write_bytes(GOOD)
    assert "unknown extension ''" in message("org/name:train")
    assert len(read_pairs("org/name:train", DataConfig(format="jsonl"), "data.train")) == 1


def slow_known_match(table, i, j):
    a, b = table.text_a[i], table.text_b[j]
    positives = [{x, y} for x, y, label in zip(table.text_a, table.text_b, table.label, strict=True) if label]
    return a == b or {a, b} in positives or table.group_a[i] == table.group_b[j] != -1


@pytest.mark.parametrize("seed", range(4))
def test_known_match_against_a_slow_reference(seed):
    rng = np.random.default_rng(seed)
    size, texts = 60, 25
    a, b = rng.integers(0, texts, (2, size))
    groups = rng.integers(-1, 40, (2, size))
    names = [str(row) for row in range(size)]
    table = PairTable([f"t{n}" for n in range(texts)], a, b, rng.integers(0, 2, size), names, names, *groups)
    rows_a, rows_b = rng.integers(0, size, 17), rng.integers(0, size, 31)
    expected = [[slow_known_match(table, i, j) for j in rows_b] for i in rows_a]
    found = table.known_match(rows_a, rows_b)
    assert found.dtype == bool and found.tolist() == expected
    assert 0.05 < found.mean() < 0.5  # neither all nor nothing


@pytest.mark.parametrize("columns", [1, 2, 9, 40])
def test_known_match_of_texts_with_many_positives(columns):
    """A hub's partners are more than the columns, sometimes just as many; both ways give the same."""
    rng = np.random.default_rng(columns)
    a = np.repeat([0, 1, 2, 3], [100, columns, columns + 1, 1])
    b = np.concatenate([rng.permutation(np.arange(4, 120))[: len(a) // 2], rng.integers(0, 120, len(a) - len(a) // 2)])
    swapped = rng.random(len(a)) < 0.5
    a, b = np.where(swapped, b, a), np.where(swapped, a, b)
    names, none = [str(row) for row in range(len(a))], np.full(len(a), -1)
    label = (rng.random(len(a)) < 0.9).astype(np.int64)
    table = PairTable([f"t{n}" for n in range(120)], a, b, label, names, names, none, none)
    for _ in range(5):
        rows_a, rows_b = rng.integers(0, len(a), 30), rng.integers(0, len(a), columns)
        expected = [[slow_known_match(table, i, j) for j in rows_b] for i in rows_a]
        assert table.known_match(rows_a, rows_b).tolist() == expected
    assert table.known_match(rows_a, rows_b[:0]).shape == (30, 0)


def test_a_hub_is_not_spread_whole(monkeypatch):
    spread = []
    whole = pairs_module._spread
    monkeypatch.setattr(pairs_module, "_spread", lambda *given: spread.append(whole(*given)) or spread[-1])
    many = 10_000
    a, b = np.zeros(many, np.int64), np.arange(1, many + 1)
    names, none = [""] * many, np.full(many, -1)
    table = PairTable([""] * (many + 1), a, b, np.ones(many, np.int64), names, names, none, none)
    assert table.known_match(np.arange(32), np.arange(256)).all()
    assert sum(len(which) for which, _ in spread) == 0


def test_known_match_reasons_one_by_one(tmp_path):
    lines = [
        ("a", "b", 1, "", ""),
        ("b", "c", 1, "", ""),
        ("c", "a", 0, "", ""),
        ("d", "e", 0, "g", "h"),
        ("f", "d", 0, "h", ""),
    ]
    with open(tmp_path / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text_a", "text_b", "label", "group_a", "group_b"), *lines])
    table = read_pairs(tmp_path / "p.csv", DataConfig(), "data.train")
    every = np.arange(5)
    expected = np.zeros((5, 5), dtype=bool)
    expected[0, 0] = expected[1, 1] = True  # the positives themselves
    expected[1, 2] = expected[2, 0] = True  # the positives (a, b) and (b, c) in the other order
    expected[0, 2] = expected[1, 0] = expected[2, 1] = True  # equal texts; (a, c) is unknown: matches are not chained
    expected[3, 4] = True  # d and d
    expected[4, 3] = True  # the group h; two texts without a group share none
    assert np.array_equal(table.known_match(every, every), expected)
    assert table.known_match(every[:0], every).shape == (0, 5)


def test_known_match_without_positives(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(pair(label=0) + pair(label=0, text_a="b"))
    table = read_pairs(tmp_path / "p.jsonl", DataConfig(), "data.train")
    assert table.known_match(np.arange(2), np.arange(2)).tolist() == [[False, False], [True, True]]


def test_reading_stops_at_the_first_mistake_only(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(GOOD + b"broken")
    records = read_records(tmp_path / "p.jsonl")
    assert next(records)[0] == 1
    with pytest.raises(UserError):
        next(records)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    written = tmp_path / "a.csv"
    written.write_text("before")
    (tmp_path / "b.jsonl").mkdir()
    (tmp_path / "b.jsonl" / "in the way").touch()
    with pytest.raises(UserError, match=r"b\.jsonl: cannot be written .*: check folder"):
        write_records({tmp_path / "b.jsonl": RECORDS, written: RECORDS})
    assert written.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "b.jsonl"]
