"""Scores of pairs: right by hand, in the right order, in any batch; what is no cross-encoder is refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_cross_encoder, save_teacher, sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flipkd_dist.config import TeacherConfig
from flipkd_dist.cross_encoder import CrossEncoder, cross_encoder_source
from flipkd_dist.errors import UserError
from flipkd_dist.store import pair_text

TEXTS = sentences(24, seed=3, longest=20)
PAIRS = list(zip(TEXTS[:12], TEXTS[12:], strict=True))


def source(folder, **settings):
    return cross_encoder_source(TeacherConfig(cross_encoder=str(folder), **{"max_length": 16, **settings}))


def message(folder, **settings) -> str:
    with pytest.raises(UserError) as error:
        source(folder, **settings).load()
    assert "\n" not in str(error.value) and str(error.value).startswith("teacher.cross_encoder")
    return str(error.value)


def by_hand(folder, max_length):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        options = dict(truncation="longest_first", max_length=max_length, return_tensors="pt")
        return np.array([model(**tokenizer(*pair, **options)).logits[0].numpy() for pair in PAIRS])


@pytest.fixture(scope="module", params=[1, 2])
def folder(tmp_path_factory, request):
    return save_cross_encoder(tmp_path_factory.mktemp("cross") / str(request.param), request.param)


@pytest.mark.parametrize("max_length", [16, 5])
def test_scores_are_those_of_each_pair_alone_in_the_order_given(folder, max_length):
    """With 5 + 5 tokens both texts of many pairs are cut."""
    encoder = pickle.loads(pickle.dumps(source(folder, max_length=max_length))).load()
    scores = encoder.encode([pair_text(*pair) for pair in PAIRS], batch_size=5)
    logits = by_hand(folder, 2 * max_length)
    expected = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
    assert scores.shape == (12, 1) and scores.dtype == np.float32 and expected.std() > 0.05
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-4)
    assert encoder.encode([], 4).shape == (0, 1)


def test_cut_pairs_are_counted(folder):
    lengths = sorted(len(ids) for ids in AutoTokenizer.from_pretrained(folder)(*zip(*PAIRS, strict=True))["input_ids"])
    fits = lengths[-5] + lengths[-5] % 2  # teacher.max_length is that of one text
    encoder = source(folder, max_length=fits // 2).load()
    for times in (1, 2):
        encoder.encode([pair_text(*pair) for pair in PAIRS], 4)
        assert encoder.num_truncated == times * sum(length > fits for length in lengths) > 0


def test_the_order_of_the_texts_counts(folder):
    encoder = source(folder).load()
    there, back = (encoder.encode([pair_text(*pair[::step]) for pair in PAIRS], 4) for step in (1, -1))
    assert np.abs(there - back).max() > 0.01


def test_the_models_own_limit_counts(folder):
    assert source(folder, max_length=16).load().max_length == 32
    assert source(folder, max_length=100).load().max_length == 48
    assert source(folder, max_length=100).spec.max_length == 200


def test_the_spec_follows_the_weights(tmp_path, folder):
    spec = source(folder).spec
    assert (spec.hidden_size, spec.dtype) == (1, "float32") and source(folder).hidden_size == 24
    other = save_cross_encoder(tmp_path / "other", source(folder).load().model.config.num_labels, seed=9)
    keys = {spec.key, source(other).spec.key, source(folder, max_length=17).spec.key}
    assert len(keys) == 3


def test_the_scale(folder):
    assert source(folder).scale == "logit" and source(folder, scale="probability").scale == "probability"


def test_other_models_are_refused(tmp_path):
    assert "has 3 logits" in message(save_cross_encoder(tmp_path / "three", 3))
    assert "BertModel" in message(save_teacher(tmp_path / "encoder"))
    assert "neither a folder nor" in message(tmp_path / "nowhere")
    prompted = save_cross_encoder(tmp_path / "prompted")
    (prompted / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    assert "wants a prompt" in message(prompted)
    (prompted / "config_sentence_transformers.json").write_text('{"prompts": {}, "default_prompt_name": null}')
    assert source(prompted).load()


def test_damaged_folders_are_refused(tmp_path):
    folder = save_cross_encoder(tmp_path / "cross")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "1 weights are missing, such as classifier.weight" in message(folder)
    save_file(
        weights | {"classifier.weight": torch.full((1, 24), torch.nan)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="not finite"):
        source(folder).load().encode([pair_text("card", "pin")], 1)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["Nothing"]}))
    assert "no sequence classification model" in message(folder)
    tokens = save_cross_encoder(tmp_path / "tokens")
    for path in [*tokens.glob("tokenizer*"), *tokens.glob("vocab*"), *tokens.glob("special*")]:
        path.unlink()
    assert "no tokenizer files" in message(tokens)


def test_it_is_not_loaded_by_name_of_code(tmp_path):
    folder = save_cross_encoder(tmp_path / "cross")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}))
    assert "config.json cannot be used" in message(folder)
    with pytest.raises(UserError):
        CrossEncoder(folder, 16)
    own = {"auto_map": {"AutoModelForSequenceClassification": "modeling.Own"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    assert "brings code of its own" in message(folder)
