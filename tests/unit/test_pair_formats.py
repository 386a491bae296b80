"""Pairs read in the formats of others: what becomes of them, every mistake as one line, and nothing held whole."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd_dist.config import DataConfig, RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_formats import pair_records
from flipkd_dist.pairs import read_pairs

FLAG = {"query": "q", "pos": [" p1 ", "p2"], "neg": ["n"], "pos_scores": [5.5, -1], "neg_scores": [0], "prompt": "?"}
TEVATRON = {
    "query_id": 7,
    "query": "q",
    "positive_passages": [{"docid": "d1", "title": "T", "text": "p1"}],
    "negative_passages": [{"docid": "d2", "title": "", "text": "n"}, {"text": "n2"}],
}


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def beir(folder, corpus=None, queries=None, splits=None):
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": "d1", "title": "Title", "text": "one"}, {"_id": "d2", "text": "two"}]
    lines(folder / "corpus.jsonl", *(documents if corpus is None else corpus))
    lines(folder / "queries.jsonl", *(queries or [{"_id": "q1", "text": "ask", "metadata": {}}]))
    judged = "query-id\tcorpus-id\tscore\nq1\td2\t2\nq1\td1\t0\n"
    for name, content in ({"test": judged} if splits is None else splits).items():
        (folder / "qrels" / f"{name}.tsv").write_text(content)
    return folder


def read(path, format):
    """(number, record) of each pair."""
    return [(number, record) for number, record, _ in pair_records(path, DataConfig(format=format))]


def pairs(path, format):
    return [(r["text_a"], r["text_b"], r["label"], r.get("score")) for _, r in read(path, format)]


def test_flagembedding(tmp_path):
    path = lines(tmp_path / "f.jsonl", FLAG, {"query": "only", "pos": ["p"], "neg": None})
    expected = [("q", "p1", 1, 5.5), ("q", "p2", 1, -1.0), ("q", "n", 0, 0.0), ("only", "p", 1, None)]
    assert pairs(path, "flagembedding") == expected
    assert [number for number, _ in read(path, "flagembedding")] == ["1.1", "1.2", "1.3", 2]
    table = read_pairs(str(path), DataConfig(format="flagembedding"), "data.train")
    assert table.ids == ["f:1.1", "f:1.2", "f:1.3", "f:2"] and table.texts == ["q", "p1", "p2", "n", "only", "p"]
    assert table.group_a.tolist() == [-1] * 4  # several positives of a query do not make a group


def test_tevatron(tmp_path):
    path = lines(tmp_path / "t.train", TEVATRON, TEVATRON | {"query_id": 8})  # JSONL whatever the extension
    assert pairs(path, "tevatron")[:3] == [("q", "T p1", 1, None), ("q", "n", 0, None), ("q", "n2", 0, None)]
    table = read_pairs(path, DataConfig(format="tevatron"), "data.train")
    assert table.ids == ["t:7/d1", "t:7/d2", "t:1.3", "t:8/d1", "t:8/d2", "t:2.3"]


def test_a_query_id_that_comes_again_is_no_mistake(tmp_path):
    table = read_pairs(lines(tmp_path / "t.jsonl", TEVATRON, TEVATRON), DataConfig(format="tevatron"), "data.train")
    assert table.ids[0] == "t:7/d1" and table.ids[3] == "t:7/d1@2.1" and len(set(table.ids)) == 6


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"sentence1": "a", "sentence2": "b", "label": 0}, [("a", "b", 0, None)]),
        ({"sentence2": "b", "sentence1": "a", "label": "1"}, [("a", "b", 1, None)]),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, [("a", "b", 1, 0.5)]),
        ({"sentence1": "a", "sentence2": "b", "score": 0}, [("a", "b", 0, 0.0)]),
        ({"sentence1": "a", "sentence2": "b", "label": 0.49}, [("a", "b", 0, 0.49)]),
        ({"premise": "a", "hypothesis": "b", "labels": True}, [("a", "b", 1, None)]),
        ({"one": "a", "other": "b"}, [("a", "b", 1, None)]),
        ({"question": "a", "answer": "b", "wrong": "c"}, [("a", "b", 1, None), ("a", "c", 0, None)]),
        ({"negative": "c", "positive": "b", "anchor": "a"}, [("a", "b", 1, None), ("a", "c", 0, None)]),
        (
            {"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d", "note": "x"},
            [("a", "b", 1, None), ("a", "c", 0, None), ("a", "d", 0, None)],
        ),
    ],
)
def test_sentence_transformers(tmp_path, record, expected):
    path = lines(tmp_path / "s.jsonl", record)
    assert pairs(path, "sentence_transformers") == expected
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "s.parquet")
    assert pairs(tmp_path / "s.parquet", "sentence_transformers") == expected


def test_triplets_of_one_anchor_give_each_pair_once(tmp_path):
    rows = [("a", "b", "c"), ("a", "b", "d"), ("x", "b", "c"), ("a", "b", "c")]
    (tmp_path / "t.csv").write_text("anchor,positive,negative\n" + "".join(",".join(row) + "\n" for row in rows))
    found = [pair[:3] for pair in pairs(tmp_path / "t.csv", "sentence_transformers")]
    assert found == [
        ("a", "b", 1),
        ("a", "c", 0),
        ("a", "d", 0),
        ("x", "b", 1),
        ("x", "c", 0),
        ("a", "b", 1),
        ("a", "c", 0),
    ]


@pytest.mark.parametrize("texts", [("sentence1", "sentence2"), ("sent1", "sent2")])
def test_mteb_rows_and_lists(tmp_path, texts):
    columns = {texts[0]: ["a", "b"], texts[1]: ["c", "d"], "labels": [1, 0]}
    rows = [{name: column[k] for name, column in columns.items()} for k in range(2)]
    expected = [("a", "c", 1, None), ("b", "d", 0, None)]
    assert pairs(lines(tmp_path / "rows.jsonl", *rows), "mteb") == expected
    assert pairs(lines(tmp_path / "lists.jsonl", columns), "mteb") == expected
    assert [number for number, _ in read(tmp_path / "lists.jsonl", "mteb")] == ["1.1", "1.2"]


def test_beir(tmp_path):
    folder = beir(tmp_path / "nf")
    assert pairs(folder, "beir") == [("ask", "two", 1, None), ("ask", "Title one", 0, None)]
    table = read_pairs(f"{folder}:test", DataConfig(format="beir"), "data.train")
    assert table.ids == ["nf:test:q1/d2", "nf:test:q1/d1"] and table.label.tolist() == [1, 0]
    assert [str(where) for *_, where in pair_records(folder, DataConfig(format="beir"))] == [
        f"{folder}/qrels/test.tsv:2",
        f"{folder}/qrels/test.tsv:3",
    ]


def test_a_beir_folder_of_several_splits(tmp_path):
    judged = "query-id\tcorpus-id\tscore\nq1\td{}\t1\n"
    folder = beir(tmp_path / "nf", splits={"dev": judged.format(1), "train": judged.format(2)})
    assert pairs(f"{folder}:train", "beir") == [("ask", "two", 1, None)]
    both = read_pairs([f"{folder}:train", f"{folder}:dev"], DataConfig(format="beir"), "data.train")
    assert both.ids == ["nf:train:q1/d2", "nf:dev:q1/d1"]
    for path, what in ((folder, "which split"), (f"{folder}:test", "no split 'test'")):
        with pytest.raises(UserError, match=f"{what}; its splits are dev, train: name one as .*nf:dev"):
            read(path, "beir")


def test_a_beir_split_stays_known_where_workers_run(tmp_path, monkeypatch):
    from flipkd_dist.pipeline import absolute_paths  # heavy

    beir(tmp_path / "nf")
    monkeypatch.chdir(tmp_path)
    config = RunConfig.model_validate({"name": "x", "data": {"train": "nf:test", "test": "org/name:test"}})
    data = absolute_paths(config).data
    assert data.train == f"{tmp_path}/nf:test" and data.test == "org/name:test"


def test_a_large_corpus_is_not_held(tmp_path):
    corpus = [{"_id": str(n), "title": "", "text": f"{n} " + "word " * 2000} for n in range(2000)]  # 20 MB
    judged = "query-id\tcorpus-id\tscore\n" + "".join(f"q1\t{n}\t1\n" for n in range(2000))
    folder = beir(tmp_path / "big", corpus=corpus, splits={"test": judged})
    del corpus
    tracemalloc.start()
    count = sum(
        record["text_b"].startswith(record["id_b"]) for _, record, _ in pair_records(folder, DataConfig(format="beir"))
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000 and peak < 2_000_000


@pytest.mark.parametrize("format, record", [("flagembedding", FLAG), ("tevatron", TEVATRON)])
def test_a_line_is_read_when_it_is_asked_for(tmp_path, format, record):
    lines(tmp_path / "p.jsonl", record)
    with open(tmp_path / "p.jsonl", "a") as file:
        file.write("broken\n")
    found = pair_records(tmp_path / "p.jsonl", DataConfig(format=format))
    assert next(found)[1]["text_a"] == "q"
    with pytest.raises(UserError, match=r"p\.jsonl:2: broken JSON"):
        list(found)


MISTAKES = {
    "no query": ("flagembedding", {"pos": ["p"]}, "no column query; it has pos", "correct the file"),
    "neither pos nor neg": ("flagembedding", {"query": "q"}, "no column pos", "correct the file"),
    "pos a text": ("flagembedding", FLAG | {"pos": "p"}, "pos is 'p', not a list", "write it in [ ]"),
    "empty pos": ("flagembedding", FLAG | {"pos": ["p", " "]}, "pos[1] is empty", "fill it in"),
    "number in neg": ("flagembedding", FLAG | {"neg": [3]}, "neg[0] is 3, not a text", "write a text"),
    "few scores": ("flagembedding", FLAG | {"pos_scores": [1]}, "pos has 2 texts, pos_scores 1 numbers", "score each"),
    "score NaN": ("flagembedding", FLAG | {"neg_scores": ["high"]}, "neg_scores[0] is 'high'", "write a number"),
    "score Inf": ("flagembedding", FLAG | {"neg_scores": [float("inf")]}, "neg_scores[0] is inf", "write a number"),
    "no passages": ("tevatron", {"query": "q"}, "no column positive_passages", "correct the file"),
    "passage a text": ("tevatron", TEVATRON | {"negative_passages": ["n"]}, "negative_passages[0] is 'n'", "an object"),
    "passage empty": (
        "tevatron",
        TEVATRON | {"positive_passages": [{"docid": "x", "text": ""}]},
        "positive_passages[0]: text is empty",
        "fill it in",
    ),
    "passage without text": (
        "tevatron",
        TEVATRON | {"positive_passages": [{"title": "x"}]},
        "positive_passages[0]: no column text",
        "correct the file",
    ),
    "one column": (
        "sentence_transformers",
        {"text": "a", "label": 1},
        "fewer than two columns of texts",
        "another file",
    ),
    "similarity to 5": (
        "sentence_transformers",
        {"sentence1": "a", "sentence2": "b", "score": 3.8},
        "score is 3.8",
        "scaled to 0 to 1",
    ),
    "class 2": ("sentence_transformers", {"premise": "a", "hypothesis": "b", "label": 2}, "label is 2", "write 0 or 1"),
    "class '2'": (
        "sentence_transformers",
        {"premise": "a", "hypothesis": "b", "label": "2"},
        "label is '2'",
        "class 0 or 1",
    ),
    "labelled triplet": (
        "sentence_transformers",
        {"a": "a", "b": "b", "c": "c", "label": 0.5},
        "a label beside 3 columns",
        "give pairs",
    ),
    "empty negative": (
        "sentence_transformers",
        {"anchor": "a", "positive": "b", "negative": ""},
        "negative is empty",
        "fill it in",
    ),
    "no labels": ("mteb", {"sentence1": "a", "sentence2": "b"}, "no column labels", "correct the file"),
    "unequal lists": (
        "mteb",
        {"sentence1": ["a"], "sentence2": ["b"], "labels": [1, 0]},
        "sentence1, sentence2, labels: lists of unequal length",
        "as many texts as labels",
    ),
    "label in a list": (
        "mteb",
        {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "labels": [1, 4]},
        "labels[1] is 4",
        "write 0 or 1",
    ),
}


@pytest.mark.parametrize("format, record, what, remedy", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path, format, record, what, remedy):
    good = {"flagembedding": FLAG, "tevatron": TEVATRON, "mteb": {"sentence1": "a", "sentence2": "b", "labels": 1}}
    path = lines(tmp_path / "p.jsonl", *([good[format]] if format in good else []), record)
    with pytest.raises(UserError) as caught:
        read_pairs(path, DataConfig(format=format), "data.train")
    text = str(caught.value)
    assert f"data.train: {path}:{1 + (format in good)}: {what}" in text and remedy in text.partition(what)[2]
    assert "\n" not in text


def judged(*rows):
    header = ("query-id", "corpus-id", "score")
    return {"splits": {"test": "".join("\t".join(row) + "\n" for row in (header, *rows))}}


BEIR_MISTAKES = {
    "no folder": ("no", {}, "no: no .*no/corpus.jsonl: name a BEIR folder as FOLDER or FOLDER:SPLIT"),
    "unknown document": (":test", judged(("q1", "d9", "1")), "test.tsv:2: no document 'd9' in corpus.jsonl: add it"),
    "unknown query": (":test", judged(("q1", "d1", "1"), ("q", "d1", "1")), "test.tsv:3: no query 'q' in queries"),
    "no header": (":test", {"splits": {"test": "q1\td1\t1\nq1\td2\t1\n"}}, "test.tsv:2: no column query-id"),
    "score": (":test", judged(("q1", "d1", "yes")), "test.tsv:2: score is 'yes'"),
    "no judgements": ("", {"splits": {}}, "which split; it has no qrels"),
    "same id": ("", {"corpus": [{"_id": "d1", "text": "a"}] * 2}, "corpus.jsonl:2: _id 'd1' stands twice"),
    "no id": ("", {"corpus": [{"id": "d1", "text": "a"}]}, "corpus.jsonl:1: no column _id"),
    "no text": (
        "",
        {"corpus": [{"_id": "d1", "text": ""}, {"_id": "d2", "text": " "}]},
        "corpus.jsonl:2: text is empty",
    ),
    "half a surrogate": ("", {"corpus": [{"_id": "d\ud83d", "text": "a"}]}, "corpus.jsonl:1: _id holds half of a"),
}


@pytest.mark.parametrize("suffix, files, what", BEIR_MISTAKES.values(), ids=BEIR_MISTAKES)
def test_mistakes_in_a_beir_folder(tmp_path, suffix, files, what):
    folder = beir(tmp_path / "nf", **files)
    with pytest.raises(UserError, match=f"^data.test: .*{what}") as caught:
        read_pairs(suffix if suffix == "no" else f"{folder}{suffix}", DataConfig(format="beir"), "data.test")
    assert "\n" not in str(caught.value)


def test_not_utf8_in_a_corpus(tmp_path):
    folder = beir(tmp_path / "nf")
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "d1", "text": "a"}\n{"_id": "d2", "text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl:2: not UTF-8"):
        read(folder, "beir")


@pytest.mark.parametrize(
    "record, format",
    [
        (FLAG, "flagembedding"),
        (TEVATRON, "tevatron"),
        ({"sentence1": "a", "sentence2": "b", "labels": 1}, "mteb"),
        ({"sentence1": "a", "sentence2": "b", "score": 1}, "sentence_transformers"),
        ({"anchor": "a", "positive": "b"}, "sentence_transformers"),
    ],
)
def test_the_setting_is_named_where_it_is_missing(tmp_path, record, format):
    path = lines(tmp_path / "p.jsonl", record)
    with pytest.raises(UserError, match=f"p.jsonl:1: .*this looks like {format}: set data.format to {format}$"):
        read_pairs(path, DataConfig(), "data.train")
    assert len(read_pairs(path, DataConfig(format=format), "data.train"))


@pytest.mark.parametrize("suffix", ["", ":test"])
def test_the_setting_is_named_for_a_folder(tmp_path, suffix):
    with pytest.raises(UserError, match=r"this is a BEIR folder: set data\.format to beir"):
        read_pairs(f"{beir(tmp_path / 'nf')}{suffix}", DataConfig(), "data.train")


@pytest.mark.parametrize("key", ["text_a", "text_b", "label"])
def test_column_names_have_no_effect_on_a_format_with_its_own(tmp_path, key):
    path = lines(tmp_path / "p.jsonl", FLAG)
    with pytest.raises(UserError, match=f"data.{key}: query: no effect where data.format is flagembedding: remove it"):
        read_pairs(path, DataConfig(format="flagembedding", **{key: "query"}), "data.train")


def test_our_own_columns(tmp_path):
    full = {
        "text_a": "a",
        "text_b": "b",
        "label": 1,
        "score": 0.25,
        "id": 3,
        "id_a": "q",
        "group_a": "g",
        "kind": "hard",
    }
    path = lines(tmp_path / "p.jsonl", full | {"more": 1, "group_b": None}, {"text_a": "a", "text_b": "b"})
    found = pair_records(path, DataConfig(), needs_label=False)
    assert next(found)[1] == full | {"id": "3"}
    assert next(found)[1] == {"text_a": "a", "text_b": "b"}
    with pytest.raises(UserError, match=r"p\.jsonl:2: no column label"):
        list(pair_records(path, DataConfig()))
    with pytest.raises(UserError, match=r"p\.jsonl:1: score is True: write a number"):
        list(pair_records(lines(path, full | {"score": True}), DataConfig()))
