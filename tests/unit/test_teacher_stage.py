"""From a configuration to the teacher's signals: what is scored, what is kept, what training reads."""

import json
import logging

import numpy as np
import pytest
from tiny import fill_store, save_cross_encoder, save_student, save_teacher, write_pairs

from flipkd_dist import pipeline, score_stage
from flipkd_dist.calibration import fit
from flipkd_dist.config import RunConfig, validate
from flipkd_dist.contrast import contrast_rows
from flipkd_dist.cross_encoder import CrossEncoder
from flipkd_dist.errors import UserError
from flipkd_dist.pair_files import read_records
from flipkd_dist.pair_stream import PairStream
from flipkd_dist.preflight import Inputs, check_inputs
from flipkd_dist.score import survey
from flipkd_dist.store import pair_text
from flipkd_dist.teacher_stage import (
    calibrate,
    is_scored,
    off_diagonal_sample,
    open_signals,
    pair_texts_to_score,
    training_batches,
)

NUM_TRAIN, STEPS, BATCH = 21, 5, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_student(folder / "student")
    save_teacher(folder / "bi")
    save_cross_encoder(folder / "cross")
    return folder


@pytest.fixture
def configured(models, tmp_path):
    """A function from settings of `teacher` to a configuration; other sections are updated."""

    def make(teacher: dict, **sections) -> RunConfig:
        names = {key: str(models / teacher[key]) for key in ("model_name_or_path", "cross_encoder") if key in teacher}
        values = {
            "name": "x",
            "output_dir": str(tmp_path / "runs"),
            "data": {
                "train": write_pairs(tmp_path / "train.jsonl", NUM_TRAIN, 0),
                "validation": write_pairs(tmp_path / "validation.jsonl", 9, 1),
                "max_length": 64,
            },
            "teacher": {"max_length": 24, **teacher, **names},
            "student": {
                "model_name_or_path": str(models / "student"),
                "prompt": "same ? {text_a} | {text_b} =",
                "answers": ["yes", "no"],
            },
            "train": {"max_steps": STEPS, "per_device_train_batch_size": BATCH},
        }
        for name, changes in sections.items():
            values[name] = values.get(name, {}) | changes
        return validate(values, "test")

    return make


def filled(config: RunConfig) -> Inputs:
    fill_store(config)
    return check_inputs(config)


def raw_scores(models, pairs) -> np.ndarray:
    encoder = CrossEncoder(models / "cross", 48)
    return encoder.encode([pair_text(*texts) for texts in pairs.labelled_texts()], 64)[:, 0]


def sigmoid(scores):
    return 1 / (1 + np.exp(-scores.astype(np.float64)))


def test_a_cross_encoder_alone(configured, models):
    """L_dist stands on the labelled pairs, LoRA's rank is the cross-encoder's width, the store of texts is absent."""
    config = configured({"cross_encoder": "cross"}, loss={"mcl_weight": 0.0})
    before = check_inputs(config)
    assert not is_scored(before) and before.lora_rank == 24 and before.teacher is before.store is None
    inputs = filled(config)
    assert is_scored(inputs) and inputs.digest("train") == before.digest("train")
    for split, pairs in inputs.splits.items():
        expected = sigmoid(raw_scores(models, pairs))
        np.testing.assert_allclose(open_signals(inputs, split).of_pairs(), expected, atol=1e-5)
    assert expected.std() > 0.1
    assert [path.name for path in inputs.folder.teacher.iterdir()] == ["pairs"]
    for batch in training_batches(inputs):
        rows = contrast_rows(open_signals(inputs, "train"), batch, slice(0, len(batch)), None)
        assert np.array_equal(rows.keep.numpy(), np.eye(len(batch), dtype=bool))
    assert len(off_diagonal_sample(inputs, 100)) == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_neighbours_are_scored_for_every_batch_of_the_run(configured, symmetric):
    """Training asks for nothing that was not scored, and nothing is scored that it does not ask for."""
    config = configured({"cross_encoder": "cross", "neighbours": 2}, loss={"mcl_symmetric": symmetric})
    inputs = filled(config)
    batches = list(training_batches(inputs))
    assert [len(batch) for batch in batches] == [8, 8, 5, 8, 8]
    signals, pairs = open_signals(inputs, "train"), inputs.splits["train"]
    asked = set()
    original = signals.scored.of_texts
    object.__setattr__(signals.scored, "of_texts", lambda a, b: asked.update(map(pair_text, a, b)) or original(a, b))
    for batch in batches:
        whole = contrast_rows(signals, batch, slice(0, len(batch)), None)
        assert whole.off_diagonal.sum(1).tolist() == [2] * len(batch)
        if symmetric:
            swapped = contrast_rows(signals, batch, slice(0, len(batch)), None, swap=True)
            assert np.array_equal(swapped.off_diagonal.numpy(), whole.off_diagonal.numpy().T)
            assert np.array_equal(swapped.teacher_similarity.numpy(), whole.teacher_similarity.numpy().T)
    labelled = {pair_text(*texts) for table in inputs.splits.values() for texts in table.labelled_texts()}
    assert labelled | asked == set(pair_texts_to_score(inputs)) and len(asked - labelled) > len(pairs)
    found = off_diagonal_sample(inputs, 30)
    assert len(found) == 30 and np.ptp(found) > 0.1
    assert not is_scored(check_inputs(configured({"cross_encoder": "cross", "neighbours": 3})))


def test_both_encoders(configured, models):
    """The cross-encoder on the diagonal, the cosine elsewhere."""
    inputs = filled(configured({"cross_encoder": "cross", "model_name_or_path": "bi"}))
    assert inputs.lora_rank == 16 and is_scored(inputs)
    signals, pairs = open_signals(inputs, "train"), inputs.splits["train"]
    batch = next(training_batches(inputs))
    alpha, known = signals.of_batch(batch, slice(0, BATCH))
    expected = sigmoid(raw_scores(models, pairs))
    np.testing.assert_allclose(np.diag(alpha), expected[batch], atol=1e-5)
    first, second = ([pairs.texts[i] for i in side[batch]] for side in (pairs.text_a, pairs.text_b))
    cosine = inputs.store.open().vectors(first) @ inputs.store.open().vectors(second).T
    off = ~np.eye(BATCH, dtype=bool)
    np.testing.assert_allclose(alpha[off], cosine[off], atol=1e-5)
    assert known.all() and len(off_diagonal_sample(inputs, 50)) > 40


def flagembedding(path, config: RunConfig, score, others=()) -> str:
    """The run's pairs as FlagEmbedding's tool writes them, scored by `score(record)`, and other pairs besides."""
    with open(path, "w") as file:
        for data in (config.data.train, config.data.validation):
            for _, record in read_records(data):
                side = "pos" if record["label"] else "neg"
                line = {"query": record["text_a"], "pos": [], "neg": [], "pos_scores": [], "neg_scores": []}
                line[side], line[f"{side}_scores"] = [record["text_b"]], [score(record)]
                file.write(json.dumps(line) + "\n")
        for query, text, value in others:
            file.write(json.dumps({"query": query, "neg": [text], "neg_scores": [value]}) + "\n")
    return str(path)


def logit_of(record) -> float:
    return (2.0 if record["label"] else -2.0) + 0.01 * int(record["id"][1:])


def test_a_flagembedding_file_is_the_teacher_as_it_is(configured, tmp_path):
    teacher = {"scores": str(tmp_path / "scored.jsonl"), "scale": "logit"}
    config = configured(teacher, student={"lora_r": 8})
    with pytest.raises(UserError, match=r"teacher\.scores: .*scored\.jsonl: no such file"):
        check_inputs(config)
    records = [record for _, record in read_records(config.data.train)]
    others = [(records[3]["text_a"], records[5]["text_b"], -4.0), ("elsewhere", records[5]["text_b"], 9.0)]
    flagembedding(tmp_path / "scored.jsonl", config, logit_of, others)
    inputs = filled(config)
    assert is_scored(inputs) and inputs.lora_rank == 8
    signals = open_signals(inputs, "train")
    expected = sigmoid(np.array([logit_of(record) for record in records]))
    np.testing.assert_allclose(signals.of_pairs(), expected, atol=1e-6)
    alpha, known = signals.of_batch(np.array([5, 1, 3]), slice(0, 3))
    np.testing.assert_allclose(alpha[2, 0], sigmoid(np.array(-4.0)), atol=1e-6)
    assert known.tolist() == [[True, False, False], [False, True, False], [True, False, True]]
    held = {path.name for path in (inputs.folder.teacher / "pairs").glob("*.parquet")}
    fill_store(config)  # nothing new
    assert {path.name for path in (inputs.folder.teacher / "pairs").glob("*.parquet")} == held and len(held) == 1
    (shard,) = (inputs.folder.teacher / "pairs").glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (inputs.folder.teacher / "pairs" / "manifest.json").unlink()
    fill_store(config)  # a damaged shard that nobody has published is written again
    np.testing.assert_allclose(open_signals(check_inputs(config), "train").of_pairs(), expected, atol=1e-6)
    before = inputs.digest("train")
    flagembedding(tmp_path / "scored.jsonl", config, lambda record: logit_of(record) + 1, others)
    changed = check_inputs(config)
    assert not is_scored(changed) and changed.digest("train") != before


def test_scores_without_any_pair_off_the_diagonal(configured, tmp_path):
    config = configured({"scores": str(tmp_path / "scored.jsonl"), "scale": "logit"}, student={"lora_r": 8})
    flagembedding(tmp_path / "scored.jsonl", config, logit_of)
    with pytest.raises(UserError, match=r"loss\.mcl_weight: the teacher knows no pair off the diagonal"):
        off_diagonal_sample(filled(config), 100)


@pytest.mark.parametrize("kind", ["bi", "cross", "both"])
def test_calibration_is_fitted_per_source_and_read_by_workers(configured, models, caplog, kind):
    names = {"bi": {"model_name_or_path": "bi"}, "cross": {"cross_encoder": "cross"}}
    teacher = {
        **(names["bi"] if kind != "cross" else {}),
        **(names["cross"] if kind != "bi" else {}),
        "calibrate": True,
    }
    plain = filled(configured(teacher | {"calibrate": False}, loss={"mcl_weight": 0.0}))
    pairs = plain.splits["train"]
    cosines = open_signals(plain, "train").cosines() if kind != "cross" else None
    logits = raw_scores(models, pairs) if kind != "bi" else None
    # The random models' seeds are chosen so.
    assert all(np.corrcoef(scores, pairs.label)[0, 1] > 0.2 for scores in (cosines, logits) if scores is not None)
    config = configured(teacher, loss={"mcl_weight": 0.0})
    with pytest.raises(UserError, match=r"calibration\.json: missing, .*: run `flipkd score` first"):
        open_signals(check_inputs(config), "train")
    assert not is_scored(check_inputs(config))
    with caplog.at_level(logging.INFO, "flipkd_dist"):
        inputs = filled(config)
    assert caplog.text.count("teacher.calibrate: ") == (2 if kind == "both" else 1) and "Brier score" in caplog.text
    assert is_scored(inputs)
    own = cosines if kind == "bi" else logits
    found = open_signals(inputs, "train").of_pairs()
    np.testing.assert_allclose(found, fit(own, pairs.label, "it").probability(own), atol=1e-6)
    if kind == "both":
        batch = np.arange(6)
        alpha, _ = open_signals(inputs, "train").of_batch(batch, slice(0, 6))
        raw, _ = open_signals(plain, "train").of_batch(batch, slice(0, 6))
        off = ~np.eye(6, dtype=bool)
        np.testing.assert_allclose(alpha[off], fit(cosines, pairs.label, "it").probability(raw[off]), atol=1e-6)
    file = inputs.folder.teacher / "calibration.json"
    kept = file.read_bytes()
    file.unlink()
    calibrate(inputs)
    assert file.read_bytes() == kept
    file.write_text(json.dumps(json.loads(kept) | {"inputs": "other"}))
    with pytest.raises(UserError, match="fitted on other pairs or scores"):
        open_signals(inputs, "train")


def test_a_score_outside_the_declared_scale_names_its_pair(configured):
    config = configured({"cross_encoder": "cross", "scale": "probability"}, loss={"mcl_weight": 0.0})
    inputs = filled(config)
    with pytest.raises(UserError, match=r"teacher\.scale = probability: the pair '.*', '.*' has the score"):
        open_signals(inputs, "train")


def test_the_digest_follows_the_teacher_of_pairs(configured):
    bi = check_inputs(configured({"model_name_or_path": "bi"})).digest("train")
    both = check_inputs(configured({"model_name_or_path": "bi", "cross_encoder": "cross"}))
    longer = check_inputs(configured({"model_name_or_path": "bi", "cross_encoder": "cross", "max_length": 23}))
    assert len({bi, both.digest("train"), longer.digest("train")}) == 3
    assert both.calibration_key != longer.calibration_key


def test_pairs_as_a_stream_and_as_tables_give_the_same_numbers(configured, monkeypatch):
    config = configured({"model_name_or_path": "bi"})
    inputs, told = filled(config), []
    monkeypatch.setattr(score_stage, "fill_store", lambda config, job: list(job.texts()))
    monkeypatch.setattr(score_stage, "tell", lambda inputs, found, num_texts: told.append((found, num_texts)))
    score_stage.score_tables(inputs)
    pairs = PairStream(config.data)
    num_texts, is_complete = survey(pairs.texts(check_ids=True), inputs.store)
    score_stage.score_streams(check_inputs(config, splits=()), pairs, num_texts)
    (tables, tables_texts), (stream, stream_texts) = told
    assert is_complete and tables_texts == stream_texts and tables.worst == stream.worst
    for name in ("similarity", "label", "off_diagonal"):
        assert np.array_equal(getattr(tables, name), getattr(stream, name)), name
    assert len(stream.off_diagonal) > 50_000


def test_room_for_training_workers_is_asked_for_where_there_will_be_some(configured, monkeypatch):
    asked = []
    for name in ("join_or_start_ray", "check_room"):
        monkeypatch.setattr(pipeline, name, lambda config, name=name: asked.append(name))
    monkeypatch.setattr(pipeline, "score_tables", lambda inputs: None)
    config = configured({"model_name_or_path": "bi", "calibrate": True})
    pipeline.score_files(config)  # by way of a Pipeline, for the curve is fitted on tables
    assert asked == ["join_or_start_ray"]
    pipeline.Pipeline(config)
    assert asked == ["join_or_start_ray"] * 2 + ["check_room"]
