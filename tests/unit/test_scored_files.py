"""Files of scored pairs: both forms, every mistake with its line, the scale."""

import csv
import json
import logging

import numpy as np
import pytest

from flipkd_dist.config import DataConfig, TeacherConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_files import write_records
from flipkd_dist.scored_files import read_scored_pairs

TEXTS = ["lost card", "stolen  card", "花呗 怎么还", "new pin"]
CANONICAL = [("lost card", "stolen card", 0.75), ("lost card", "new pin", 0.125), ("花呗 怎么还", "lost card", 1.0)]


def read(paths, texts=TEXTS, scale="auto", **columns):
    paths = [str(path) for path in paths] if isinstance(paths, list) else str(paths)
    return read_scored_pairs(TeacherConfig(scores=paths, scale=scale), DataConfig(**columns), texts)


def found(scored) -> dict:
    assert scored.first.dtype == scored.second.dtype == np.int64 and scored.scores.dtype == np.float32
    numbers = zip(scored.first, scored.second, scored.scores, strict=True)
    return {(scored.texts[a], scored.texts[b]): float(score) for a, b, score in numbers}


def mistake(*arguments, **settings) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments, **settings)
    assert "\n" not in str(error.value) and str(error.value).startswith("teacher.")
    return str(error.value)


def write(path, *records) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_canonical_records(tmp_path, suffix):
    path = tmp_path / f"scores.{suffix}"
    rows = [
        {"text_a": a.replace(" ", "  "), "text_b": b.replace(" ", "   "), "score": score} for a, b, score in CANONICAL
    ]
    write_records({path: rows})
    assert found(read(path)) == {(a, b): score for a, b, score in CANONICAL}


def test_columns_of_other_names_and_pairs_of_other_texts(tmp_path):
    path = tmp_path / "scores.csv"
    with path.open("w", newline="") as file:
        rows = [
            ("one", "two", "score", "label"),
            ("lost card", "new pin", "0.5", "1"),
            ("another", "new pin", "0.25", "0"),
        ]
        csv.writer(file).writerows(rows)
    assert found(read(path, text_a="one", text_b="two")) == {("lost card", "new pin"): 0.5}


def test_flagembedding_as_its_tool_writes_it(tmp_path):
    record = {
        "query": "lost card",
        "pos": ["stolen card"],
        "neg": ["new pin", "elsewhere"],
        "pos_scores": [5.5],
        "neg_scores": [-3, 0.5],
        "prompt": "Represent this",
        "type": "normal",
    }
    path = write(
        tmp_path / "minedHN_score.jsonl",
        record,
        {"query": "new pin", "pos": [], "neg": ["lost card"], "neg_scores": [-1.5]},
    )
    scored = read(path, scale="logit")
    assert scored.scale == "logit"
    assert found(scored) == {
        ("lost card", "stolen card"): 5.5,
        ("lost card", "new pin"): -3,
        ("new pin", "lost card"): -1.5,
    }


def test_several_files_and_their_fingerprint(tmp_path):
    one = write(tmp_path / "a.jsonl", {"text_a": "lost card", "text_b": "new pin", "score": 0.5})
    other = write(tmp_path / "b.jsonl", {"text_a": "new pin", "text_b": "lost card", "score": 0.25})
    both = read([one, other])
    assert found(both) == {("lost card", "new pin"): 0.5, ("new pin", "lost card"): 0.25}
    keys = {both.spec.key, read(one).spec.key, read(other).spec.key}
    write(tmp_path / "a.jsonl", {"text_a": "lost card", "text_b": "new pin", "score": 0.6})
    assert len(keys | {read(one).spec.key}) == 4
    assert both.spec.hidden_size == 1 and both.spec.dtype == "float32"
    assert read(one, texts=TEXTS[:2]).spec == read(one).spec  # of the files alone


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text_a": "lost card", "text_b": "new pin"}, ["a pair without a score"]),
        ({"text_a": "lost card", "score": 0.5}, ["no column text_b"]),
        ({"text_a": "lost card", "text_b": "new pin", "score": "high"}, ["score is 'high'", "write a number"]),
        ({"text_a": "lost card", "text_b": "new pin", "score": True}, ["score is True", "write a number"]),
        ({"text_a": "lost card", "text_b": "new pin", "score": None}, ["a pair without a score"]),
        ({"text_a": "lost card", "text_b": "new pin", "score": float("nan")}, ["a pair without a score"]),
        ({"query": "lost card", "pos": ["new pin"], "neg": []}, ["a pair without a score"]),
        ({"query": "lost card", "pos": ["a"], "pos_scores": [1, 0]}, ["pos has 1 texts", "pos_scores 2"]),
        ({"query": "lost card", "pos": [], "neg": ["a"], "neg_scores": 1}, ["neg_scores is 1, not a list"]),
        ({"query": "lost card", "pos": [], "neg": [3], "neg_scores": [1]}, ["neg[0] is 3, not a text"]),
        ({"query": "", "pos": [], "neg": ["a"], "neg_scores": [1]}, ["query is empty"]),
    ],
)
def test_mistakes_name_their_line(tmp_path, record, words):
    good = {"text_a": "lost card", "text_b": "stolen card", "score": 0.5}
    if "query" in record:
        good = {"query": "lost card", "pos": ["stolen card"], "pos_scores": [0.5]}
    said = mistake(write(tmp_path / "scores.jsonl", good, record), scale="logit")
    assert f"{tmp_path}/scores.jsonl:2: " in said and all(word in said for word in words), said


def test_two_scores_of_one_pair(tmp_path):
    one, same = (
        {"text_a": "lost card", "text_b": "new pin", "score": 0.5},
        {"text_a": "lost  card", "text_b": "new pin", "score": 0.5},
    )
    assert len(found(read(write(tmp_path / "a.jsonl", one, same)))) == 1
    path = write(
        tmp_path / "b.jsonl", one, {"text_a": "new pin", "text_b": "lost card", "score": 0.1}, {**same, "score": 0.6}
    )
    assert f"{path}:1 and {path}:3 give one pair two" in mistake(path)
    both = [write(tmp_path / "c.jsonl", one), write(tmp_path / "d.jsonl", {**same, "score": 0.6})]
    assert f"{both[0]}:1 and {both[1]}:1 give one pair two" in mistake(both)


def test_files_that_are_not_there_or_empty(tmp_path):
    assert "no such file" in mistake(tmp_path / "none.jsonl") and "no such file" in mistake("org/name:train")
    assert "unknown extension" in mistake(write(tmp_path / "scores.txt", {}))
    assert "no scored pairs" in mistake(write(tmp_path / "empty.jsonl"))
    full = write(tmp_path / "full.jsonl", {"text_a": "lost card", "text_b": "new pin", "score": 0.5})
    assert f"{tmp_path}/empty.jsonl: no scored pairs" in mistake([full, tmp_path / "empty.jsonl"])


def test_the_scale(tmp_path, caplog):
    def scores(*values):
        return write(
            tmp_path / "s.jsonl", *({"text_a": f"t{i}", "text_b": "u", "score": v} for i, v in enumerate(values))
        )

    with caplog.at_level(logging.INFO, "flipkd_dist"):
        assert read(scores(0, 0.5, 1)).scale == "probability"
    assert "taken as probabilities" in caplog.text
    for values, line, shown in (([0, 1.5, 0.2], 2, "1.5"), ([0, 0.2, -0.1], 3, "-0.1")):
        said = mistake(scores(*values))
        assert f"s.jsonl:{line}: the score {shown} lies outside [0, 1]: set teacher.scale to cosine or logit" in said
        assert "probability they are not" in mistake(scores(*values), scale="probability")
        assert read(scores(*values), scale="logit").scale == "logit"
    assert read(scores(-0.5, 1), scale="cosine").scale == "cosine"
    assert "s.jsonl:1: the score -3 lies outside [-1, 1]" in mistake(scores(-3, 1), scale="cosine")


def test_scores_of_the_tool_beyond_probabilities_are_logits(tmp_path):
    record = {"query": TEXTS[0], "pos": [TEXTS[1]], "neg": [TEXTS[2]], "pos_scores": [4.5], "neg_scores": [-3.0]}
    assert read(write(tmp_path / "scores.jsonl", record)).scale == "logit"
    record |= {"pos_scores": [0.9], "neg_scores": [0.1]}
    assert read(write(tmp_path / "scores.jsonl", record)).scale == "probability"


def test_rounding_apart_is_one_score(tmp_path):
    one = {"query": TEXTS[0], "pos": [TEXTS[1]], "pos_scores": [-2.0], "neg": [], "neg_scores": []}
    scored = read(write(tmp_path / "scores.jsonl", one, one | {"pos_scores": [-2.004]}), scale="logit")
    assert scored.scores.tolist() == [-2.0]
