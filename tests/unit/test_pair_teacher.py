"""Settings of the teacher that contradict each other or would do nothing, and labelled pairs without a score."""

import json

import pytest
from tiny import pair_table

from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_teacher import check_settings, pair_source

BI = {"model_name_or_path": "bi"}
CROSS = {"cross_encoder": "cross"}
NO_MCL = {"loss": {"mcl_weight": 0.0}}


def config(teacher, **sections) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "teacher": teacher, **sections})


@pytest.mark.parametrize(
    ("teacher", "sections"),
    [
        (BI, {}),
        ({}, {}),  # its own message: model_name_or_path is missing
        (BI | {"calibrate": True, "scale": "cosine", "pooling": "cls"}, {}),
        (BI | CROSS | {"scale": "logit", "neighbours": 3, "calibrate": True, "prompt": "q: "}, {}),
        (CROSS | {"neighbours": 3}, {}),
        (CROSS, NO_MCL),
        ({"scores": "s.jsonl"}, {"student": {"lora_r": 8}}),
        (BI | {"scores": ["s.jsonl"], "scale": "logit"}, {}),
    ],
)
def test_what_fits_together(teacher, sections):
    check_settings(config(teacher, **sections))


@pytest.mark.parametrize(
    ("teacher", "sections", "words"),
    [
        (CROSS | {"scores": "s.jsonl"}, {}, ["teacher.scores", "remove one"]),
        (BI | {"neighbours": 2}, {}, ["teacher.neighbours", "name one or set it to 0"]),
        (BI | {"scores": "s.jsonl", "neighbours": 2}, {}, ["teacher.neighbours"]),
        (
            CROSS | {"neighbours": 2},
            {"loss": {"mcl_weight": 0.0, "dist_weight": 0.0}},
            ["teacher.neighbours", "no use"],
        ),
        (BI | {"scale": "logit"}, {}, ["teacher.scale = logit", "set it to auto"]),
        (BI | {"scale": "probability"}, {}, ["teacher.scale = probability"]),
        (CROSS | {"pooling": "cls"}, NO_MCL, ["teacher.pooling", "remove it"]),
        (CROSS | {"prompt": "q: "}, NO_MCL, ["teacher.prompt"]),
        (CROSS | {"weights": [1.0]}, NO_MCL, ["teacher.weights"]),
        (CROSS | {"api_base": "http://x/v1"}, NO_MCL, ["teacher.api_base"]),
        (CROSS, {}, ["teacher.model_name_or_path to a bi-encoder", "teacher.neighbours", "loss.mcl_weight to 0"]),
        ({"scores": "s.jsonl"}, {}, ["student.lora_r", "set it", "teacher.model_name_or_path"]),
    ],
)
def test_what_does_not(teacher, sections, words):
    with pytest.raises(UserError) as error:
        check_settings(config(teacher, **sections))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_every_labelled_pair_needs_a_score(tmp_path):
    tables = {"train": pair_table(8), "validation": pair_table(5, seed=1)}
    records = [{"text_a": a, "text_b": b, "score": 0.5} for pairs in tables.values() for a, b in pairs.labelled_texts()]
    path = tmp_path / "scores.jsonl"
    settings = config({"scores": str(path)}, student={"lora_r": 8})

    def written(kept):
        path.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        return settings, tables

    assert len(pair_source(*written(records)).scores) == len({(r["text_a"], r["text_b"]) for r in records})
    with pytest.raises(UserError, match=r"2 of 5 pairs of data.validation have no score, the first is 1 \('"):
        pair_source(*written([*records[:9], *records[10:12]]))
    turned = {"text_a": records[0]["text_b"], "text_b": records[0]["text_a"], "score": 0.5}
    with pytest.raises(UserError, match=r"1 of 8 pairs of data.train .* in this order of texts"):
        pair_source(*written([turned, *records[1:]]))
    assert pair_source(config({"model_name_or_path": "bi"}), tables) is None
