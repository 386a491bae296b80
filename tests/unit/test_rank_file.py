"""The verb `rank` on files: lists and TREC runs in, sorted lists and TREC runs out; mistakes in one line."""

import json
import os
import sys
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
from matchers import MadeUpEncoder, MadeUpMatcher, made_up_score, saved_adapter, single_scores
from test_predict_file import write_jsonl
from tiny import sentences

from flipkd_dist import cli, predict, rank_file
from flipkd_dist.token_batches import WINDOW_CHARACTERS, WINDOW_PAIRS

QUERIES = ["where is my card", "ключ 丢失 \U0001f511", "close account"]
LISTS = [
    {"id": "q1", "text_a": QUERIES[0], "candidates": ["card lost", {"id": "d7", "text": " my pin "}, "card lost", "x"]},
    {"id": "q2", "text_a": QUERIES[1], "candidates": [], "note": [1, {"deep": None}]},
    {"id": 3, "text_a": QUERIES[2], "candidates": [{"id": "a", "text": "money"}, {"id": 9, "text": "кот"}]},
]


@pytest.fixture
def matchers(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(rank_file, "saved_encoder", lambda *_: MadeUpEncoder())
    monkeypatch.setattr(rank_file, "Matcher", lambda *given: made.append(MadeUpMatcher(*given)) or made[-1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "flipkd.json").write_text("{}")
    return made


def flipkd(monkeypatch, *arguments):
    """The exit code of `flipkd rank adapter ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["flipkd", "rank", "adapter", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
        raise SystemExit(0)
    return stopped.value.code


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected_ranking(query, candidates):
    """Sorted another way: by a list of tuples."""
    found = []
    for index, one in enumerate(candidates):
        text = (one["text"] if isinstance(one, dict) else one).strip()
        p_match, similarity = made_up_score((query, text))
        named = {"id": str(one["id"])} if isinstance(one, dict) else {}
        found.append((-p_match, index, {"index": index, **named, "p_match": p_match, "similarity": similarity}))
    return [entry for *_, entry in sorted(found, key=lambda one: one[:2])]


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_lists_come_back_with_their_rankings(matchers, tmp_path, monkeypatch, top_k):
    write_jsonl(tmp_path / "in.jsonl", LISTS)
    more = ["--top-k", top_k] if top_k else []
    assert flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.jsonl", *more) == 0
    found = read_jsonl(tmp_path / "out.jsonl")
    assert found == [
        {**record, "ranking": expected_ranking(record["text_a"], record["candidates"])[:top_k]} for record in LISTS
    ]
    equal = [entry["index"] for entry in found[0]["ranking"] if entry["index"] in (0, 2)]
    assert equal == sorted(equal)  # the same candidate twice: in the order of the list


def test_other_columns_and_parquet(matchers, tmp_path, monkeypatch):
    lists = [
        {"q": one["text_a"], "docs": [{"id": "7", "text": "b"}, {"text": "a"}][: n + 1]} for n, one in enumerate(LISTS)
    ]
    write_jsonl(tmp_path / "in.jsonl", lists)
    columns = ("--text-a", "q", "--candidates", "docs")
    assert flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.parquet", *columns) == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    for row, one in zip(rows, lists, strict=True):
        best = sorted(range(len(one["docs"])), key=lambda n: -made_up_score((one["q"], one["docs"][n]["text"]))[0])
        assert row["q"] == one["q"] and [entry["index"] for entry in row["ranking"]] == best
        assert {entry["index"]: entry["id"] for entry in row["ranking"]} == dict(enumerate(["7", None][: len(best)]))
    assert flipkd(monkeypatch, "--input", "out.parquet", "--output", "again.parquet", *columns) == 0  # and as input
    assert pq.read_table(tmp_path / "again.parquet").equals(pq.read_table(tmp_path / "out.parquet"))


def test_a_list_may_be_longer_than_a_window(matchers, tmp_path, monkeypatch):
    many = [f"candidate {n}" for n in range(2 * WINDOW_PAIRS + 3)]
    short = [{"text_a": f"query {n}", "candidates": ["a", "b"]} for n in range(10)]
    write_jsonl(tmp_path / "in.jsonl", [*short, {"text_a": "q", "candidates": many}, *short])
    assert flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.jsonl") == 0
    assert matchers[0].calls == [20, len(many), 20]  # the matcher cuts it; short lists go together
    found = read_jsonl(tmp_path / "out.jsonl")
    assert found[10]["ranking"] == expected_ranking("q", many)
    assert found[15]["ranking"] == expected_ranking("query 4", ["a", "b"])


def test_lists_as_a_trec_run(matchers, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "in.jsonl", LISTS)
    assert flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.trec", "--top-k", 3) == 0
    lines = []
    for record in LISTS:
        for rank, entry in enumerate(expected_ranking(record["text_a"], record["candidates"])[:3], 1):
            name = entry.get("id", entry["index"])
            lines.append(f"{record['id']} Q0 {name} {rank} {entry['p_match']} flipkd")
    assert (tmp_path / "out.trec").read_text().splitlines() == lines


AMBIGUOUS = {
    "equal ids": (
        ["a", {"id": "d", "text": "b"}, {"id": "d", "text": "c"}],
        "candidates 1 and 2 would both be called 'd'",
    ),
    "an index": (["a", "b", {"id": 0, "text": "c"}], "candidates 0 and 2 would both be called '0'"),
    "a query": (["a"], "id 'q1' stands at in.jsonl:1 too"),
}


@pytest.mark.parametrize("mistake", AMBIGUOUS)
def test_a_trec_run_that_would_be_ambiguous(matchers, tmp_path, monkeypatch, capsys, mistake):
    candidates, reason = AMBIGUOUS[mistake]
    query = "q1" if mistake == "a query" else "q9"
    write_jsonl(tmp_path / "in.jsonl", [*LISTS, {"id": query, "text_a": "a", "candidates": candidates}])
    before = sorted(os.listdir())
    code = flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.trec")
    refused(code, capsys, f"--output out.trec: in.jsonl:4: {reason}", "or write JSONL")
    assert not matchers and sorted(os.listdir()) == before
    assert flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.jsonl") == 0  # there nothing is mixed up


def test_other_columns_of_a_list_count_for_a_window(matchers, tmp_path, monkeypatch):
    body = "x" * (WINDOW_CHARACTERS // 10)
    write_jsonl(tmp_path / "in.jsonl", [{"text_a": "a", "candidates": ["b"], "body": body}] * 20)
    assert flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.jsonl") == 0
    assert matchers[0].calls == [9, 9, 2]


@pytest.fixture
def run(tmp_path):
    """A TREC run with its queries and corpus; the corpus has a title and a document that the run does not name."""
    corpus = [{"_id": f"d{n}", "title": "Title" * (n % 2), "text": f"text {n}"} for n in range(5)]
    corpus.append({"_id": "d5", "text": "\ufffd"})
    write_jsonl(tmp_path / "my-corpus.jsonl", corpus)
    write_jsonl(tmp_path / "q.jsonl", [{"_id": f"q{n}", "text": query} for n, query in enumerate(QUERIES)])
    lines = ["q2 Q0 d3 1 9.5 bm25", "q2 Q0 d0 2 9.1 bm25", "", "q0\tQ0\td1\t1\t3\tbm25", "q0 Q0 d3 2 2 bm25"]
    (tmp_path / "bm25.txt").write_text("\n".join(lines) + "\n")
    return ["--input", "bm25.txt", "--queries", "q.jsonl", "--corpus", "my-corpus.jsonl"]


def test_a_run_is_ranked_again(matchers, run, tmp_path, monkeypatch):
    assert flipkd(monkeypatch, *run, "--output", "out.jsonl") == 0
    given = {"q2": [("d3", "Title text 3"), ("d0", "text 0")], "q0": [("d1", "Title text 1"), ("d3", "Title text 3")]}
    wanted = []
    for name, members in given.items():
        query = QUERIES[int(name[1])]
        candidates = [{"id": document, "text": text} for document, text in members]
        wanted.append({"id": name, "text_a": query, "ranking": expected_ranking(query, candidates)})
    assert read_jsonl(tmp_path / "out.jsonl") == wanted
    assert flipkd(monkeypatch, *run, "--output", "out.trec") == 0
    names = [line.split()[:4] for line in (tmp_path / "out.trec").read_text().splitlines()]
    places = [(one["id"], entry["id"], rank) for one in wanted for rank, entry in enumerate(one["ranking"], 1)]
    assert names == [[query, "Q0", document, str(rank)] for query, document, rank in places]


def test_the_documents_of_a_run_count_for_a_window(matchers, run, tmp_path, monkeypatch):
    body = "x" * (WINDOW_CHARACTERS // 2)
    write_jsonl(tmp_path / "my-corpus.jsonl", [{"_id": f"d{n}", "text": body} for n in range(5)])
    assert flipkd(monkeypatch, *run, "--output", "out.jsonl") == 0
    assert matchers[0].calls == [2, 2]


BAD_LISTS = {
    "no column": ({"text_a": "a"}, "in.jsonl:2: no column candidates; it has text_a", "--candidates"),
    "no list": ({"text_a": "a", "candidates": "b"}, "in.jsonl:2: candidates is 'b', not a list", "write a list"),
    "null": ({"text_a": "a", "candidates": None}, "in.jsonl:2: candidates is null, not a list", "write a list"),
    "empty": ({"text_a": "a", "candidates": ["b", " "]}, "in.jsonl:2: candidates[1] is empty", "remove the record"),
    "number": ({"text_a": "a", "candidates": [{"text": 3}]}, "in.jsonl:2: candidates[0] is 3", "write a text"),
    "no text": ({"text_a": "a", "candidates": [{"id": 3}]}, "in.jsonl:2: no column text; it has id", "correct"),
    "query": ({"text_a": "", "candidates": []}, "in.jsonl:2: text_a is empty", "fill it in"),
    "tokens": ({"text_a": "a", "candidates": ["b", "\ufffd"]}, "in.jsonl:2: the student's tokenizer turns", "correct"),
    "query's": ({"text_a": "\ufffd", "candidates": []}, "in.jsonl:2: the student's tokenizer turns", "correct"),
}


def refused(code, capsys, where, remedy):
    [line] = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith(f"flipkd: {where}") and remedy in line


@pytest.mark.parametrize("mistake", BAD_LISTS)
def test_a_bad_list(matchers, tmp_path, monkeypatch, capsys, mistake):
    record, where, remedy = BAD_LISTS[mistake]
    write_jsonl(tmp_path / "in.jsonl", [LISTS[0], record])
    before = sorted(os.listdir())
    refused(flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.jsonl"), capsys, where, remedy)
    assert not matchers and sorted(os.listdir()) == before


BAD_FILES = {
    "csv in": (("in.csv", "out.jsonl"), "--input in.csv: CSV and TSV hold no lists", "use JSONL"),
    "csv out": (("in.jsonl", "out.csv"), "--output out.csv: CSV holds no rankings", ".trec"),
    "extension": (("in.jsonl", "out.txt"), "out.txt: unknown extension '.txt'", "use .jsonl"),
    "no input": (("none.jsonl", "out.jsonl"), "none.jsonl: no such file", "check the path"),
    "no queries": (("empty.jsonl", "out.jsonl"), "--input empty.jsonl: no queries in it", "name a file"),
    "onto itself": (("in.jsonl", "./in.jsonl"), "--output in.jsonl: this is the input", "another"),
    "nameless": (("nameless.jsonl", "out.trec"), "--output out.trec: nameless.jsonl:1: no id", "add the column id"),
    "spaces": (("spaces.jsonl", "out.trec"), "--output out.trec: spaces.jsonl:1: 'a b' has a space", "write JSONL"),
    "alone": (("in.jsonl", "out.jsonl", "--queries", "q.jsonl"), "--queries: a run needs the texts", "give --corpus"),
    "other": (("in.jsonl", "out.jsonl", "--corpus", "q.jsonl"), "--corpus: a run needs the texts", "give --queries"),
    "no folder": (("in.jsonl", "no/out.trec"), "no/out.trec: there is no folder no", "create it"),
    "0 best": (("in.jsonl", "out.jsonl", "--top-k", "0"), "Invalid value for '--top-k'", "see flipkd rank --help"),
}


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_bad_files(matchers, run, tmp_path, monkeypatch, capsys, mistake):
    (source, output, *more), where, remedy = BAD_FILES[mistake]
    write_jsonl(tmp_path / "in.jsonl", LISTS)
    write_jsonl(tmp_path / "empty.jsonl", [])
    write_jsonl(tmp_path / "nameless.jsonl", [{"text_a": "a", "candidates": []}])
    write_jsonl(tmp_path / "spaces.jsonl", [{"id": "q", "text_a": "a", "candidates": [{"id": "a b", "text": "c"}]}])
    (tmp_path / "in.csv").write_text("text_a,candidates\na,b\n")
    before = sorted(os.listdir())
    refused(flipkd(monkeypatch, "--input", source, "--output", output, *more), capsys, where, remedy)
    assert not matchers and sorted(os.listdir()) == before


BAD_RUNS = {
    "fields": ("q0 Q0 d1 1 3\n", "bm25.txt:6: fields found: 5, a line of a TREC run has 6", "write QUERY"),
    "document": ("q1 Q0 d9 1 3 x\n", "bm25.txt:6: no document 'd9' in my-corpus.jsonl", "add it"),
    "query": ("q9 Q0 d1 1 3 x\n", "bm25.txt:6: no query 'q9' in q.jsonl", "add it"),
    "unsorted": ("q2 Q0 d1 1 3 x\n", "bm25.txt:6: query 'q2' stood further up", "sort"),
    "tokens": ("q1 Q0 d5 3 1 x\n", "bm25.txt:6: the student's tokenizer turns", "correct or remove it"),
    "twice": ("q0 Q0 d1 3 1 x\n", "bm25.txt:6: document 'd1' stands twice", "remove"),
    "column": (None, "--text-a: a run has no columns", "leave it out"),
    "onto the corpus": (None, "--output my-corpus.jsonl: this is the input", "another"),
}


@pytest.mark.parametrize("mistake", BAD_RUNS)
def test_a_bad_run(matchers, run, tmp_path, monkeypatch, capsys, mistake):
    line, where, remedy = BAD_RUNS[mistake]
    with (tmp_path / "bm25.txt").open("a") as file:
        file.write(line or "")
    more = ["--text-a", "q"] if mistake == "column" else []
    output = "my-corpus.jsonl" if mistake == "onto the corpus" else "out.trec"
    before = sorted(os.listdir())
    refused(flipkd(monkeypatch, *run, "--output", output, *more), capsys, where, remedy)
    assert not matchers and sorted(os.listdir()) == before


@pytest.mark.parametrize("output", ["out.jsonl", "out.trec", "out.parquet"])
def test_ten_times_the_queries_take_the_same_memory(matchers, tmp_path, monkeypatch, output):
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 500)
    monkeypatch.setattr("flipkd_dist.record_writer.ROWS_PER_GROUP", 50)

    def peak(count):
        texts = [f"candidate {n}" for n in range(10)]
        write_jsonl(tmp_path / "in.jsonl", ({"id": n, "text_a": f"q {n}", "candidates": texts} for n in range(count)))
        tracemalloc.start()
        try:
            assert flipkd(monkeypatch, "--input", "in.jsonl", "--output", output) == 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    small, large = peak(150), peak(1500)
    assert large < 1.5 * small


def test_nothing_stays_of_a_ranking_that_failed(matchers, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "in.jsonl", [{"id": "q", "text_a": "a", "candidates": ["b", "c"]}])
    before = sorted(os.listdir())
    monkeypatch.setattr(MadeUpMatcher, "scores", lambda *_: 1 / 0)
    for output in ("out.jsonl", "out.trec", "out.parquet"):
        assert flipkd(monkeypatch, "--input", "in.jsonl", "--output", output) == 1
        assert "ZeroDivisionError" in capsys.readouterr().err and sorted(os.listdir()) == before


def test_a_real_tokenizer_is_asked_before_the_weights_are_read(tmp_path, monkeypatch, capsys):
    saved_adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "load_student", lambda *_, **__: 1 / 0)
    write_jsonl(tmp_path / "in.jsonl", [{"text_a": "card", "candidates": ["pin", "\ufffd"]}])
    code = flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.jsonl")
    refused(code, capsys, "in.jsonl:1: the student's tokenizer turns '\ufffd' into no tokens", "correct or remove it")


def test_a_real_adapter_ranks_as_pair_by_pair(tmp_path, monkeypatch):
    _, student, encoder = saved_adapter(tmp_path)
    queries, candidates = sentences(3, seed=8), sentences(12, seed=9, longest=25)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", ({"text_a": query, "candidates": candidates} for query in queries))
    assert flipkd(monkeypatch, "--input", "in.jsonl", "--output", "out.jsonl", "--batch-size", 5) == 0
    for query, record in zip(queries, read_jsonl(tmp_path / "out.jsonl"), strict=True):
        expected = single_scores(student, encoder, [(query, text) for text in candidates])
        found = {one["index"]: (one["p_match"], one["similarity"]) for one in record["ranking"]}
        np.testing.assert_allclose([found[n] for n in range(12)], expected, rtol=0, atol=1e-5)
        assert [one["index"] for one in record["ranking"]] == np.argsort(-expected[:, 0]).tolist()
