"""The original GLM as a student, from its published files: layout, masks, read-outs, training, the adapter."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft_reference import CARD
from safetensors.torch import load_file
from tiny import pair_table, save_student, save_teacher, sentences, signals_of, started_student, unit_vectors

from flipkd_dist.adapter import Probe, save_adapter
from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import LossConfig, RunConfig
from flipkd_dist.engine import PlainEngine
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import pair_texts, student_scores
from flipkd_dist.glm_original import GlmOriginalForCausalLM
from flipkd_dist.model_files import check_files, fingerprint
from flipkd_dist.order import Order
from flipkd_dist.packing import pack
from flipkd_dist.predict import Matcher
from flipkd_dist.preflight import check_inputs
from flipkd_dist.prompt import EncodedPair, PairEncoder
from flipkd_dist.step import TrainingStep
from flipkd_dist.world import World

TEXTS = list(zip(*[iter(sentences(12, seed=4))] * 2, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("glm"), "glm_original")


def rows(encoder, pairs: list[EncodedPair]) -> dict[str, torch.Tensor]:
    return pack(encoder.prefix, pairs, share=False, blank=True).tensors("cpu")


def test_layout():
    """Context in both directions, the start token at the position of [MASK]; padding keeps to itself."""
    pairs = [
        EncodedPair([11, 12, 13, 7, 8, 9], slice(0, 1), slice(2, 3)),  # 7, 8, 9: [MASK], <|endoftext|>, the start token
        EncodedPair([21, 22, 7, 8, 9], slice(0, 1), slice(1, 2)),
    ]
    batch = pack([1, 2], pairs, share=False, blank=True)
    assert batch.input_ids.tolist() == [[1, 2, 11, 12, 13, 7, 8, 9], [1, 2, 21, 22, 7, 8, 9, 0]]
    assert batch.position_ids[:, 0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 5], [0, 1, 2, 3, 4, 5, 4, 0]]
    assert batch.position_ids[:, 1].tolist() == [[0] * 7 + [1], [0] * 6 + [1, 0]]
    assert batch.answer_positions.tolist() == [7, 14] and batch.num_tokens == 15
    assert batch.segments.tolist() == [[4, 4, 0, 4, 1, 4, 4, 4], [4, 4, 2, 3, 4, 4, 4, 4]]
    mask = batch.attention_mask[:, 0].int().tolist()
    assert mask[0] == [[1] * 7 + [0]] * 7 + [[1] * 8]
    assert mask[1] == [[1] * 6 + [0, 0]] * 6 + [[1] * 7 + [0], [0] * 7 + [1]]
    with pytest.raises(AssertionError):
        pack([1, 2], pairs, blank=True)


def test_tokens_of_a_pair(folder):
    _, encoder = started_student(folder)
    pair = encoder.encode("lost card", "open my account")
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.prefix + pair.ids)
    assert tokens[0] == "[CLS]" and tokens[-3:] == ["[MASK]", "<|endoftext|>", "<|startofpiece|>"]
    assert encoder.tokenizer.decode(pair.ids[pair.text_b]).strip() == "open my account"
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.answer_ids) == ["Ġyes", "Ġno"]
    plain = PairEncoder(encoder.tokenizer, CARD.prompt, CARD.answers, 120)
    assert (plain.prefix, plain.suffix, plain.room) == (encoder.prefix, encoder.suffix[:-3], encoder.room + 3)
    with pytest.raises(UserError, match=r"^data\.max_length: "):
        PairEncoder(encoder.tokenizer, CARD.prompt, CARD.answers, 120 - encoder.room + 1, blank=True)
    encoder.tokenizer.mask_token = None
    with pytest.raises(UserError, match=r"^student\.model_name_or_path: its tokenizer lacks \[MASK\]"):
        PairEncoder(encoder.tokenizer, CARD.prompt, CARD.answers, 120, blank=True)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_and_read_outs_of_the_whole_model(folder, implementation):
    student, encoder = started_student(folder, attn_implementation=implementation)
    vocabulary = student.model.get_input_embeddings().weight  # tied
    pairs = [encoder.encode(*texts) for texts in TEXTS]
    logits, *readouts = student.eval()(**rows(encoder, pairs))
    projection = student.model.get_base_model().glm.transformer.layers[-1].attention.query_key_value
    inputs = []
    projection.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    for number, pair in enumerate(pairs):
        ids = torch.tensor([encoder.prefix + pair.ids])
        length = ids.shape[1]
        positions = torch.arange(length)
        positions[-1] = length - 3  # of [MASK]
        in_blank = (torch.arange(length) == length - 1).long()
        sees = torch.ones(length, length, dtype=torch.bool)
        sees[:-1, -1] = False
        hidden = student.model(
            input_ids=ids, position_ids=torch.stack([positions, in_blank])[None], attention_mask=sees[None, None]
        ).logits[0, -1]
        whole = vocabulary @ hidden
        torch.testing.assert_close(logits[number], whole[encoder.answer_ids], rtol=1e-5, atol=1e-5)
        tokens = inputs.pop()[0] @ projection.lora_A["default"].weight.T
        for readout, span in zip(readouts, (pair.text_a, pair.text_b), strict=True):
            start, stop = len(encoder.prefix) + span.start, len(encoder.prefix) + span.stop
            torch.testing.assert_close(readout[number], tokens[start:stop].mean(0), rtol=1e-5, atol=1e-6)


def outputs_and_gradients(student, batch):
    outputs = student(**batch)
    weights = [torch.randn(value.shape, generator=torch.Generator().manual_seed(7)) for value in outputs]
    student.zero_grad()
    sum((value * weight).sum() for value, weight in zip(outputs, weights, strict=True)).backward()
    return outputs, {name: parameter.grad.clone() for name, parameter in student.trained_parameters().items()}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padded_equals_alone(folder, implementation):
    student, encoder = started_student(folder, attn_implementation=implementation)
    pairs = [encoder.encode(*texts) for texts in TEXTS]
    assert len({len(pair.ids) for pair in pairs}) > 2
    together = student(**rows(encoder, pairs))
    alone = [torch.cat(values) for values in zip(*[student(**rows(encoder, [pair])) for pair in pairs], strict=True)]
    for value, wanted in zip(together, alone, strict=True):
        assert (value - wanted).norm() / wanted.norm() < 1e-5
    _, gradients = outputs_and_gradients(student, rows(encoder, pairs[:1]))
    longest = max(pairs, key=lambda pair: len(pair.ids))
    batch = rows(encoder, [pairs[0], longest])
    student.zero_grad()
    weights = [torch.randn(value[:1].shape, generator=torch.Generator().manual_seed(7)) for value in student(**batch)]
    sum((value[:1] * weight).sum() for value, weight in zip(student(**batch), weights, strict=True)).backward()
    for name, parameter in student.trained_parameters().items():
        assert gradients[name].norm() > 0, name
        assert (parameter.grad - gradients[name]).norm() / gradients[name].norm() < 1e-5, name


@torch.no_grad()
def test_who_sees_whom(folder):
    student, encoder = started_student(folder)
    _, first, second = student(**rows(encoder, [encoder.encode("lost card", "open my account")]))
    _, other, _ = student(**rows(encoder, [encoder.encode("lost card", "close my account")]))
    assert (first - other).abs().max() > 1e-3  # text 1 sees text 2
    _, _, other = student(**rows(encoder, [encoder.encode("stolen card", "open my account")]))
    assert (second - other).abs().max() > 1e-3
    body, batch = student.model.get_base_model().base_model, rows(encoder, [encoder.encode("lost card", "open")])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    before = body(**inputs).last_hidden_state[0]
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, -1] = 5  # the context does not see the start token
    after = body(**inputs).last_hidden_state[0]
    assert torch.equal(before[:-1], after[:-1]) and (before[-1] - after[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_of_training(folder, checkpointing):
    student, encoder = started_student(folder)
    if checkpointing:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = PlainEngine(student.train(), lambda parameters: torch.optim.SGD(parameters, lr=0.0), 0.0)
    pairs = pair_table(16)
    make_batch = BatchMaker(encoder, student, share_prefix=False)
    step = TrainingStep(
        engine, World(), signals_of(pairs, unit_vectors(len(pairs.texts))), make_batch, LossConfig(mcl_weight=1.0)
    )
    before = engine.trained_state()
    for number in range(2):
        micro_steps = step.prepare(Order(16, 8, 1, seed=3).contrast_batches(number))
        counts = step.counts(micro_steps)
        step.backward(micro_steps, counts)
        gradients = engine.gradients()
        assert all(torch.isfinite(value).all() and value.norm() > 0 for value in gradients.values())
        engine.step(0.05)
    assert {name.rsplit(".", 4)[1] for name in before} == {"query_key_value"} and len(before) == 4
    for name, value in engine.trained_state().items():
        assert not torch.equal(value, before[name]), name


@torch.no_grad()
def test_the_adapter_in_plain_peft_and_in_prediction(tmp_path, folder):
    student, encoder = started_student(folder)
    texts = pair_texts(pair_table(5))
    scores, similarity = student_scores(student, World(), BatchMaker(encoder, student, False), texts, 8)
    card = dataclasses.replace(
        CARD,
        base_model=str(folder),
        base_fingerprint=fingerprint(folder),
        encoder_module="query_key_value",
        probe=Probe(*texts[0], float(scores[0]), 0.0),
    )
    save_adapter(tmp_path / "adapter", student, {n: p.detach() for n, p in student.trained_parameters().items()},
                 encoder.tokenizer, card)  # fmt: skip
    found, cosine = Matcher(tmp_path / "adapter").predict(texts)
    np.testing.assert_allclose(found, scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(cosine, similarity, rtol=0, atol=1e-6)
    plain = PeftModel.from_pretrained(GlmOriginalForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    batch = rows(encoder, [encoder.encode(*texts[0])])
    logits = plain(**{name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}).logits[0, -1]
    p_match = torch.softmax(logits[encoder.answer_ids].double(), dim=0)[0].item()
    assert abs(p_match - scores[0]) < 1e-6
    with plain.disable_adapter():
        base = plain(**{name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}).logits[0, -1]
    assert (base - logits).abs().max() > 1e-2


@torch.no_grad()
def test_a_folder_that_our_class_saved(tmp_path, folder):
    student, encoder = started_student(folder)
    GlmOriginalForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    again, other = started_student(tmp_path)
    assert (other.prefix, other.suffix, other.answer_ids) == (encoder.prefix, encoder.suffix, encoder.answer_ids)
    pairs = [encoder.encode(*texts) for texts in TEXTS]
    for value, wanted in zip(again(**rows(other, pairs)), student(**rows(encoder, pairs)), strict=True):
        assert torch.equal(value, wanted)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["glm.", ""])
def test_the_conversion_of_the_documentation(tmp_path, monkeypatch, folder, prefix):
    """Half-precision pickles in two files, as published or of the body alone, through the lines of docs/glm.md."""
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(folder, "glm-10b"))
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[:9], names[9:]), start=1):
        part = {prefix + name.removeprefix("glm."): weights[name].half() for name in part}
        torch.save(part, copy / f"pytorch_model-0000{number}-of-00002.bin")
    text = (Path(__file__).parents[2] / "docs" / "glm.md").read_text(encoding="utf-8")
    exec(text.split("```python\n")[1].split("```")[0], {})
    check_files(copy, "student.model_name_or_path")
    student, encoder = started_student(copy)
    exact, _ = started_student(folder)
    batch = rows(encoder, [encoder.encode(*texts) for texts in TEXTS])
    torch.testing.assert_close(student(**batch)[0], exact(**batch)[0], rtol=2e-2, atol=2e-2)
    assert torch.equal(student.answer_rows, weights["glm.word_embeddings.weight"][encoder.answer_ids].half().float())


def test_preflight_takes_it_and_knows_its_last_position(tmp_path, folder):
    lines = [json.dumps({"text_a": a, "text_b": b, "label": number % 2}) for number, (a, b) in enumerate(TEXTS)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    settings = {
        "name": "glm",
        "output_dir": str(tmp_path / "runs"),
        "data": {"train": str(tmp_path / "pairs.jsonl"), "max_length": 128},
        "teacher": {"model_name_or_path": str(save_teacher(tmp_path / "teacher")), "max_length": 64},
        "student": {
            "model_name_or_path": str(folder),
            "prompt": "do i same ? {text_a} | {text_b} =",
            "answers": ["yes", "no"],
        },
        "distributed": {"deepspeed": None},
    }
    inputs = check_inputs(RunConfig.model_validate(settings))
    assert inputs.encoder.blank and not inputs.share_prefix
    settings["data"]["max_length"] = 129
    with pytest.raises(UserError, match=r"^data\.max_length: 129 tokens, but the student's base has 128 positions"):
        check_inputs(RunConfig.model_validate(settings))
    settings["data"]["max_length"] = 128
    settings["student"] = {"model_name_or_path": str(folder), "mode": "alone", "prompt": "{text}"}
    with pytest.raises(UserError, match=r"^student\.mode: alone is not supported for .* set it to pair$"):
        check_inputs(RunConfig.model_validate(settings))
