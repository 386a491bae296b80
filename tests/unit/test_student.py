"""What the student gives out, against the whole model and against hand computations."""

import copy

import pytest
import torch
from tiny import CAUSAL, save_student, sentences, started_student, with_output_matrix

from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.packing import pack
from flipkd_dist.prompt import EncodedPair
from flipkd_dist.student import LORA_A_STD, Student, load_student

TEXTS = list(zip(*[iter(sentences(12, seed=4))] * 2, strict=True))


def run(student, encoder, pairs: list[EncodedPair]):
    """Logits and read-outs of the pairs, one a row."""
    return student(**pack(encoder.prefix, pairs, share=False).tensors("cpu"))


def last_queries(student):
    """The query projection with LoRA of the last layer, found without the code under test."""
    return student.model.get_base_model().model.layers[-1].self_attn.q_proj


@pytest.mark.parametrize("family", sorted(CAUSAL))
@torch.no_grad()
def test_answer_logits_are_two_of_the_whole_vocabulary(tmp_path, family):
    student, encoder = started_student(save_student(tmp_path, family))
    with_output_matrix(student, tmp_path)
    pairs = [encoder.encode(*texts) for texts in TEXTS]
    logits, *_ = run(student.eval(), encoder, pairs)
    for number, pair in enumerate(pairs):
        whole = student.model(input_ids=torch.tensor([encoder.prefix + pair.ids])).logits[0, -1]
        torch.testing.assert_close(logits[number], whole[encoder.answer_ids], rtol=1e-5, atol=1e-5)
    assert (logits[:, 0] - logits[:, 1]).std() > 0.01
    with student.model.disable_adapter():
        base = student.model(input_ids=torch.tensor([encoder.prefix + pairs[0].ids])).logits[0, -1]
    assert (logits[0] - base[encoder.answer_ids]).abs().max() > 0.01  # the adapter counts


@pytest.mark.parametrize("family", sorted(CAUSAL))
@torch.no_grad()
def test_read_out_is_the_mean_of_a_over_the_span(tmp_path, family):
    student, encoder = started_student(save_student(tmp_path, family), lora_dropout=0.5)
    pairs = [encoder.encode(*texts) for texts in TEXTS]
    _, *readouts = run(student.eval(), encoder, pairs)
    _, in_training, _ = run(student.train(), encoder, pairs)
    inputs = []
    projection = last_queries(student)
    projection.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    student.eval()
    for number, pair in enumerate(pairs):
        student.model(input_ids=torch.tensor([encoder.prefix + pair.ids]))
        tokens = inputs.pop()[0] @ projection.lora_A["default"].weight.T
        for readout, span in zip(readouts, (pair.text_a, pair.text_b), strict=True):
            start, stop = len(encoder.prefix) + span.start, len(encoder.prefix) + span.stop
            torch.testing.assert_close(readout[number], tokens[start:stop].mean(0), rtol=1e-6, atol=1e-6)
    assert (readouts[0] - in_training).abs().max() > 0.01  # dropout in training, none in evaluation


def test_read_outs_have_a_gradient(tmp_path):
    """Through A of the last layer and everything below it, as in the computation by hand."""
    student, encoder = started_student(save_student(tmp_path))
    pair = encoder.encode(*TEXTS[0])
    projection, inputs = last_queries(student), []
    weights = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    _, a, b = run(student, encoder, [pair])
    (weights * torch.cat([a, b])).sum().backward()
    found = {name: parameter.grad for name, parameter in student.trained_parameters().items()}
    student.zero_grad(set_to_none=True)
    projection.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    student.model(input_ids=torch.tensor([encoder.prefix + pair.ids]))
    tokens = inputs[0][0, len(encoder.prefix) :] @ projection.lora_A["default"].weight.T
    (weights * torch.stack([tokens[pair.text_a].mean(0), tokens[pair.text_b].mean(0)])).sum().backward()
    expected = {name: parameter.grad for name, parameter in student.trained_parameters().items()}
    with_gradient = [name for name, value in expected.items() if value is not None]
    assert any("layers.1.self_attn.q_proj.lora_A" in name for name in with_gradient) and len(with_gradient) == 9
    for name in with_gradient:
        assert (found[name] - expected[name]).norm() / expected[name].norm() < 1e-5, name


@torch.no_grad()
def test_the_second_read_out_has_read_the_first_text_and_not_the_reverse(tmp_path):
    student, encoder = started_student(save_student(tmp_path))
    a, b, other = "card lost my pin", "how do i open the account", "where is the money with"
    pairs = [encoder.encode(*texts) for texts in ((a, b), (a, other), (other, b))]
    _, first, second = run(student.eval(), encoder, pairs)
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-6)
    assert (second[0] - second[2]).abs().max() > 0.01
    assert (first[0] - first[2]).abs().max() > 0.01 and (second[0] - second[1]).abs().max() > 0.01


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    folder = save_student(tmp_path)
    results = []
    for checkpointing in (False, True):
        student, encoder = started_student(folder)
        if checkpointing:
            fresh = load_student(folder, settings(), encoder.answer_ids, 8, gradient_checkpointing=True)
            fresh.load_state_dict(student.state_dict())
            student = fresh
        passes = []
        last_queries(student).register_forward_hook(lambda *_, passes=passes: passes.append(1))
        outputs = run(student.train(), encoder, [encoder.encode(*texts) for texts in TEXTS])
        weights = [torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for value in outputs]
        sum((value * weight).sum() for value, weight in zip(outputs, weights, strict=True)).backward()
        results.append({name: parameter.grad for name, parameter in student.trained_parameters().items()})
        assert len(passes) == 1 + checkpointing
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-6, atol=1e-8)


def settings(**changes) -> StudentConfig:
    return StudentConfig(**{"model_name_or_path": "tiny", "lora_dropout": 0.0, **changes})


def fresh_lora(folder, seed=0, rank=8, **changes) -> dict[str, torch.Tensor]:
    student = load_student(folder, settings(**changes), [5, 6], rank, seed)
    return {name: parameter.detach() for name, parameter in student.trained_parameters().items()}


def test_fresh_lora(tmp_path):
    folder = save_student(tmp_path)
    one = fresh_lora(folder, rank=64)
    torch.manual_seed(99)
    torch.randn(7)  # the global state must not count
    again = fresh_lora(folder, rank=64, lora_target_modules=["o_proj", "v_proj", "k_proj", "q_proj"])
    other_seed = fresh_lora(folder, rank=64, seed=1)
    down = {name: value for name, value in one.items() if ".lora_A." in name}
    assert len(one) == 2 * len(down) == 2 * 2 * 4  # layers, projections
    for name, value in one.items():
        assert value.dtype == torch.float32 and torch.equal(value, again[name])
        if name not in down:
            assert not value.any()
            continue
        assert value.std().item() == pytest.approx(LORA_A_STD, rel=0.1) and abs(value.mean()) < 5e-4
        assert not torch.equal(value, other_seed[name])
    values = [value for value in down.values() if value.shape == (64, 48)]
    assert len(values) == 8
    assert len({value[0, 0].item() for value in values}) == 8


def test_lora_alone_is_trainable_and_of_the_given_rank(tmp_path):
    folder = save_student(tmp_path)
    for rank, changes in ((8, {}), (5, {"lora_r": 5, "lora_alpha": 7.0})):
        student = load_student(folder, settings(**changes), [5, 6], 8)
        trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, _ in student.named_parameters() if ".lora_" in name}
        assert {f"model.{name}" for name in student.trained_parameters()} == trainable
        assert {p.shape[0] for name, p in student.trained_parameters().items() if ".lora_A." in name} == {rank}
        assert {p.shape[1] for name, p in student.trained_parameters().items() if ".lora_B." in name} == {rank}
        assert last_queries(student).scaling["default"] == changes.get("lora_alpha", rank) / rank


@torch.no_grad()
def test_encoder_module_chooses_the_read_out(tmp_path):
    folder = save_student(tmp_path)
    readouts = {}
    for module in (None, "q_proj", "v_proj", "o_proj"):
        student, encoder = started_student(folder, encoder_module=module)
        assert student.encoder_name.endswith(f"layers.1.self_attn.{module or 'q_proj'}")
        readouts[module] = run(student.eval(), encoder, [encoder.encode(*TEXTS[0])])[1]
    assert torch.equal(readouts[None], readouts["q_proj"])
    assert not torch.allclose(readouts["q_proj"], readouts["v_proj"], atol=0.01)
    assert not torch.allclose(readouts["v_proj"], readouts["o_proj"], atol=0.01)
    with pytest.raises(UserError, match=r"^student\.encoder_module: no layer has LoRA on 'gate_up_proj': name one"):
        load_student(folder, settings(encoder_module="gate_up_proj"), [5, 6], 8)


def test_encoder_module_must_stand_once_in_a_layer(tmp_path):
    student = load_student(save_student(tmp_path), settings(), [5, 6], 8)
    layer = student.model.get_base_model().model.layers[1]
    layer.second = torch.nn.ModuleDict({"q_proj": copy.deepcopy(layer.self_attn.q_proj)})
    with pytest.raises(UserError, match=r"'q_proj' stands more than once in a layer"):
        Student(student.model, student.answer_rows, None, "q_proj")


@pytest.mark.parametrize(("family", "reads"), [("glm", "lasttoken"), ("llama", "mean"), ("glm_original", "mean")])
def test_read_outs_of_hidden_states(tmp_path, family, reads):
    """Of the answers' forward, by hand; the prompt ends with the second text, whose last token answers then."""
    student, encoder = started_student(save_student(tmp_path, family), readout=reads)
    if family != "glm_original":
        encoder.suffix = []
    pairs = [encoder.encode(*texts) for texts in TEXTS]
    batch = pack(encoder.prefix, pairs, share=family != "glm_original", blank=family == "glm_original").tensors("cpu")
    outputs = student(**batch)
    assert student.readout_width == outputs[1].shape[1] == 48
    weights = [torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for value in outputs]
    sum((value * weight).sum() for value, weight in zip(outputs, weights, strict=True)).backward()
    found = {name: parameter.grad.clone() for name, parameter in student.trained_parameters().items()}
    student.zero_grad()
    student.behind_attention = []  # every position
    hidden = []
    body = student.model.get_base_model().base_model
    body.register_forward_hook(lambda _module, _inputs, output: hidden.append(output.last_hidden_state))
    logits, *expected = [], [], []
    for pair in pairs:
        one = pack(encoder.prefix, [pair], share=False, blank=family == "glm_original").tensors("cpu")
        logits.append(student(**one)[0][0])
        for side, span in zip(expected, (pair.text_a, pair.text_b), strict=True):
            start, stop = len(encoder.prefix) + span.start, len(encoder.prefix) + span.stop
            values = hidden[-1][0, start:stop]
            side.append(values[-1] if reads == "lasttoken" else values.mean(dim=0))
    wanted = [torch.stack(values) for values in (logits, *expected)]
    for value, one in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(value, one, rtol=1e-5, atol=1e-5)
    sum((value * weight).sum() for value, weight in zip(wanted, weights, strict=True)).backward()
    for name, parameter in student.trained_parameters().items():
        assert (found[name] - parameter.grad).norm() / parameter.grad.norm() < 1e-5, name


@pytest.mark.parametrize("reads", ["lora_a", "lasttoken", "mean"])
def test_gradient_checkpointing_of_texts_alone(tmp_path, reads):
    gradients = []
    for checkpointing in (False, True):
        student, encoder = started_student(
            tmp_path if checkpointing else save_student(tmp_path), mode="alone", readout=reads
        )
        if checkpointing:
            student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits, a, b = student.train()(**BatchMaker(encoder, student, True)(TEXTS).tensors("cpu"))
        (logits[:, 0].sum() + (a * b).sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in student.trained_parameters().items()})
    assert sum(bool(value.norm()) for value in gradients[0].values()) == (9 if reads == "lora_a" else 16)
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-7)


def test_what_no_loss_reaches(tmp_path):
    folder = save_student(tmp_path)
    for reads in ("lasttoken", "mean"):
        assert started_student(folder, readout=reads)[0].behind_readouts() == set()
    names = started_student(folder, mode="alone")[0].behind_readouts()
    assert len(names) == 4 and all("layers.1." in name and ".lora_B." in name for name in names)
