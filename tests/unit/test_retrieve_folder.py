"""The verb `retrieve`: lists, ties, what is counted and left out, ranking again, mistakes in one line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from encoders import FACTS, flipkd, made_up_vector, refused, write_beir
from matchers import MadeUpEncoder as PairTokens
from matchers import MadeUpMatcher, made_up_score
from peft_reference import CARD
from retrieval_reference import reference_metrics, reference_order
from tiny_teacher import save_tiny_teacher

from flipkd_dist import retrieve_folder
from flipkd_dist.judged_folder import JudgedFolder

pytestmark = pytest.mark.usefixtures("encoders")
WORDS = ("card", "pin", "money", "lost")
CORPUS = {
    f"d{n}": {"title": "Title" * (n % 2), "text": f"{WORDS[n % 4]} number {n // 8} and more {n}"} for n in range(60)
}
QUERIES = {f"q{n}": f"where is {WORDS[n % 4]} {n}" for n in range(12)}
JUDGED = [(f"q{n}", f"d{(n * 7 + k * 5) % 60}", k % 3) for n in range(9) for k in range(4)]


@pytest.fixture
def folder(tmp_path):
    judged = [*JUDGED, ("q9", "d1", 0), ("q0", "gone", 2), ("q1", "d57", -1)]
    queries = {**QUERIES, "q11": ""}  # which nobody judged
    return write_beir(tmp_path / "beir", {**CORPUS, "empty": "  "}, queries, judged)


def retrieve(monkeypatch, *options):
    return flipkd(monkeypatch, "retrieve", "--data", "beir", "--output", "out", *options, "adapter")


def document(name):
    return f"{CORPUS[name]['title']} {CORPUS[name]['text']}".strip()


def similarities(query):
    own = made_up_vector(QUERIES[query]).astype(np.float64)
    return {name: float(np.float32(own @ made_up_vector(document(name)).astype(np.float64))) for name in CORPUS}


def grades_of(query):
    return {name: grade for one, name, grade in [*JUDGED, ("q0", "gone", 2)] if one == query}


def read_run(path):
    found = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        query, _, name, rank, score, tag = line.split()
        own = found.setdefault(query, {})
        own[name] = float(score)
        assert int(rank) == len(own) and tag == "flipkd"
    return found


def read_metrics(path="out/metrics.json"):
    return json.loads(Path(path).read_text())


def mean_reference(run):
    each = [reference_metrics(list(run[query]), grades_of(query)) for query in sorted(run)]
    return {name: sum(values[name] for values in each) / len(each) for name in each[0]}


def test_lists_and_their_metrics(monkeypatch, folder, capsys, said):
    assert retrieve(monkeypatch, "--top-k", 20) == 0
    run = read_run("out/run.trec")
    assert list(run) == [f"q{n}" for n in range(9)]
    for query, own in run.items():
        wanted = similarities(query)
        assert len({*wanted.values()}) < len(wanted)  # ties, in every list
        assert list(own) == reference_order(wanted)[:20]
        assert own == pytest.approx({name: wanted[name] for name in own}, abs=1e-7)
    metrics = read_metrics()
    expected = mean_reference(run)
    del expected["recall@100"]
    assert metrics["retrieval"] == pytest.approx(expected, abs=1e-12)
    counts = {key: value for key, value in metrics.items() if isinstance(value, int)}
    assert counts == {
        "queries": 9,
        "queries_left_out": 3,  # one judged with 0 alone, two not at all
        "documents": 60,
        "documents_left_out": 1,
        "relevant_documents_missing": 1,
        "top_k": 20,
    }
    assert metrics["search"] == {"kind": "exact"} and sorted(os.listdir("out")) == ["metrics.json", "run.trec"]
    assert said[:2] == [
        "1 documents have no text and are left out",
        "1 relevant documents are not in the corpus and count as not found",
    ]
    assert f"{expected['ndcg@10']:.4f}" in capsys.readouterr().out


def test_blocks_and_windows_change_nothing(monkeypatch, folder):
    assert retrieve(monkeypatch) == 0
    os.rename("out", "whole")
    monkeypatch.setattr(retrieve_folder, "BLOCK", 2)
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 7)
    monkeypatch.setattr("flipkd_dist.vector_search.CELLS", 5)
    monkeypatch.setattr("flipkd_dist.vector_search.QUERIES", 4)
    assert retrieve(monkeypatch) == 0
    assert Path("out/run.trec").read_text() == Path("whole/run.trec").read_text()
    found, whole = (read_metrics(f"{name}/metrics.json")["retrieval"] for name in ("out", "whole"))
    assert found == pytest.approx(whole, abs=1e-12) and "recall@100" in found


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_approximate_search_says_what_it_misses(monkeypatch, folder, kind):
    assert retrieve(monkeypatch, "--ann", kind, "--top-k", 20) == 0
    metrics = read_metrics()
    assert metrics["search"]["kind"] == kind and metrics["search"]["compared_queries"] == 9
    own = read_run("out/run.trec")
    exact = {query: reference_order(similarities(query))[:20] for query in own}
    recall = np.mean([len({*own[query]} & {*exact[query]}) / 20 for query in exact])
    assert metrics["search"]["recall_against_exact"] == pytest.approx(recall)
    for found in own.values():
        assert list(found) == reference_order(found)


@pytest.fixture
def matchers(monkeypatch):
    made = []

    class Coarse(MadeUpMatcher):
        """Of few different answers, so that many are equal."""

        def scores(self, texts, limits, done):
            return np.round(super().scores(texts, limits, done), 1)

    monkeypatch.setattr(retrieve_folder, "saved_encoder", lambda *_: PairTokens())
    monkeypatch.setattr(retrieve_folder, "Matcher", lambda *given: made.append(Coarse(*given)) or made[-1])
    return made


def test_the_first_ones_are_ranked_again(monkeypatch, folder, matchers):
    options = ("--top-k", 20, "--rerank", "pairs", "--rerank-top-k", 8)
    assert retrieve(monkeypatch, *options) == 0
    run, again = read_run("out/run.trec"), read_run("out/reranked.trec")
    for query, own in run.items():
        first, others = list(own)[:8], list(own)[8:]
        answers = {name: round(made_up_score((QUERIES[query], document(name)))[0], 1) for name in first}
        assert len({*answers.values()}) < 8
        assert list(again[query]) == [*reference_order(answers), *others]
        assert list(again[query].values())[:8] == pytest.approx([answers[name] for name in reference_order(answers)])
        assert list(again[query]) == reference_order(again[query])  # so reads trec_eval
    metrics = read_metrics()
    expected = mean_reference(again)
    del expected["recall@100"]
    assert metrics["reranked"] == pytest.approx(expected, abs=1e-12)
    assert metrics["rerank"].items() >= {"model": "pairs", "top_k": 8, "step": CARD.step}.items()
    assert "rerank" in metrics["seconds"]


def test_a_list_may_be_shorter_than_what_is_ranked_again(monkeypatch, tmp_path, matchers):
    write_beir(tmp_path / "beir", {"a": "card", "b": "pin"}, {"q": "card"}, [("q", "a", 1)])
    assert retrieve(monkeypatch, "--rerank", "pairs") == 0
    assert {*read_run("out/reranked.trec")["q"]} == {"a", "b"}


def test_limits_of_ranking_again(monkeypatch, folder, matchers):
    """With --encoder the tokens of a forward are meant for --rerank; the size of a batch is both's."""
    limits, scores = set(), MadeUpMatcher.scores

    def noted(self, texts, given, done):
        limits.add((given.tokens, given.pairs))
        return scores(self, texts, given, done)

    monkeypatch.setattr(MadeUpMatcher, "scores", noted)
    options = ("--rerank", "pairs", "--max-batch-tokens", 77, "--batch-size", 5)
    assert retrieve(monkeypatch, *options) == 0 and limits == {(77, 5)}
    limits.clear()
    teacher = str(save_tiny_teacher(folder.parent / "teacher"))
    common = ("retrieve", "--data", "beir", "--encoder", teacher, "--max-length", 16)
    assert flipkd(monkeypatch, *common, "--output", "other", *options) == 0 and limits == {(77, 5)}


def test_a_text_without_tokens_for_ranking_again_is_told_first(encoders, monkeypatch, tmp_path, matchers, capsys):
    write_beir(tmp_path / "beir", {"a": "card", "b": "\ufffd"}, {"q": "card"}, [("q", "a", 1)])
    teacher = str(save_tiny_teacher(tmp_path / "teacher"))
    common = ("retrieve", "--data", "beir", "--output", "out", "--encoder", teacher)
    refused(flipkd(monkeypatch, *common, "--rerank", "pairs"), capsys, "beir/corpus.jsonl: document 'b': the student's")
    assert not matchers and not os.path.exists("out")


def test_a_failure_in_ranking_again_loses_nothing_of_the_search(monkeypatch, folder, matchers):
    def fail(*_):
        raise RuntimeError("half way")

    monkeypatch.setattr(MadeUpMatcher, "scores", fail)
    assert retrieve(monkeypatch, "--rerank", "pairs") == 1
    metrics = read_metrics()
    assert metrics["retrieval"]["ndcg@10"] > 0 and "reranked" not in metrics
    assert metrics["encoder"] == {"name": "adapter", **FACTS}


def test_documents_of_an_encoder_are_not_read_for_tokens(monkeypatch, folder):
    calls, texts = [], JudgedFolder.document_texts
    monkeypatch.setattr(JudgedFolder, "document_texts", lambda self: calls.append(1) or texts(self))
    teacher = str(save_tiny_teacher(folder.parent / "teacher"))
    common = ("retrieve", "--data", "beir", "--output", "out", "--encoder", teacher, "--max-length", 16)
    options = ("--query-prompt", "how ", "--document-prompt", "is ")
    assert flipkd(monkeypatch, *common, *options) == 0 and len(calls) == 1
    encoder = read_metrics()["encoder"]
    assert (encoder["query_prompt"], encoder["prompt"], encoder["max_length"]) == ("how ", "is ", 16)


def test_a_server_without_a_registered_name(monkeypatch, folder, matchers, capsys):
    for options in ((), ("--rerank", "pairs")):
        refused(retrieve(monkeypatch, *options, "--tracking-uri", "x"), capsys, "--tracking-uri: has no effect")
    for verb, *more in (("embed", "--output", "o.npy"), ("cluster",)):
        code = flipkd(monkeypatch, verb, "adapter", "--input", "in.jsonl", *more, "--tracking-uri", "x")
        refused(code, capsys, "--tracking-uri: has no effect")


MISTAKES = {
    "twice": ([("q1", "d1", 1), ("q1", "d1", 2)], "beir/qrels/test.tsv:3: document 'd1' is judged twice"),
    "grade": ([("q1", "d1", 0.5)], "beir/qrels/test.tsv:2: score is '0.5': write a whole number"),
    "no grade": ([("q1", "d1", "x")], "beir/qrels/test.tsv:2: score is 'x': write a number"),
    "no query": ([("q77", "d1", 1)], "beir/qrels/test.tsv:2: no query 'q77' in queries.jsonl"),
    "none relevant": ([("q1", "d1", 0)], "beir: no query has a relevant document"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_judgements(encoders, monkeypatch, tmp_path, capsys, mistake):
    judged, where = MISTAKES[mistake]
    write_beir(tmp_path / "beir", CORPUS, QUERIES, judged)
    refused(retrieve(monkeypatch), capsys, where)
    assert not encoders and not os.path.exists("out")


def test_other_mistakes(encoders, monkeypatch, tmp_path, folder, matchers, capsys):
    refused(retrieve(monkeypatch, "--rerank-top-k", 5), capsys, "--rerank-top-k and --rerank-base-model: have no")
    refused(
        retrieve(monkeypatch, "--rerank", "pairs", "--rerank-top-k", 200), capsys, "--rerank-top-k 200: lists have 100"
    )
    refused(retrieve(monkeypatch, "--rerank", "adapter"), capsys, "--rerank adapter: reads single texts")
    refused(retrieve(monkeypatch, "--top-k", 9), capsys, "Invalid value for '--top-k'")
    os.mkdir("out")
    (tmp_path / "out" / "of mine").touch()
    refused(retrieve(monkeypatch), capsys, "--output out: exists and is no empty folder")
    with open("beir/corpus.jsonl", "a") as file:
        file.write('{"_id": "a b", "text": "c"}\n')
    (tmp_path / "out" / "of mine").unlink()
    refused(retrieve(monkeypatch), capsys, "document 'a b': an id with a space")
    write_beir(tmp_path / "other", {"x": "a \ufffd"}, {"q": "b"}, [("q", "x", 1)])
    code = flipkd(monkeypatch, "retrieve", "--data", "other", "--output", "out", "adapter")
    refused(code, capsys, "other/corpus.jsonl: document 'x': the student's tokenizer turns")
    assert not encoders
