"""A student tuned as a whole: its parameters, its folder in plain transformers, and what is refused."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from matchers import PROBE, single_scores
from peft_reference import CARD
from plain_folder import plain_answers
from safetensors.torch import load_file
from tiny import pair_table, save_student, started_student
from transformers import AutoModelForCausalLM

from flipkd_dist import adapter, tuned_folder, workbench
from flipkd_dist.adapter import save_tuned
from flipkd_dist.base import check_base
from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import RunConfig, StudentConfig, TrainConfig
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import pair_texts
from flipkd_dist.export import export
from flipkd_dist.planner_shape import student_shape
from flipkd_dist.predict import Matcher
from flipkd_dist.preflight import check_inputs, check_precision
from flipkd_dist.registry import model_card
from flipkd_dist.workbench import name_unread

TEXTS = pair_texts(pair_table(5))


def moved_student(folder, family: str):
    """A student of full tuning, every tensor of which is a little off the base's, and the folder of the base."""
    base = save_student(folder / "base", family)
    student, encoder = started_student(base, tuning="full", rank=None)
    generator = torch.Generator().manual_seed(3)
    for parameter in student.trained_parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return student, encoder, base


def state_of(student) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in student.trained_parameters().items()}


def card_of(student, encoder):
    with torch.no_grad():
        [[p_match, _]] = single_scores(student.eval(), encoder, [PROBE])
    reading = {"tuning": "full", "readout": "mean", "encoder_module": None}
    return dataclasses.replace(
        CARD, **reading, probe=dataclasses.replace(CARD.probe, text_a=PROBE[0], text_b=PROBE[1], p_match=p_match)
    )


@pytest.fixture(scope="module", params=["glm", "qwen2"])
def saved(request, tmp_path_factory):
    """A student, its encoder, its base's folder (tied: qwen2) and its own."""
    root = tmp_path_factory.mktemp(request.param)
    student, encoder, base = moved_student(root, request.param)
    save_tuned(root / "run" / "adapter", base, state_of(student), encoder, card_of(student, encoder))
    return student, encoder, base, root / "run" / "adapter"


def test_every_weight_is_trained(saved):
    """The output matrix is dropped: of it the answers' two rows are trained, and nothing of a tied embedding twice."""
    student, _, base, _ = saved
    found, stored = student.trained_parameters(), load_file(base / "model.safetensors")
    assert found.keys() == stored.keys() - {"lm_head.weight"} | {"answer_rows"}
    stored["answer_rows"] = torch.zeros(2, 48)
    assert all(value.shape == stored[name].shape for name, value in found.items())
    assert student.behind_readouts() == {"answer_rows"}


def test_the_readout_is_the_mean_of_the_last_hidden_states(saved):
    student, encoder, _, folder = saved
    [states] = plain_answers(folder, TEXTS[:1])[1]
    encoded = encoder.encode(*TEXTS[0])
    with torch.no_grad():
        _, *found = student.eval()(**BatchMaker(encoder, student, False)(TEXTS[:1]).tensors("cpu"))
    start = len(encoder.prefix)
    for text, span in zip(found, (encoded.text_a, encoded.text_b), strict=True):
        np.testing.assert_allclose(text[0], states[start:][span].mean(axis=0), rtol=0, atol=1e-5)


def test_matcher_and_plain_transformers_answer_as_the_student(saved, monkeypatch):
    student, encoder, base, folder = saved
    expected = single_scores(student, encoder, TEXTS)
    (base / "model.safetensors").rename(base / "hidden")  # the folder does without its base
    try:
        np.testing.assert_allclose(np.stack(Matcher(folder).predict(TEXTS), axis=1), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(plain_answers(folder, TEXTS)[0], expected[:, 0], rtol=0, atol=1e-5)
    finally:
        (base / "hidden").rename(base / "model.safetensors")
    untuned = single_scores(*started_student(base), TEXTS)
    assert np.abs(untuned[:, 0] - expected[:, 0]).max() > 1e-2


def test_the_last_hidden_states_are_the_students(saved):
    student, encoder, _, folder = saved
    for (a, b), states in zip(TEXTS, plain_answers(folder, TEXTS)[1], strict=True):
        ids = torch.tensor([encoder.prefix + encoder.encode(a, b).ids])
        with torch.no_grad():
            wanted = student.causal_lm.base_model(input_ids=ids).last_hidden_state[0]
        np.testing.assert_allclose(states, wanted, rtol=0, atol=1e-5)


def test_of_the_output_matrix_two_rows_are_new(saved):
    student, encoder, base, folder = saved
    written, before = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    matrix = before.get("lm_head.weight", before["model.embed_tokens.weight"])
    rows = [row for row in range(len(matrix)) if row not in encoder.answer_ids]
    assert torch.equal(written["lm_head.weight"][rows], matrix[rows])
    assert torch.equal(written["lm_head.weight"][encoder.answer_ids], student.answer_rows.data)
    assert not torch.equal(written["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    config = json.loads((folder / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["dtype"]) == (False, "float32")


def test_a_large_folder_comes_in_shards(saved, tmp_path, monkeypatch):
    student, encoder, base, _ = saved
    monkeypatch.setattr(tuned_folder, "SHARD", "100KB")
    save_tuned(tmp_path / "adapter", base, state_of(student), encoder, card_of(student, encoder))
    assert len(list((tmp_path / "adapter").glob("model-*.safetensors"))) > 1
    expected = single_scores(student, encoder, TEXTS)
    np.testing.assert_allclose(
        np.stack(Matcher(tmp_path / "adapter").predict(TEXTS), axis=1), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "model.norm.weight is missing or unexpected"),
        ("extra", "model.norm.bias is missing or unexpected"),
        ("shape", r"model.norm.weight has shape \[47\], not \[48\]"),
        ("nan", "model.norm.weight is not finite: lower train.learning_rate"),
        ("unmoved", "layer 1 is the base's own, nothing was learnt there: train longer"),
    ],
)
def test_a_wrong_state_is_not_exported(saved, tmp_path, how, message):
    student, encoder, base, _ = saved
    state, before = state_of(student), load_file(base / "model.safetensors")
    if how == "missing":
        del state["model.norm.weight"]
    elif how == "extra":
        state["model.norm.bias"] = torch.zeros(48)
    elif how == "shape":
        state["model.norm.weight"] = torch.zeros(47)
    elif how == "nan":
        state["model.norm.weight"][3] = float("nan")
    else:
        state |= {name: value for name, value in before.items() if ".layers.1." in name}
    with pytest.raises(RuntimeError, match=message) as error:
        save_tuned(tmp_path / "adapter", base, state, encoder, card_of(student, encoder))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())  # nor a draft as large as the model


def test_one_tensor_of_a_layer_is_enough(saved, tmp_path):
    student, encoder, base, _ = saved
    state = load_file(base / "model.safetensors")
    state = {name: value for name, value in state.items() if name != "lm_head.weight"}
    state |= {name: value for name, value in state_of(student).items() if name.endswith("input_layernorm.weight")}
    state["answer_rows"] = student.answer_rows.data
    save_tuned(tmp_path / "adapter", base, state, encoder, card_of(student, encoder))


def test_a_folder_that_answers_otherwise_is_refused(saved, tmp_path):
    student, encoder, base, _ = saved
    state = state_of(student)
    card = card_of(student, encoder)
    state["answer_rows"] = state["answer_rows"].flip(0)
    save_tuned(tmp_path / "adapter", base, state, encoder, card)
    with pytest.raises(RuntimeError, match="answers its probe pair with"):
        Matcher(tmp_path / "adapter")


def test_a_kill_leaves_the_folder_before(saved, tmp_path, monkeypatch):
    student, encoder, base, _ = saved
    card = card_of(student, encoder)
    save_tuned(tmp_path / "adapter", base, state_of(student), encoder, card)
    before = (tmp_path / "adapter" / "model.safetensors").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter, "verify_tuned", die)
    with pytest.raises(KeyboardInterrupt):
        save_tuned(tmp_path / "adapter", base, {n: v * 2 for n, v in state_of(student).items()}, encoder, card)
    assert (tmp_path / "adapter" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def config_of(base, **student) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "x", "student": {"model_name_or_path": str(base), "tuning": "full", **student},
         "distributed": {"deepspeed": None}}
    )  # fmt: skip


def test_what_full_tuning_cannot_do(saved, tmp_path):
    _, _, base, folder = saved
    with pytest.raises(UserError, match=r"nothing to merge: copy it"):
        export(str(folder), tmp_path / "merged")
    with pytest.raises(UserError, match=r"^--base-model .* holds all of its model's weights: leave it out"):
        Matcher(folder, str(base))
    with pytest.raises(UserError, match=r"^student\.tuning: full in bf16 needs the fp32 master weights"):
        check_precision(config_of(base), bf16=True)
    with pytest.raises(UserError, match=r"^student\.tuning: full in bf16"):  # before any data are read
        check_inputs(config_of(base).model_copy(update={"train": TrainConfig(bf16=True)}))
    check_precision(config_of(base), bf16=False)
    with pytest.raises(UserError, match=r"^student\.tuning: full: memory and traffic are known for LoRA alone"):
        student_shape(config_of(base))
    published = save_student(tmp_path / "glm", "glm_original")
    with pytest.raises(UserError, match=r"^student\.tuning: tiny is an original GLM: .*: take lora$"):
        check_base(published, StudentConfig(model_name_or_path="tiny", tuning="full"))


def test_settings_of_lora_are_named(saved, monkeypatch, caplog):
    monkeypatch.setattr(workbench.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="flipkd_dist"):
        name_unread(config_of(saved[2]))
        assert not caplog.messages
        name_unread(config_of(saved[2], lora_r=8, lora_alpha=8.0, lora_dropout=0.1))
    # A set: pytest may listen at the logger and at the root, where an earlier test has stopped propagation.
    assert {text.split()[1] for text in caplog.messages} == {f"student.lora_{key}" for key in ("r", "alpha", "dropout")}


def test_the_card_says_that_no_base_is_needed(saved):
    student, encoder, base, _ = saved
    text = model_card(config_of(base), card_of(student, encoder), None)
    assert "LoRA" not in text and "it needs no base" in text and "library_name: transformers" in text
    assert "read-out: mean of the last hidden states" in text and "p(match) is the answer to a prompt" in text


def test_the_card_says_how_texts_are_read(saved):
    config = config_of(saved[2])
    config.loss.contrastive, config.loss.margin = "infonce", 0.0
    card = dataclasses.replace(CARD, mode="alone", readout="lasttoken", bidirectional=True)
    text = model_card(config, card, None)
    assert "read-out: last hidden state at the prompt's last token; step 7" in text
    assert "each text is encoded alone, in both directions; p(match) = (1 + cosine of the two read-outs) / 2" in text
    assert "infonce 0.1" in text and "mcl" not in text
    text = model_card(config, dataclasses.replace(CARD, readout="mean"), None)  # with LoRA
    assert "read-out: mean of the last hidden states" in text and "peft" in text
    assert "encoded alone, causally" in model_card(config, dataclasses.replace(CARD, mode="alone"), None)


def test_the_folder_keeps_its_direction(saved, tmp_path):
    """config.json says that tokens see those behind them, and plain transformers reads them so."""
    student, encoder, base, folder = saved
    card = dataclasses.replace(card_of(student, encoder), mode="alone", bidirectional=True)
    save_tuned(tmp_path / "adapter", base, state_of(student), encoder, card)
    assert json.loads((tmp_path / "adapter" / "config.json").read_text())["is_causal"] is False
    assert "is_causal" not in json.loads((folder / "config.json").read_text())
    rows = torch.tensor([[5, 6, 7], [5, 6, 8]])
    for attention in ("eager", "sdpa"):
        for path, causal in ((folder, True), (tmp_path / "adapter", False)):
            body = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention).base_model
            with torch.no_grad():
                first, second = body(rows).last_hidden_state[:, 0]
            assert torch.allclose(first, second, atol=1e-4) == causal
