"""What the planner counts of large models, on the meta device and without weights."""

import pytest
from transformers import BertConfig, Glm4Config, GlmConfig, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from flipkd_dist.config import RunConfig, StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.planner_shape import shape_of, student_shape

GLM_9B = dict(
    vocab_size=151552,
    hidden_size=4096,
    intermediate_size=13696,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    attention_bias=True,
    tie_word_embeddings=False,
)
QWEN_7B = dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
SETTINGS = StudentConfig(model_name_or_path="shape")


@pytest.mark.parametrize("kind, norms", [(Glm4Config, 4), (GlmConfig, 2)])
def test_glm_of_9_billion(tmp_path, kind, norms):
    kind(**GLM_9B).save_pretrained(tmp_path)
    shape = shape_of(tmp_path, SETTINGS, 1024)
    attention, mlp = 2 * 4096 * 4096 + 2 * 4096 * 256, 3 * 4096 * 13696
    assert shape.linear == 40 * (attention + mlp)
    assert shape.embedding == shape.output_matrix == 151552 * 4096
    assert shape.other == 40 * (norms * 4096 + 4096 + 2 * 256) + 4096  # norms, biases of q, k, v, the last norm
    assert shape.lora == 40 * 1024 * (2 * (4096 + 4096) + 2 * (4096 + 256))
    assert shape.kept + shape.output_matrix == pytest.approx(9.40e9, rel=1e-3)
    assert (shape.query_width, shape.key_width, shape.intermediate, shape.gated) == (4096, 256, 13696, True)
    assert (shape.norm_width, shape.rotary_width) == (norms * 4096, 2 * 64)  # half of the head is rotated
    assert [one.reads_hidden for one in shape.targets] == [True, True, True, False]
    assert shape.largest_linear == 4096 * 2 * 13696


def test_qwen2_of_7_billion(tmp_path):
    Qwen2Config(**QWEN_7B).save_pretrained(tmp_path)
    shape = shape_of(tmp_path, SETTINGS, 1024)
    assert shape.linear == 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert shape.lora == 28 * 1024 * (2 * (3584 + 3584) + 2 * (3584 + 512))
    assert shape.kept + shape.output_matrix == pytest.approx(7.616e9, rel=1e-3)
    assert shape.rotary_width == 0 and shape.norm_width == 2 * 3584


def test_the_papers_small_student(tmp_path):
    """Trainable share of Qwen2-0.5B at r = 1024: 21.9 % (FlipKD, section 4)."""
    small = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
    Qwen2Config(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, **small).save_pretrained(tmp_path)
    shape = shape_of(tmp_path, SETTINGS, 1024)
    assert shape.output_matrix == 0
    assert shape.lora / (shape.lora + shape.kept) == pytest.approx(0.219, abs=5e-4)


def test_other_families(tmp_path):
    Qwen3Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    ).save_pretrained(tmp_path)
    shape = shape_of(tmp_path, SETTINGS, 8)
    assert shape.query_width == 128 and shape.norm_width == 2 * 64 + 128 + 64  # norms of queries and keys besides
    GPT2Config(n_embd=48, n_layer=2, n_head=4).save_pretrained(tmp_path)
    shape = shape_of(tmp_path, SETTINGS, 8)
    assert (len(shape.targets), shape.gated, shape.norm_in_fp32) == (1, False, False)
    assert shape.linear == 2 * 12 * 48 * 48 and shape.lora == 2 * 8 * (48 + 3 * 48)


def test_the_rank_comes_from_the_teachers_configuration_alone(tmp_path):
    BertConfig(hidden_size=384, num_attention_heads=6).save_pretrained(tmp_path / "teacher")
    Qwen2Config(**QWEN_7B).save_pretrained(tmp_path / "student")
    config = {"name": "x", "student": {"model_name_or_path": str(tmp_path / "student")}}
    teacher = {"teacher": {"model_name_or_path": str(tmp_path / "teacher")}}
    assert student_shape(RunConfig.model_validate({**config, **teacher})).lora_r == 384
    with pytest.raises(UserError, match=r"^student\.lora_r and teacher\.model_name_or_path are both missing"):
        student_shape(RunConfig.model_validate(config))


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    BertConfig().save_pretrained(tmp_path)
    for name, message in (("empty", "no config.json"), ("none", "neither a folder"), (".", "is not a causal LM")):
        config = {"name": "x", "student": {"model_name_or_path": str(tmp_path / name), "lora_r": 8}}
        with pytest.raises(UserError, match=message) as caught:
            student_shape(RunConfig.model_validate(config))
        assert "\n" not in str(caught.value)
    Qwen2Config(**QWEN_7B).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^student\.lora_target_modules: .* name linear layers"):
        shape_of(tmp_path, StudentConfig(model_name_or_path="x", lora_target_modules=["nowhere"]), 8)


def test_the_rank_comes_from_the_bi_encoder_then_from_the_cross_encoder(tmp_path):
    """As in a run: `preflight.Inputs.lora_rank`."""
    for name, width in (("bi", 32), ("cross", 48)):
        BertConfig(hidden_size=width, num_attention_heads=2).save_pretrained(tmp_path / name)
    LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100).save_pretrained(tmp_path)

    def lora_sizes(**teacher):
        names = {key: str(tmp_path / name) for key, name in teacher.items()}
        student = {"model_name_or_path": str(tmp_path)}
        return student_shape(RunConfig.model_validate({"name": "x", "teacher": names, "student": student})).lora

    bi, cross = lora_sizes(model_name_or_path="bi"), lora_sizes(cross_encoder="cross")
    assert cross == bi * 48 / 32
    assert lora_sizes(model_name_or_path="bi", cross_encoder="cross") == bi
