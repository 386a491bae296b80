"""The GLM of 2022 against a slow reference, and its published names, shapes and configurations."""

import json

import glm_reference
import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import CAUSAL, GLM_SHAPE, save_student
from transformers import AutoModel, AutoModelForCausalLM, GlmConfig

from flipkd_dist.base import attention_targets, check_base, check_parts, fills_blank, shares_prefix
from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.glm_original import GlmOriginalForCausalLM, GlmOriginalModel
from flipkd_dist.glm_original_config import GlmOriginalConfig
from flipkd_dist.model_files import resolve_model

SETTINGS = StudentConfig(model_name_or_path="tiny")
COMMON = {  # of the published config.json files
    "model_type": "glm",
    "architectures": ["GLMModel"],
    "attention_dropout_prob": 0.1,
    "attention_scale": 1.0,
    "auto_map": {
        "AutoConfig": "configuration_glm.GLMConfig",
        "AutoModel": "modeling_glm.GLMModel",
        "AutoModelForSeq2SeqLM": "modeling_glm.GLMForConditionalGeneration",
    },
    "block_position_encoding": True,
    "checkpoint_activations": False,
    "checkpoint_num_layers": 1,
    "embedding_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "max_sequence_length": 1024,
    "output_dropout_prob": 0.1,
    "output_predict": True,
    "parallel_output": True,
    "pool_token": "cls",
    "relative_encoding": False,
    "spell_func": "lstm",
    "spell_length": None,
    "torch_dtype": "float16",
}
PUBLISHED = {  # and the number of parameters that follows from their shapes
    "glm-2b": (dict(hidden_size=2048, num_attention_heads=32, num_layers=36, vocab_size=50304), 1_920_122_880),
    "glm-10b": (dict(hidden_size=4096, num_attention_heads=64, num_layers=48, vocab_size=50304), 9_880_682_496),
    "glm-10b-chinese": (
        dict(hidden_size=4096, num_attention_heads=64, num_layers=48, vocab_size=50048, bad_words_id=[50009]),
        9_879_633_920,
    ),
}


def published(folder, name="glm-10b", **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **PUBLISHED[name][0], **changes}))
    return folder


def random_model(implementation="sdpa", **changes) -> GlmOriginalForCausalLM:
    """Every tensor random, biases and layer norms too."""
    torch.manual_seed(3)
    config = GlmOriginalConfig(vocab_size=70, **{**GLM_SHAPE, "max_sequence_length": 20, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.2)
    return model.eval()


def blank_inputs(context: int, blank: int, mask_at: int, seed=0):
    """Ids [1, L], positions [1, 2, L] and mask [1, 1, L, L] of a context and of its blank, the start token included."""
    length = context + blank
    ids = torch.randint(70, (1, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.zeros(1, 2, length, dtype=torch.long)
    positions[0, 0] = torch.tensor([*range(context), *[mask_at] * blank])
    positions[0, 1, context:] = torch.arange(1, blank + 1)
    sees = torch.tril(torch.ones(length, length, dtype=torch.long))
    sees[:, :context] = 1
    return ids, positions, sees[None, None]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_agrees_with_the_slow_reference(implementation, dtype, tolerance):
    model = random_model(implementation).to(dtype)
    ids, positions, mask = blank_inputs(context=9, blank=4, mask_at=5)
    if dtype == torch.float64 and implementation == "eager":
        tolerance = 1e-5  # transformers' models take the softmax in fp32 there
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    states, logits = glm_reference.glm(weights, 4, ids[0].tolist(), positions[0].numpy(), mask[0, 0].numpy())
    found = model(input_ids=ids, position_ids=positions, attention_mask=mask, output_hidden_states=True)
    assert len(found.hidden_states) == len(states) == 3
    for value, wanted in [*zip(found.hidden_states, states, strict=True), (found.logits, logits)]:
        value = value[0].double().numpy()
        assert np.abs(value - wanted).max() < tolerance * np.abs(wanted).max()
        assert np.linalg.norm(value - wanted) < tolerance * np.linalg.norm(wanted)


@torch.no_grad()
def test_masks_and_positions_that_are_left_out():
    """Without a mask causal, with one of two dimensions in both directions but for the padding."""
    for implementation in ("sdpa", "eager"):
        model = random_model(implementation)
        ids = blank_inputs(8, 1, 3)[0].expand(2, -1)
        counted = torch.stack([torch.arange(9), torch.zeros(9, dtype=torch.long)])[None].expand(2, -1, -1)
        causal = torch.tril(torch.ones(9, 9, dtype=torch.bool))[None, None]
        padding = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
        seen = padding[:, None, None, :].expand(-1, -1, 9, -1)
        for short, full in ((None, causal), (padding, seen)):
            found = model(input_ids=ids, attention_mask=short).logits
            torch.testing.assert_close(found, model(input_ids=ids, position_ids=counted, attention_mask=full).logits)
        assert (model(input_ids=ids).logits - found).abs().max() > 1e-2


@torch.no_grad()
def test_generate_fills_the_blank():
    model = random_model()
    ids, positions, mask = blank_inputs(8, 5, 3)
    found = model.generate(
        input_ids=ids[:, :9],
        position_ids=positions,
        generation_attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    by_hand = ids[:, :9]
    for length in range(9, 13):
        inputs = dict(position_ids=positions[..., :length], attention_mask=mask[..., :length, :length])
        by_hand = torch.cat([by_hand, model(input_ids=by_hand, **inputs).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, by_hand) and len(set(by_hand[0, 9:].tolist())) > 1


def test_gradient_checkpointing_and_labels():
    inputs = dict(zip(("input_ids", "position_ids", "attention_mask"), blank_inputs(8, 3, 2), strict=True))
    labels = torch.full((1, 11), -100)
    labels[0, 8:] = torch.tensor([5, 6, 7])
    gradients = []
    for checkpointing in (False, True):
        model = random_model(output_dropout_prob=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        output = model(**inputs, labels=labels)
        output.loss.backward()
        wanted = torch.nn.functional.cross_entropy(output.logits[0, 8:], labels[0, 8:])
        torch.testing.assert_close(output.loss, wanted)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, value in gradients[0].items():
        assert value.norm() > 0, name
        torch.testing.assert_close(gradients[1][name], value)


def published_shapes(num_layers, hidden, vocab) -> dict[str, tuple[int, ...]]:
    shapes = {
        "glm.word_embeddings.weight": (vocab, hidden),
        "glm.transformer.position_embeddings.weight": (1025, hidden),
        "glm.transformer.block_position_embeddings.weight": (1025, hidden),
        "glm.transformer.final_layernorm.weight": (hidden,),
        "glm.transformer.final_layernorm.bias": (hidden,),
    }
    linear = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (4 * hidden, hidden),
        "mlp.dense_4h_to_h": (hidden, 4 * hidden),
    }
    for number in range(num_layers):
        layer = f"glm.transformer.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{norm}.weight": (hidden,), f"{layer}.{norm}.bias": (hidden,)}
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(tmp_path, name):
    """On the meta device: names and shapes as published, nothing besides, and the number of parameters."""
    shape, count = PUBLISHED[name]
    config = check_base(published(tmp_path, name), SETTINGS)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {name: tuple(value.shape) for name, value in model.named_parameters()}  # a tied matrix once
    assert found == published_shapes(shape["num_layers"], shape["hidden_size"], shape["vocab_size"])
    assert sum(int(np.prod(shape)) for shape in found.values()) == count
    assert attention_targets(model) == ["query_key_value"]
    check_parts(model, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_recognised(tmp_path, name):
    config = check_base(published(tmp_path, name), SETTINGS)
    assert type(config) is GlmOriginalConfig and config.model_type == "glm_original"
    assert (config.num_hidden_layers, config.max_position_embeddings) == (config.num_layers, 1024)
    assert not hasattr(config, "auto_map") and config.tie_word_embeddings
    assert fills_blank(config) and not shares_prefix(config, 64)
    config.save_pretrained(tmp_path)
    again = check_base(tmp_path, SETTINGS)  # under our own model type
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "glm_original"
    assert again.to_diff_dict() == config.to_diff_dict()


def test_the_glm_of_transformers_stays_what_it_is(tmp_path):
    GlmConfig(hidden_size=64).save_pretrained(tmp_path)
    config = check_base(tmp_path, SETTINGS)
    assert type(config) is GlmConfig and not fills_blank(config) and shares_prefix(config, 64)
    assert not fills_blank(CAUSAL["llama"](10))


@pytest.mark.parametrize("changes", [{"relative_encoding": True}, {"block_position_encoding": False}])
def test_positions_of_other_kinds_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match=r"config\.json cannot be used \(only GLMs with block positions"):
        check_base(published(tmp_path, **changes), SETTINGS)


def test_files_round_trip(tmp_path):
    """Names in the file are the published ones; the body alone, and files without its prefix, load as well."""
    folder = save_student(tmp_path / "a", "glm_original")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(published_shapes(2, 48, 400))
    model = GlmOriginalForCausalLM.from_pretrained(folder)  # by its class: Auto takes a published folder for GLM-4
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    body = AutoModel.from_pretrained(tmp_path / "b")
    assert type(again) is GlmOriginalForCausalLM and type(body) is GlmOriginalModel
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    body.save_pretrained(tmp_path / "c")
    with safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        assert "word_embeddings.weight" in file.keys()  # noqa: SIM118
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "c").state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_pickled_weights_name_the_remedy(tmp_path):
    (published(tmp_path) / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"pickled weights are never loaded: .*docs/glm\.md"):
        resolve_model(str(tmp_path), "student.model_name_or_path")
