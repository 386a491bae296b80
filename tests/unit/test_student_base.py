"""Which bases can be students, and which are refused in one line."""

import pytest
import tiny
from tiny import SHAPE, save_student, started_student
from transformers import (
    BertConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    GraniteConfig,
    JambaConfig,
    ModernBertDecoderConfig,
    Qwen3NextConfig,
    T5Config,
)

from flipkd_dist.base import check_base, check_mode, shares_prefix
from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.glm_original_config import GlmOriginalConfig
from flipkd_dist.student import load_student


def refused(folder, config, match):
    config.save_pretrained(folder)
    with pytest.raises(UserError, match=match) as error:
        check_base(folder, StudentConfig(model_name_or_path="tiny"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (BertConfig(), r"tiny \(bert\) is not a causal LM of text"),
        (T5Config(), r"tiny \(t5\) is not a causal LM of text"),
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
    refused(
        tmp_path, config, r"^student\.model_name_or_path: tiny is quantised already: take the original weights, and"
    )
    own_code = '{"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}}'
    (tmp_path / "config.json").write_text(own_code)
    (tmp_path / "configuration_chatglm.py").write_text("raise SystemExit('it was run')\n")
    with pytest.raises(UserError, match=r"^student\.model_name_or_path: tiny brings its own code .*: take its edition"):
        check_base(tmp_path, StudentConfig(model_name_or_path="tiny"))
    for text in ('{"model_type": "unheard-of"}', "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"^student\.model_name_or_path: tiny: config\.json cannot be used \("):
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
    monkeypatch.setitem(tiny.CAUSAL, family, config)
    folder = save_student(tmp_path, family)
    with pytest.raises(UserError, match=r"^student\.model_name_or_path: tiny .* takes no position_ids or has layers"):
        load_student(folder, StudentConfig(model_name_or_path="tiny", attn_implementation="eager"), [5, 6], 8)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "sdpaa"])
def test_attention_that_is_not_tested(tmp_path, name):
    with pytest.raises(UserError, match=rf"^student\.attn_implementation: {name} is not supported.*auto, sdpa, ea"):
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
    jamba = JambaConfig(num_hidden_layers=8)
    assert "mamba" in jamba.layers_block_type and not shares_prefix(jamba, 64)
    bare.alibi = True
    assert not shares_prefix(bare, 64)


@pytest.mark.parametrize(
    ("config", "settings", "match"),
    [
        (GlmOriginalConfig(), {"mode": "alone"}, r"^student\.mode: alone is not supported for tiny, an original GLM"),
        (JambaConfig(), {"mode": "alone", "bidirectional": True}, r"^student\.bidirectional: tiny has layers without"),
    ],
)
def test_texts_alone_where_the_base_cannot(config, settings, match):
    with pytest.raises(UserError, match=match):
        check_mode(config, StudentConfig(model_name_or_path="tiny", **settings), 64)
    check_mode(config, StudentConfig(model_name_or_path="tiny"), 64)


def test_both_directions_within_a_sliding_window():
    window, both = tiny.CAUSAL["qwen2"](100), StudentConfig(mode="alone", bidirectional=True)
    window.use_sliding_window, window.sliding_window = True, 32
    check_mode(window, both, 32)
    with pytest.raises(UserError, match=r"over data\.max_length 64: set it to false or take another base$"):
        check_mode(window, both, 64)
