"""A student's own vectors through all that takes them: the verbs, a search that goes on, and MTEB."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from encoders import flipkd, write_beir
from matchers import saved_adapter
from test_mteb_model import retrieval_task
from test_predict_file import write_jsonl
from tiny import sentences

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.embedder import Embedder
from flipkd_dist.mteb_model import MtebModel

TEXTS = sentences(40, seed=4, shortest=3)
CORPUS = {f"d{n}": {"title": "", "text": text} for n, text in enumerate(TEXTS[:30])}
QUERIES = {f"q{n}": text for n, text in enumerate(TEXTS[30:])}
JUDGED = [(f"q{n}", f"d{(3 * n + k) % 30}", 1) for n in range(10) for k in range(5)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return saved_adapter(tmp_path_factory.mktemp("student"), mode="alone")[0]


@pytest.fixture
def desk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_beir(tmp_path / "beir", CORPUS, QUERIES, JUDGED)


def test_verbs_and_mteb_agree_on_a_student(monkeypatch, desk, adapter, capsys):
    import mteb

    embedder = Embedder(adapter)
    expected = embedder.encode(TEXTS)
    write_jsonl("in.jsonl", [{"id": f"t{n}", "text": text, "group": n % 4} for n, text in enumerate(TEXTS)])
    assert flipkd(monkeypatch, "embed", adapter, "--input", "in.jsonl", "--output", "out.parquet") == 0
    found = np.array(pq.read_table("out.parquet")["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    assert flipkd(monkeypatch, "retrieve", adapter, "--data", "beir", "--output", "out") == 0
    with open("out/metrics.json") as file:
        metrics = json.load(file)
    with open("out/run.trec") as file:
        best = {line.split()[0]: line.split()[2] for line in file if line.split()[3] == "1"}
    nearest = (expected[30:] @ expected[:30].T).argmax(1)
    assert best == {f"q{n}": f"d{row}" for n, row in enumerate(nearest)}
    card = AdapterCard.read(adapter)
    assert metrics["encoder"] == {"name": str(adapter), **embedder.facts}
    assert (metrics["encoder"]["step"], metrics["encoder"]["max_length"]) == (card.step, card.max_length)

    relevant: dict[str, dict[str, int]] = {}
    for query, document, grade in JUDGED:
        relevant.setdefault(query, {})[document] = grade
    task = retrieval_task(CORPUS, {name: {"text": text} for name, text in QUERIES.items()}, relevant)
    model = MtebModel(embedder, "ours/student", max_batch_tokens=500)
    [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    assert result.scores["test"][0]["main_score"] == pytest.approx(metrics["retrieval"]["ndcg@10"], abs=2e-5)

    capsys.readouterr()
    assert flipkd(monkeypatch, "cluster", adapter, "--input", "in.jsonl", "--json", "--seeds", 1) == 0
    assert json.loads(capsys.readouterr().out)["encoder"]["fingerprint"] == embedder.facts["fingerprint"]


def test_other_weights_are_another_revision(adapter, tmp_path):
    first = MtebModel(Embedder(adapter), "ours/student")
    assert first.revision.startswith(f"step-{AdapterCard.read(adapter).step}-")
    assert MtebModel(Embedder(adapter), "ours/other").revision == first.revision
    other = saved_adapter(tmp_path, mode="alone", readout="mean")[0]
    assert MtebModel(Embedder(other), "ours/student").revision != first.revision


def test_an_empty_text_is_similar_to_nothing_in_mteb(adapter):
    embedder = Embedder(adapter)
    vectors = MtebModel(embedder, "ours/student").encode([{"text": [TEXTS[0], "", "\u200b"]}])
    np.testing.assert_allclose(vectors[0], embedder.encode(TEXTS[:1])[0], rtol=0, atol=1e-6)
    assert not vectors[1:].any()


def test_texts_that_were_cut_are_counted(adapter):
    embedder = Embedder(adapter)
    embedder.encode(["card " * 200, TEXTS[0]], done=lambda *_: None)
    assert embedder.num_truncated == 1
    embedder.encode(["card " * 200])
    assert embedder.num_truncated == 2


def test_a_search_takes_the_vectors_of_the_one_before(monkeypatch, desk, adapter, tmp_path, capsys):
    def search(output, *options):
        return flipkd(monkeypatch, "retrieve", *options, "--data", "beir", "--output", output, "--vectors", "kept")

    assert search("first", adapter) == 0 and search("second", adapter, "--ann", "hnsw") == 0
    runs = [(tmp_path / name / "run.trec").read_text() for name in ("first", "second")]
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("first", "second")]
    assert [one["search"]["documents_from_before"] for one in metrics] == [0, 30] and runs[0] == runs[1]
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    card = json.loads((other / "flipkd.json").read_text())
    (other / "flipkd.json").write_text(json.dumps({**card, "step": card["step"] + 1}))
    capsys.readouterr()
    assert search("third", other) == 2
    assert "flipkd: --vectors kept: has the vectors of another search (fingerprint, step)" in capsys.readouterr().err
