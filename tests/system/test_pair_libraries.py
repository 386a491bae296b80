"""What `flipkd convert` writes, read by the libraries it is written for."""

from itertools import product

import pytest

from flipkd_dist.convert_command import convert
from flipkd_dist.pair_files import write_records

TEXTS = ['a "quoted" text, with a comma', "tab\there", "two\nlines", "我的卡在哪里", "🙂"]
PAIRS = [
    {"text_a": text, "text_b": TEXTS[(k + step) % 5], "label": label, "score": (1 + k) / 8 + label / 3}
    for k, text in enumerate(TEXTS)
    for step, label in ((1, 1), (2, 0))
]
COLUMNS = {
    "sentence_transformers": ["sentence1", "sentence2", "label"],
    "triplets": ["anchor", "positive", "negative"],
    "mteb": ["sentence1", "sentence2", "labels"],
    "flagembedding": ["query", "pos", "neg", "pos_scores", "neg_scores"],
    "tevatron": ["query_id", "query", "positive_passages", "negative_passages"],
}
BUILDERS = {"jsonl": "json", "csv": "csv", "parquet": "parquet"}


def loaded(tmp_path, target, extension):
    from datasets import load_dataset

    write_records({tmp_path / "pairs.jsonl": PAIRS})
    convert(f"{tmp_path}/pairs.jsonl", f"{tmp_path}/out.{extension}", target)
    return load_dataset(
        BUILDERS[extension], data_files=f"{tmp_path}/out.{extension}", split="train", cache_dir=f"{tmp_path}/cache"
    )


LISTS = ("flagembedding", "tevatron")  # in a record, for which CSV has no place
WRITTEN = [pair for pair in product(COLUMNS, BUILDERS) if not (pair[0] in LISTS and pair[1] == "csv")]


@pytest.mark.parametrize(("target", "extension"), WRITTEN)
def test_datasets_reads_it(tmp_path, target, extension):
    found = loaded(tmp_path, target, extension)
    assert found.column_names == COLUMNS[target]
    if "sentence1" in found.column_names:
        label = found.column_names[2]
        given = [(pair["text_a"], pair["text_b"], pair["label"]) for pair in PAIRS]
        assert [(row["sentence1"], row["sentence2"], row[label]) for row in found] == given
    elif target == "tevatron":
        assert [[passage["text"] for passage in row["positive_passages"]] for row in found] == [
            [TEXTS[(k + 1) % 5]] for k in range(5)
        ]
    elif target == "flagembedding":
        assert [row["neg_scores"] for row in found] == [[(1 + k) / 8] for k in range(5)]


@pytest.mark.parametrize("extension", BUILDERS)
@pytest.mark.parametrize("target, texts", [("sentence_transformers", 2), ("triplets", 3)])
def test_sentence_transformers_takes_the_columns_for_what_they_are(tmp_path, target, texts, extension):
    from sentence_transformers.data_collator import SentenceTransformerDataCollator

    rows, seen = list(loaded(tmp_path, target, extension)), []

    def tokenize(batch, **_):
        seen.append(list(batch))
        return {}

    batch = SentenceTransformerDataCollator(tokenize)(rows)
    names = COLUMNS[target][:texts]
    assert seen == [[row[name] for row in rows] for name in names]  # in this order: first text, second text (, third)
    assert (
        batch["label"].tolist() == [pair["label"] for pair in PAIRS] if target != "triplets" else "label" not in batch
    )
