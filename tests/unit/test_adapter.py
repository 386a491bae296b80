"""The adapter folder: plain PEFT gives the same answers, nothing wrong is exported, a kill leaves no half of it."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from peft_reference import CARD, plain_peft
from safetensors.torch import load_file, save_file
from tiny import pair_table, save_student, started_student

from flipkd_dist import adapter
from flipkd_dist.adapter import WEIGHTS, AdapterCard, check_probe, load_weights, save_adapter, verify_adapter
from flipkd_dist.batches import BatchMaker
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import pair_texts, student_scores
from flipkd_dist.world import World

TEXTS = pair_texts(pair_table(5))


def lora_state(student) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in student.trained_parameters().items()}


@pytest.fixture
def saved(tmp_path):
    """A student and its adapter folder."""
    student, encoder = started_student(save_student(tmp_path / "base"))
    save_adapter(tmp_path / "run" / "adapter", student, lora_state(student), encoder.tokenizer, CARD)
    return student, encoder, tmp_path / "run" / "adapter"


def test_plain_peft_gives_the_same_answers(saved, tmp_path):
    student, encoder, folder = saved
    assert load_file(folder / WEIGHTS).keys() == get_peft_model_state_dict(student.model).keys()  # as PEFT names them
    scores = student_scores(student, World(), BatchMaker(encoder, student, True), TEXTS, 8)[0]
    np.testing.assert_allclose(plain_peft(tmp_path / "base", folder, TEXTS), scores, rtol=0, atol=1e-6)
    base, _ = started_student(tmp_path / "base")
    for name, parameter in base.trained_parameters().items():
        parameter.data.mul_(".lora_A." in name)
    untrained = student_scores(base, World(), BatchMaker(encoder, base, True), TEXTS, 8)[0]
    assert np.abs(untrained - scores).max() > 1e-3


def test_a_student_starts_from_the_saved_weights(saved, tmp_path):
    student, _, folder = saved
    other, _ = started_student(tmp_path / "base")
    for parameter in other.trained_parameters().values():
        parameter.data.zero_()
    load_weights(other, folder / WEIGHTS)
    for name, value in student.trained_parameters().items():
        assert torch.equal(other.trained_parameters()[name], value), name
    assert AdapterCard.read(folder) == CARD
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]


def damaged(state, how):
    """The state with one mistake in it, and the name of the tensor that has it."""
    down, up = sorted(state)[:2]
    if how == "missing":
        del state[up]
    elif how == "extra":
        state["model.another.lora_B.weight"] = torch.ones(2)
    elif how == "shape":
        state[up] = state[up][:, :-1].contiguous()
    elif how == "zero":
        state[up] = torch.zeros_like(state[up])
    else:
        state[down][1, 2] = float(how)
    return {"extra": "model.another.lora_B.weight", "nan": down, "-inf": down}.get(how, up)


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "zero", "nan", "-inf"])
def test_a_wrong_folder_is_refused(saved, how):
    student, _, folder = saved
    state = load_file(folder / WEIGHTS)
    expected = {name: tuple(value.shape) for name, value in state.items()}
    verify_adapter(folder, expected)
    name = damaged(state, how)
    save_file(state, folder / WEIGHTS)
    message = {"zero": "is all zero, nothing was learnt", "nan": "is not finite", "-inf": "is not finite"}.get(
        how, "is missing, unexpected or of another shape"
    )
    with pytest.raises(RuntimeError, match=f"{name} {message}") as error:
        verify_adapter(folder, expected)
    assert "\n" not in str(error.value)
    if how in ("missing", "extra", "shape"):
        with pytest.raises(UserError, match=f"{name} is missing, unexpected or of another shape"):
            load_weights(student, folder / WEIGHTS)


@pytest.mark.parametrize("how", ["missing", "extra", "zero", "nan"])
def test_a_wrong_state_is_not_exported(saved, how):
    student, encoder, folder = saved
    before = (folder / WEIGHTS).read_bytes()
    state = lora_state(student)
    damaged(state, how)
    with pytest.raises(RuntimeError):
        save_adapter(folder, student, state, encoder.tokenizer, dataclasses.replace(CARD, step=8))
    assert (folder / WEIGHTS).read_bytes() == before and AdapterCard.read(folder) == CARD
    with pytest.raises(RuntimeError):
        save_adapter(folder.with_name("first"), student, state, encoder.tokenizer, CARD)
    assert not folder.with_name("first").exists()


def test_weights_that_cannot_be_read(saved):
    student, _, folder = saved
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    for path in (folder / WEIGHTS, folder / "absent.safetensors"):
        with pytest.raises(UserError, match=rf"^{path}: cannot be read \(.*\): train again") as error:
            load_weights(student, path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("killed_in", ["save_file", "write_json", "verify_adapter", "os.replace"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_leaves_no_half_folder(saved, killed_in, exists):
    student, encoder, folder = saved
    target = folder if exists else folder.with_name("other")
    card = dataclasses.replace(CARD, step=8)

    def save():
        save_adapter(target, student, lora_state(student), encoder.tokenizer, card)

    child = os.fork()
    if not child:
        owner = os if killed_in == "os.replace" else adapter
        name, real = killed_in.removeprefix("os."), os.replace

        def die(source, destination=None, *_):
            if name != "replace" or destination == target:
                os._exit(9)
            real(source, destination)

        setattr(owner, name, die)
        try:
            save()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if exists and killed_in != "os.replace":
        assert AdapterCard.read(target) == CARD  # the one before is whole
        verify_adapter(target, {name: tuple(value.shape) for name, value in load_file(target / WEIGHTS).items()})
    else:
        assert not target.exists()
    save()
    assert AdapterCard.read(target).step == 8
    assert {path.name for path in folder.parent.iterdir()} == ({"adapter"} if exists else {"adapter", "other"})


def test_cards_that_cannot_be_read(tmp_path):
    whole = dataclasses.asdict(CARD)
    probe = {key: value for key, value in whole["probe"].items() if key != "p_match"}
    broken = [
        None,
        "{",
        "[]",
        "7",
        json.dumps({key: value for key, value in whole.items() if key != "prompt"}),
        json.dumps({key: value for key, value in whole.items() if key != "probe"}),
        json.dumps(whole | {"unheard_of": 1}),
        json.dumps(whole | {"probe": probe}),
        json.dumps(whole | {"probe": None}),
    ]
    for text in broken:
        (tmp_path / "flipkd.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "flipkd.json").write_text(text)
        with pytest.raises(UserError, match=rf"^{tmp_path}: no readable flipkd\.json: name a run folder"):
            AdapterCard.read(tmp_path)
    (tmp_path / "flipkd.json").write_text(json.dumps(whole))
    assert AdapterCard.read(tmp_path) == CARD
    (tmp_path / "flipkd.json").write_text(json.dumps({**whole, "format_version": 2}))
    with pytest.raises(UserError, match="another version of flipkd_dist"):
        AdapterCard.read(tmp_path)


def test_the_probe_tells_another_answer():
    check_probe(CARD.probe.p_match + 9e-5, CARD, torch.float32)
    for answer in (0.702, 0.698, CARD.probe.p_match_base, float("nan")):
        with pytest.raises(RuntimeError, match=r"answers its probe pair with .*, not 0\.700000"):
            check_probe(answer, CARD, torch.float32)


def test_an_adapter_of_bf16_may_answer_within_its_rounding():
    card = dataclasses.replace(CARD, dtype="bfloat16")
    check_probe(card.probe.p_match + 0.02, card, torch.float32)
    with pytest.raises(RuntimeError, match="answers its probe"):
        check_probe(card.probe.p_match + 0.04, card, torch.float32)


def test_a_card_from_before_four_bits_is_read(tmp_path):
    values = dataclasses.asdict(CARD)
    for key in ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        del values[key]
    (tmp_path / "flipkd.json").write_text(json.dumps(values))
    assert AdapterCard.read(tmp_path) == CARD and not CARD.load_in_4bit
