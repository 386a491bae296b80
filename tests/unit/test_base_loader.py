"""The base read part by part from its files, against what transformers loads."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_student_shapes import FUSED
from tiny import CAUSAL, save_student, sentences, started_student
from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig

from flipkd_dist.base_loader import Streamed, Whole, check_packable, empty_model, four_bit_form
from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import StudentConfig, validate
from flipkd_dist.errors import UserError
from flipkd_dist.preflight import check_inputs

FAMILIES = {
    **CAUSAL,
    **{family: config for family, (_, config) in FUSED.items()},
    "phi": lambda vocab: PhiConfig(vocab_size=vocab, **tiny.SHAPE),
}
TEXTS = list(zip(*[iter(sentences(12, seed=4))] * 2, strict=True))


class ByParts(Whole):
    """Dense tensors by our own reader, which stay; says how many were live at most while one was filled."""

    by_parts = True

    def __init__(self):
        super().__init__()
        self.parts = []

    def place(self, part):
        assert all(parameter.is_meta for parameter in part.parameters())
        super().place(part)
        self.parts.append(part)


def run(student, encoder, texts=TEXTS):
    with torch.no_grad():
        return student.eval()(**BatchMaker(encoder, student, share_prefix=False)(texts).tensors("cpu"))


@pytest.fixture(params=[*FAMILIES, "glm_original"])
def family(request, monkeypatch):
    if request.param in FAMILIES:
        monkeypatch.setitem(tiny.CAUSAL, request.param, FAMILIES[request.param])
    return request.param


def targets(family):
    return {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "dense"]} if family == "phi" else {}


def test_each_way_of_loading_gives_the_same_student(tmp_path, family):
    """Rotary frequencies, tied matrices, biases and fused projections of every family."""
    folder = save_student(tmp_path, family)
    expected, encoder = started_student(folder, **targets(family))
    outputs, parts = run(expected, encoder), ByParts()
    for placement in (parts, Streamed()):
        student, _ = started_student(folder, placement=placement, **targets(family))
        for found, wanted in zip(run(student, encoder), outputs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert len(parts.parts) >= 4  # embeddings, two layers, the last norm
    student, _ = started_student(folder, placement=ByParts(), **targets(family))
    state, wanted = student.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert student.model.peft_config["default"].base_model_name_or_path == str(folder)


def test_parts_come_in_the_runs_dtype_and_files_may_lack_the_bodys_prefix(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.CAUSAL, "gpt2", FAMILIES["gpt2"])
    folder = save_student(tmp_path, "gpt2")
    student, encoder = started_student(folder)
    outputs = run(student, encoder)
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value.half() for name, value in weights.items()}
    save_file(bare, folder / "model.safetensors")
    student, _ = started_student(folder, placement=ByParts())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    torch.testing.assert_close(run(student, encoder)[0], outputs[0], rtol=0, atol=0.05)


def test_streamed_parts_are_there_for_their_own_forward_alone(tmp_path):
    student, encoder = started_student(save_student(tmp_path), placement=Streamed())
    layers = student.model.get_base_model().model.layers
    sizes = []

    def base_numel():
        held = [p.untyped_storage().nbytes() // 4 for p in student.parameters() if not p.requires_grad]
        return sum(numel for numel in held if numel > 1)

    for layer in layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: sizes.append(base_numel()))
    assert base_numel() == 0
    run(student, encoder)
    assert base_numel() == 0 and len(sizes) == 2
    layer = sum(v.numel() for n, v in load_file(tmp_path / "model.safetensors").items() if ".layers.0." in n)
    assert sizes == [layer, layer]
    layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(student, encoder)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_matrix_is_not_kept_and_not_even_read_by_parts(tmp_path, tied):
    folder = save_student(tmp_path, "qwen2", tie_word_embeddings=tied)
    weights = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in weights) != tied
    parts = ByParts()
    for placement in (None, parts):
        student, _ = started_student(folder, placement=placement)
        held = [p for p in student.parameters() if not p.requires_grad]
        assert sum(p.numel() for p in held) == sum(v.numel() for n, v in weights.items() if n != "lm_head.weight")
    assert "lm_head.weight" not in {name for part in parts.parts for *_, name, _ in part.slots}


def reread(folder, **change):
    """The message of loading by parts after the files were changed: name -> tensor, None removes it."""
    weights = {**load_file(folder / "model.safetensors"), **change}
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        run(*started_student(folder, placement=ByParts()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_do_not_fit_the_configuration(tmp_path):
    folder, name = save_student(tmp_path), "model.layers.1.mlp.down_proj.weight"
    message = reread(folder, **{name: torch.zeros(3, 4)})
    assert message.startswith(f"student.model_name_or_path: {name} has shape [3, 4] in the files and [48, 64]")
    message = reread(folder, **{name: None})
    assert message.startswith("student.model_name_or_path: tiny lacks 1 weights") and f"such as {name}: " in message
    message = reread(folder, **{"lm_head.weight": None})
    assert message.startswith("student.model_name_or_path: tiny has no tensor lm_head.weight")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "nowhere.safetensors"}}))
    with pytest.raises(UserError, match=r"^student\.model_name_or_path: tiny cannot be loaded \(.*: get the"):
        started_student(folder, placement=ByParts())


def test_several_files_are_found_by_their_index(tmp_path):
    folder = save_student(tmp_path)
    outputs = run(*started_student(folder))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "many", max_shard_size="30KB")
    (folder / "model.safetensors").unlink()
    for path in (folder / "many").iterdir():
        path.rename(folder / path.name)
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "consolidated.safetensors")  # as some folders have besides
    student, encoder = started_student(folder, placement=ByParts())
    assert torch.equal(run(student, encoder)[0], outputs[0])


@pytest.mark.parametrize("run_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["auto", "uint8", "bfloat16", "float32"])
def test_a_storage_that_an_engine_would_cast_is_refused(run_dtype, storage):
    settings = StudentConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage, bnb_4bit_quant_type="fp4")
    run_name = str(run_dtype).removeprefix("torch.")
    if storage in ("auto", "uint8", run_name):
        form = four_bit_form(settings, run_dtype)
        assert form.storage == (torch.uint8 if storage == "auto" else getattr(torch, storage))
        assert (form.quant_type, form.double_quant) == ("fp4", True)
    else:
        with pytest.raises(UserError, match=rf"quant_storage: {storage} in a {run_name} run: engines cast .*: take"):
            four_bit_form(settings, run_dtype)
    assert four_bit_form(StudentConfig(bnb_4bit_quant_storage=storage), run_dtype) is None


@pytest.mark.parametrize(("family", "packable"), [("gpt2", False), ("gpt_neox", True), ("glm", True)])
def test_four_bits_are_refused_where_they_would_be_ignored(tmp_path, monkeypatch, family, packable):
    """GPT-2's projections are no linear layers."""
    monkeypatch.setitem(tiny.CAUSAL, family, FAMILIES[family])
    config = AutoConfig.from_pretrained(save_student(tmp_path, family))
    model = empty_model(config, "sdpa", torch.float32, family)
    if packable:
        check_packable(model, family)
        return
    with pytest.raises(UserError, match=r"^student\.load_in_4bit: .* is no linear layer and would not be packed"):
        check_packable(model, family)


def test_a_storage_that_only_one_dtype_allows_needs_that_dtype():
    values = {"student": {"bnb_4bit_quant_storage": "bfloat16"}, "distributed": {"deepspeed": None}}
    with pytest.raises(UserError, match="bfloat16 is safe in a run of that dtype alone"):
        check_inputs(validate({"name": "x", **values}, "test"))
