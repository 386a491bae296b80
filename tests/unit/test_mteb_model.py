"""MTEB runs small tasks of our own on an encoder, with no network, and finds what we find."""

import numpy as np
import pytest
from encoders import WIDTH, MadeUpEncoder, flipkd, made_up_vector, write_beir
from scipy.stats import spearmanr
from test_retrieve_folder import CORPUS, JUDGED, QUERIES, read_metrics

from flipkd_dist.errors import UserError
from flipkd_dist.mteb_model import MtebModel

METADATA = dict(
    description="A task of the tests.",
    reference=None,
    dataset={"path": "NA", "revision": "NA"},
    category="t2t",
    eval_splits=["test"],
    eval_langs=["eng-Latn"],
    date=None,
    dialect=[],
    domains=[],
    task_subtypes=[],
    license="not specified",
    annotations_creators="derived",
    modalities=["text"],
    sample_creation="found",
    bibtex_citation="",
)


def sts_task(one, other, scores):
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    class OurSTS(AbsTaskSTS):
        metadata = TaskMetadata(type="STS", name="OurSTS", main_score="cosine_spearman", **METADATA)
        min_score, max_score = 0, 1

        def load_data(self, **_):
            columns = {"sentence1": one, "sentence2": other, "score": scores}
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

    return OurSTS()


def retrieval_task(corpus, queries, relevant):
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    def table(texts):
        return Dataset.from_list([{"id": key, **value} for key, value in texts.items()])

    class OurRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(type="Retrieval", name="OurRetrieval", main_score="ndcg_at_10", **METADATA)

        def load_data(self, **_):
            parts = RetrievalSplitData(
                queries=table(queries), corpus=table(corpus), relevant_docs=relevant, top_ranked=None
            )
            self.dataset = {"default": {"test": parts}}
            self.data_loaded = True

    return OurRetrieval()


def evaluated(task):
    import mteb

    model = MtebModel(MadeUpEncoder(), "ours/made-up", "1")
    [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    [scores] = result.scores["test"]
    return scores


def test_the_model_is_one_of_mteb():
    from mteb.models import EncoderProtocol

    model = MtebModel(MadeUpEncoder(), "ours/made-up", "step-7")
    assert isinstance(model, EncoderProtocol)
    assert (model.mteb_model_meta.name, model.mteb_model_meta.revision) == ("ours/made-up", "step-7")
    vectors = model.encode([{"text": ["a", "b"]}, {"text": ["c"]}], task_metadata=None, hf_split="", hf_subset="")
    assert np.array_equal(vectors, np.array([made_up_vector(text) for text in "abc"]))
    one, other = 2 * vectors, 3 * vectors[::-1].copy()
    assert np.allclose(model.similarity(one, other), vectors @ vectors[::-1].T, atol=1e-6)
    assert np.allclose(model.similarity_pairwise(one, other), (vectors * vectors[::-1]).sum(1), atol=1e-6)
    assert model.similarity(one[0], other).shape == (1, 3)


def test_the_revision_is_the_encoders_own():
    class Trained(MadeUpEncoder):
        revision = "step-7-abc"

    assert MtebModel(Trained(), "ours/made-up").mteb_model_meta.revision == "step-7-abc"
    with pytest.raises(UserError, match="ours/made-up: this encoder has no revision"):
        MtebModel(MadeUpEncoder(), "ours/made-up")


def test_a_text_without_tokens_is_similar_to_nothing(said):
    class Picky(MadeUpEncoder):
        def has_tokens(self, texts):
            return [bool(text) for text in texts]

        def encode(self, texts):
            assert all(texts)
            return super().encode(texts)

    model = MtebModel(Picky(), "ours/made-up", "1")
    vectors = model.encode([{"text": ["a", ""]}, {"text": ["", "b"]}])
    assert not vectors[1:3].any() and np.array_equal(vectors[[0, 3]], MadeUpEncoder().encode(["a", "b"]))
    assert model.encode([{"text": [""]}]).shape == (1, WIDTH) and not model.similarity(vectors[1], vectors).any()
    assert model.num_without_tokens == 3 and said[0].startswith("2 texts have no token")


def test_a_task_of_pairs():
    draw = np.random.default_rng(0)
    one, other = ([f"{draw.integers(9)} {draw.integers(9)} x" for _ in range(40)] for _ in range(2))
    scores = draw.random(40).tolist()
    cosines = [float(made_up_vector(a) @ made_up_vector(b)) for a, b in zip(one, other, strict=True)]
    found = evaluated(sts_task(one, other, scores))
    assert found["main_score"] == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-5)


def test_a_task_of_retrieval(encoders, monkeypatch, tmp_path):
    """Texts all differ in their first words, so that no scores are equal: there the two break ties differently."""
    corpus = {name: {"title": "", "text": f"{name} {one['text']}"} for name, one in CORPUS.items()}
    queries = {name: {"text": text} for name, text in QUERIES.items() if name in {query for query, *_ in JUDGED}}
    write_beir(tmp_path / "beir", corpus, queries, JUDGED)
    assert flipkd(monkeypatch, "retrieve", "adapter", "--data", "beir", "--output", "out") == 0
    ours = read_metrics()["retrieval"]
    relevant = {}
    for query, document, grade in JUDGED:
        relevant.setdefault(query, {})[document] = grade
    theirs = evaluated(retrieval_task(corpus, queries, relevant))
    pairs = {"ndcg@10": "main_score", "mrr@10": "mrr_at_10", "recall@10": "recall_at_10", "recall@100": "recall_at_100"}
    for name, their_name in pairs.items():
        assert theirs[their_name] == pytest.approx(ours[name], abs=2e-5), name  # they round to five places
    assert 0 < ours["ndcg@10"] < 1
    assert encoders[0].dimension == WIDTH
