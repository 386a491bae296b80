"""Students of other shapes: fused projections, output matrices of every kind, LoRA's share of the parameters."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SHAPE, save_student, started_student, with_output_matrix
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, Phi3Config, PhiConfig, Qwen2Config

from flipkd_dist.base import attention_targets
from flipkd_dist.errors import UserError
from flipkd_dist.glm_original_config import GlmOriginalConfig
from flipkd_dist.packing import pack

FUSED = {
    "phi3": (
        "self_attn.qkv_proj",
        lambda vocab: Phi3Config(vocab_size=vocab, pad_token_id=0, num_key_value_heads=2, **SHAPE),
    ),
    "gpt_neox": ("attention.query_key_value", lambda vocab: GPTNeoXConfig(vocab_size=vocab, **SHAPE)),
    "gpt2": ("attn.c_attn", lambda vocab: GPT2Config(vocab_size=vocab, n_embd=48, n_layer=2, n_head=4)),
}


def save(folder, monkeypatch, family, config, **changes):
    monkeypatch.setitem(tiny.CAUSAL, family, config)
    return save_student(folder, family, **changes)


def logits_and_whole(student, encoder):
    """The student's two logits and the whole model's, of one pair."""
    pair = encoder.encode("card lost", "open my account")
    logits, readout, _ = student.eval()(**pack(encoder.prefix, [pair]).tensors("cpu"))
    whole = student.model(input_ids=torch.tensor([encoder.prefix + pair.ids])).logits[0, -1]
    return logits[0], whole[encoder.answer_ids], readout


@torch.no_grad()
@pytest.mark.parametrize("family", FUSED)
def test_a_fused_projection_is_adapted_and_read(tmp_path, monkeypatch, family):
    path, config = FUSED[family]
    module = path.split(".")[1]
    student, encoder = started_student(save(tmp_path, monkeypatch, family, config))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in student.trained_parameters()}
    assert adapted == {module} == {student.encoder_module}
    assert len(student.trained_parameters()) == 2 * 2  # layers, A and B
    [last] = [layer for name, layer in student.model.named_modules() if name.endswith(f"1.{path}")]
    inputs = []
    last.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    logits, whole, readout = logits_and_whole(with_output_matrix(student, tmp_path), encoder)
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)
    tokens = inputs[0][0] @ last.lora_A["default"].weight.T
    start = len(encoder.prefix)
    torch.testing.assert_close(readout[0], tokens[start : start + 2].mean(0), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_bias_of_an_output_matrix_counts(tmp_path, monkeypatch):
    folder = save(tmp_path, monkeypatch, "phi", lambda vocab: PhiConfig(vocab_size=vocab, **SHAPE))
    with pytest.raises(UserError, match=r"^student\.lora_target_modules: neither q_proj.*name the attention's modules"):
        started_student(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.bias.copy_(torch.linspace(-3, 3, len(model.lm_head.bias)))
    model.save_pretrained(folder)
    student, encoder = started_student(folder, lora_target_modules=["q_proj", "k_proj", "v_proj", "dense"])
    assert (student.answer_bias[0] - student.answer_bias[1]).abs() > 1e-3
    logits, whole, _ = logits_and_whole(with_output_matrix(student, tmp_path), encoder)
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_output_rows_come_from_the_right_one_of_several_files(tmp_path, tied):
    folder = save_student(tmp_path, "qwen2", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    student, encoder = started_student(folder)
    assert torch.equal(student.answer_rows, model.lm_head.weight[encoder.answer_ids])
    assert torch.equal(student.answer_rows, model.model.embed_tokens.weight[encoder.answer_ids]) == tied


@torch.no_grad()
def test_files_without_the_prefix_of_the_body(tmp_path, monkeypatch):
    """As GPT-2 is published: `wte.weight`, not `transformer.wte.weight`."""
    folder = save(tmp_path, monkeypatch, "gpt2", FUSED["gpt2"][1])
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): value for name, value in weights.items()}, folder / "model.safetensors"
    )
    student, encoder = started_student(folder)
    logits, whole, _ = logits_and_whole(with_output_matrix(student, folder), encoder)
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (  # Qwen2-0.5B: q, k, v and o
            Qwen2Config(
                vocab_size=151936,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            21.9,
        ),
        (GlmOriginalConfig(), 7.54),  # GLM-10B: the fused projection
    ],
)
def test_trainable_share_is_the_printed_one(config, share):
    """LoRA's parameters over all parameters, LoRA's included, in percent: what PEFT prints. FlipKD, section 4."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        lora = LoraConfig(r=1024, target_modules=attention_targets(base), task_type="CAUSAL_LM")
        trainable, whole = get_peft_model(base, lora).get_nb_trainable_parameters()
    assert round(100 * trainable / whole, len(str(share).split(".")[1])) == share
