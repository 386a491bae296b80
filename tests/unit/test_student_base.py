"""Which bases can be students, where LoRA goes, and what share of the parameters it is."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SHAPE, save_student, started_student
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    ModernBertDecoderConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.packing import pack
from flipkd_dist.student import attention_targets, check_base, load_student, shares_prefix

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
    logits, readout, _ = student.eval()(**pack(encoder.prefix, [pair], [[0]]).tensors("cpu"))
    whole = student.model(input_ids=torch.tensor([encoder.prefix + pair.ids])).logits[0, -1]
    return logits[0], whole[encoder.answer_ids], readout


@torch.no_grad()
@pytest.mark.parametrize("family", FUSED)
def test_a_fused_projection_is_adapted_and_read(tmp_path, monkeypatch, family):
    path, config = FUSED[family]
    module = path.split(".")[1]
    student, encoder = started_student(save(tmp_path, monkeypatch, family, config))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in student.lora_parameters()}
    assert adapted == {module} == {student.encoder_module}
    assert len(student.lora_parameters()) == 2 * 2  # layers, A and B
    [last] = [layer for name, layer in student.model.named_modules() if name.endswith(f"1.{path}")]
    inputs = []
    last.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    logits, whole, readout = logits_and_whole(student, encoder)
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
    logits, whole, _ = logits_and_whole(student, encoder)
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
    logits, whole, _ = logits_and_whole(*started_student(folder))
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)


def refused(folder, config, match, **settings):
    config.save_pretrained(folder)
    with pytest.raises(UserError, match=match) as error:
        check_base(folder, StudentConfig(model_name_or_path="tiny", **settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (BertConfig(), r"tiny \(bert\) is not a causal LM of text"),
        (BartConfig(), r"tiny \(bart\) is not a causal LM of text"),
        (Gemma3Config(), r"tiny \(gemma3\) is not a causal LM of text"),
        (Gemma2Config(), r"tiny sets final_logit_softcapping, which two-row logits leave out"),
        (CohereConfig(), r"tiny sets logit_scale, which"),
        (GraniteConfig(logits_scaling=8.0), r"tiny sets logits_scaling, which"),
    ],
)
def test_configurations_that_are_refused(tmp_path, config, match):
    refused(tmp_path, config, rf"^student\.model_name_or_path: {match}")


def test_harmless_logit_settings_are_taken(tmp_path):
    for config in (GraniteConfig(logits_scaling=1.0), Gemma2Config(final_logit_softcapping=None)):
        config.save_pretrained(tmp_path)
        assert check_base(tmp_path, StudentConfig(model_name_or_path="tiny")).model_type == config.model_type


def test_quantised_unknown_and_absent_bases_are_refused(tmp_path):
    config = tiny.CAUSAL["llama"](100)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    refused(tmp_path, config, r"^student\.model_name_or_path: tiny is quantised already: take the original weights$")
    for text in ('{"model_type": "unheard-of"}', "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"^student\.model_name_or_path: tiny cannot be loaded \(.*\)$"):
            check_base(tmp_path, StudentConfig(model_name_or_path="tiny"))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bloom", lambda vocab: BloomConfig(vocab_size=vocab, hidden_size=48, n_layer=2, n_head=4)),
        (
            "modernbert-decoder",
            lambda vocab: ModernBertDecoderConfig(
                vocab_size=vocab, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SHAPE
            ),
        ),
    ],
)
def test_bodies_whose_logits_or_positions_would_be_wrong(tmp_path, monkeypatch, family, config):
    """BLOOM counts along the row, ModernBERT has a layer before its output matrix."""
    folder = save(tmp_path, monkeypatch, family, config)
    with pytest.raises(UserError, match=r"^student\.model_name_or_path: tiny .* takes no position_ids or has layers"):
        load_student(folder, StudentConfig(model_name_or_path="tiny", attn_implementation="eager"), [5, 6], 8)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "sdpaa"])
def test_attention_that_cannot_take_the_mask(tmp_path, name):
    with pytest.raises(UserError, match=rf"^student\.attn_implementation: {name} cannot take the mask.*auto, sdpa, ea"):
        started_student(save_student(tmp_path), attn_implementation=name)


def test_modules_that_are_not_there(tmp_path):
    folder = save_student(tmp_path)
    with pytest.raises(UserError, match=r"^student\.lora_target_modules: \['query'\] do not fit \("):
        started_student(folder, lora_target_modules=["query"])
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"^student\.model_name_or_path: tiny cannot be loaded \("):
        started_student(folder)


def test_layers_that_run_along_the_row_are_padded():
    config = Qwen3NextConfig(num_hidden_layers=4)
    assert "linear_attention" in config.layer_types and not shares_prefix(config, 64)
    bare = tiny.CAUSAL["llama"](100)
    assert shares_prefix(bare, 64)
    bare.alibi = True
    assert not shares_prefix(bare, 64)


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
        (  # GLM-10B has the blocks of GPT-NeoX; its 8 million position embeddings are left out
            GPTNeoXConfig(
                vocab_size=50304,
                hidden_size=4096,
                intermediate_size=16384,
                num_hidden_layers=48,
                num_attention_heads=64,
                tie_word_embeddings=True,
            ),
            7.54,
        ),
    ],
)
def test_trainable_share_is_the_printed_one(config, share):
    """LoRA's parameters over all parameters, LoRA's included, in percent: what PEFT prints. FlipKD, section 4."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        lora = LoraConfig(r=1024, target_modules=attention_targets(base), task_type="CAUSAL_LM")
        trainable, whole = get_peft_model(base, lora).get_nb_trainable_parameters()
    assert round(100 * trainable / whole, len(str(share).split(".")[1])) == share
