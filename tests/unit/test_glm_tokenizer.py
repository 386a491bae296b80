"""The original GLM's tokenizers out of small files of the published kinds."""

import json
import shutil

import pytest
from make_glm_original import ADDED, save_tokenizer
from sentencepiece import SentencePieceProcessor
from tiny import CORPUS
from transformers.convert_slow_tokenizer import import_protobuf

from flipkd_dist.base import load_tokenizer
from flipkd_dist.errors import UserError
from flipkd_dist.prompt import PairEncoder, answer_ids

CHINESE_ADDED = {  # as in glm-10b-chinese, relative to its 50,000 pieces
    "<|endoftext|>": 0, "[SEP]": 1, "[CLS]": 2, "[MASK]": 3, "[UNUSED1]": 4, "[UNUSED2]": 5,
    "<|startofpiece|>": 6, "<|endofpiece|>": 7, "[sMASK]": 8, "[gMASK]": 9,
}  # fmt: skip
PIECES = [
    "▁",
    "卡",
    "丢",
    "了",
    "银行",
    "银",
    "行",
    "我的",
    "我",
    "的",
    "卡丢了",
    "是",
    "否",
    "▁是",
    "▁否",
    "吗",
    "?",
    "card",
]


@pytest.fixture
def gpt2(tmp_path):
    save_tokenizer(tmp_path, CORPUS, 380)
    return tmp_path


@pytest.fixture
def chinese(tmp_path):
    """A Unigram model file, written without SentencePiece."""
    proto = import_protobuf().ModelProto()
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3), *((piece, 1) for piece in PIECES)):
        proto.pieces.add(piece=piece, score=-1.0 - len(proto.pieces) / 10 if kind == 1 else 0.0, type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.unk_id, proto.trainer_spec.vocab_size = 1, 0, len(proto.pieces)
    proto.normalizer_spec.name, proto.normalizer_spec.add_dummy_prefix = "identity", True
    (tmp_path / "cog-pretrain.model").write_bytes(proto.SerializeToString())
    first = len(proto.pieces)
    (tmp_path / "added_tokens.json").write_text(json.dumps({k: first + v for k, v in CHINESE_ADDED.items()}))
    config = {"tokenizer_class": "GLMChineseTokenizer", "mask_token": {"content": "[MASK]", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def check_roles(words, folder):
    added = json.loads((folder / "added_tokens.json").read_text())
    assert {token: words.convert_tokens_to_ids(token) for token in added} == added
    roles = ("cls_token_id", "mask_token_id", "eos_token_id", "pad_token_id")
    tokens = ("[CLS]", "[MASK]", "<|endoftext|>", "<|endoftext|>")
    assert [getattr(words, role) for role in roles] == [added[token] for token in tokens]


def test_gpt2_kind(gpt2, tmp_path):
    words = load_tokenizer(gpt2)
    check_roles(words, gpt2)
    text = "how do i open [MASK] account"
    tokens = words.convert_ids_to_tokens(words(text)["input_ids"])
    assert tokens == ["[CLS]", "how", "Ġdo", "Ġi", "Ġopen", "Ġ", "[MASK]", "Ġaccount", "<|endoftext|>"]
    assert words.decode(words(text, add_special_tokens=False)["input_ids"]) == text
    words.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again(text)["input_ids"] == words(text)["input_ids"] and again.mask_token_id == words.mask_token_id
    assert again.get_vocab() == words.get_vocab()


def test_gaps_between_ids_are_filled(gpt2):
    added = json.loads((gpt2 / "added_tokens.json").read_text())
    moved = {token: number + 3 if token == "[gMASK]" else number for token, number in added.items()}
    (gpt2 / "added_tokens.json").write_text(json.dumps(moved))
    check_roles(load_tokenizer(gpt2), gpt2)


def test_chinese_kind(chinese):
    words = load_tokenizer(chinese)
    check_roles(words, chinese)
    assert words.unk_token == "<unk>"
    for text, wanted in (("银行卡丢了", "▁ 银行 卡丢了"), ("我的卡[MASK]吗", "▁ 我的 卡 [MASK] ▁ 吗"), ("是", "▁是")):
        found = words.convert_ids_to_tokens(words(text)["input_ids"])
        assert found == ["[CLS]", *wanted.split(), "<|endoftext|>"]
    encoder = PairEncoder(words, "{text_a} {text_b}吗", ["是", "否"], 40, blank=True)
    assert words.convert_ids_to_tokens(encoder.answer_ids) == ["▁是", "▁否"]
    assert words.convert_ids_to_tokens(encoder.suffix)[-3:] == ["[MASK]", "<|endoftext|>", "<|startofpiece|>"]
    assert words.tokenize("卡") == ["▁", "卡"]  # inside a sentence without the space
    assert words.convert_ids_to_tokens(answer_ids(words, ["卡", "我的"], "吗")) == ["卡", "我的"]


def test_chinese_kind_against_sentencepiece(chinese):
    processor = SentencePieceProcessor(str(chinese / "cog-pretrain.model"))
    words = load_tokenizer(chinese)
    for text in ("银行卡丢了", "我的银行卡是 card 吗?", "行 的?", "卡 丢了 吗"):
        assert words(text, add_special_tokens=False)["input_ids"] == processor.encode(text)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json"])
def test_a_missing_file(gpt2, name):
    (gpt2 / name).unlink()
    with pytest.raises(UserError, match=r"^student\.model_name_or_path: the tokenizer in .*: get it again$") as error:
        load_tokenizer(gpt2)
    assert "\n" not in str(error.value)


def test_ids_that_do_not_fit(gpt2):
    added = {token: number + 7 for number, token in enumerate(ADDED)}
    (gpt2 / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(UserError, match=r"added_tokens\.json gives <\|endoftext\|> the id 7, the vocabulary \d+"):
        load_tokenizer(gpt2)


def test_a_saved_fast_tokenizer_goes_before(gpt2, tmp_path):
    words = load_tokenizer(gpt2)
    words.save_pretrained(tmp_path / "saved")
    shutil.copy(gpt2 / "tokenizer_config.json", tmp_path / "tokenizer_config.old.json")
    (gpt2 / "added_tokens.json").unlink()
    shutil.copy(tmp_path / "saved" / "tokenizer.json", gpt2 / "tokenizer.json")
    shutil.copy(tmp_path / "saved" / "tokenizer_config.json", gpt2 / "tokenizer_config.json")
    assert load_tokenizer(gpt2)("open")["input_ids"] == words("open")["input_ids"]
