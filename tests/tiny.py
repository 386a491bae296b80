"""Tiny models, tokenizers and pairs for the tests, built from configurations; nothing is downloaded."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from make_glm_original import make_glm_original
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    Glm4Config,
    GlmConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from flipkd_dist.base import check_base, fills_blank, load_tokenizer
from flipkd_dist.config import RunConfig, StudentConfig
from flipkd_dist.pairs import PairTable
from flipkd_dist.preflight import check_inputs
from flipkd_dist.prompt import PairEncoder, TextEncoder, student_encoder
from flipkd_dist.score import score, score_shards_here
from flipkd_dist.signals import TeacherSignals, TextTeacher
from flipkd_dist.store import pair_text
from flipkd_dist.student import Student, load_student
from flipkd_dist.teacher_stage import calibrate, fill_pair_store

WORDS = [
    "card",
    "lost",
    "stolen",
    "pin",
    "blocked",
    "change",
    "my",
    "how",
    "do",
    "i",
    "where",
    "is",
    "the",
    "can",
    "you",
    "help",
    "with",
    "account",
    "open",
    "close",
    "money",
]
PROMPTS = {"pair": "do i same ? {text_a} | {text_b} =", "alone": "do i help ? {text} ="}
SHAPE = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512
)
GLM_SHAPE = dict(
    hidden_size=48,
    num_layers=2,
    num_attention_heads=4,
    max_sequence_length=128,
    embedding_dropout_prob=0.0,
    attention_dropout_prob=0.0,
    output_dropout_prob=0.0,
)
CAUSAL = {
    "glm": lambda vocab: GlmConfig(vocab_size=vocab, num_key_value_heads=2, head_dim=12, pad_token_id=0, **SHAPE),
    "glm4": lambda vocab: Glm4Config(vocab_size=vocab, num_key_value_heads=2, head_dim=12, pad_token_id=0, **SHAPE),
    "qwen2": lambda vocab: Qwen2Config(vocab_size=vocab, num_key_value_heads=2, tie_word_embeddings=True, **SHAPE),
    "qwen3": lambda vocab: Qwen3Config(vocab_size=vocab, num_key_value_heads=2, head_dim=12, **SHAPE),
    "llama": lambda vocab: LlamaConfig(vocab_size=vocab, num_key_value_heads=4, **SHAPE),
}


def sentences(count: int, seed: int = 0, shortest: int = 2, longest: int = 12) -> list[str]:
    """Distinct word salads."""
    generator = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(generator.choice(WORDS, generator.integers(shortest, longest + 1)))] = None
    return list(found)


CORPUS = [*sentences(200), "Yes", "No", " Yes", " No", "yes no", " yes", " no", "Same? | = Reply:"] * 3


def tokenizer(kind: str = "wordpiece") -> PreTrainedTokenizerFast:
    if kind == "wordpiece":
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.normalizer = normalizers.BertNormalizer(lowercase=True)
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
        inner.train_from_iterator(CORPUS, trainer)
        ids = [(token, inner.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
        )
    if kind == "bytelevel":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        inner.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<pad>"])
        )
        return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    inner = Tokenizer(models.Unigram())  # as SentencePiece does: a space before every text
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"], unk_token="<unk>")
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


def save_student(folder: Path, family: str = "glm", seed: int = 0, **changes) -> Path:
    """A random causal LM and its tokenizer as a Hugging Face folder; `glm_original` in its published files."""
    if family == "glm_original":
        shape = {**GLM_SHAPE, **changes}
        make_glm_original(folder, CORPUS, vocab_size=400, seed=seed, std=0.15, **shape)
        return folder
    words = tokenizer("bytelevel" if family.startswith("qwen") else "wordpiece")  # Qwen's class takes no other
    config = CAUSAL[family](len(words))
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # wider than the default, so that attention and answers differ between texts
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def started_student(
    folder: Path, max_length: int = 120, rank: int | None = 8, placement=None, **settings
) -> tuple[Student, PairEncoder | TextEncoder]:
    """The student in `folder` as in the middle of training: B is not zero any more; `settings` of StudentConfig."""
    student_settings = StudentConfig(**{"model_name_or_path": "tiny", "lora_dropout": 0.0, **settings})
    blank = fills_blank(check_base(folder, student_settings))
    mode = student_settings.mode
    encoder = student_encoder(load_tokenizer(folder), mode, PROMPTS[mode], ["yes", "no"], max_length, blank)
    student = load_student(folder, student_settings, encoder.answer_ids, rank, placement=placement)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in student.trained_parameters().items():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        elif ".lora_A." in name:
            parameter.data.mul_(10)
    return student, encoder


def with_output_matrix(student: Student, folder: Path) -> Student:
    """The student with the whole output matrix of the model in `folder`, which it does without."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    [name] = [name for name, module in whole.named_modules() if module is whole.get_output_embeddings()]
    student.model.get_base_model().set_submodule(name, whole.get_output_embeddings())
    return student


def save_teacher(folder: Path, hidden_size: int = 16, seed: int = 1) -> Path:
    """A random BERT with the WordPiece tokenizer."""
    words = tokenizer("wordpiece")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_cross_encoder(folder: Path, num_labels: int = 1, seed: int = 11, **config) -> Path:
    """A random BERT that scores pairs, with weights wide enough for scores that differ."""
    vocabulary = {word: row for row, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    settings = dict(
        vocab_size=len(vocabulary), max_position_embeddings=48, initializer_range=0.5, num_labels=num_labels
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertForSequenceClassification(BertConfig(**settings | shape | config)).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder


def pair_table(num_pairs: int, seed: int = 0, **lengths) -> PairTable:
    """Random pairs, some texts in several; three labels of four agree with the cosine of `unit_vectors`."""
    generator = np.random.default_rng(seed)
    texts = sentences(max(4, num_pairs + num_pairs // 2), seed, **lengths)
    text_a = generator.integers(len(texts), size=num_pairs)
    text_b = (text_a + 1 + generator.integers(len(texts) - 1, size=num_pairs)) % len(texts)
    vectors = unit_vectors(len(texts))
    alike = np.einsum("nd,nd->n", vectors[text_a], vectors[text_b]) >= 0.5
    label = alike ^ (generator.random(num_pairs) < 0.25)
    none = np.full(num_pairs, -1)
    return PairTable(
        texts=texts,
        text_a=text_a,
        text_b=text_b,
        label=label.astype(np.int64),
        ids=[str(i) for i in range(num_pairs)],
        kind=[""] * num_pairs,
        group_a=none,
        group_b=none,
    )


def unit_vectors(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    """Unit vectors whose cosines spread over both sides of 0.5."""
    vectors = np.random.default_rng(seed).normal(0.42, 0.4, size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_pairs(path: Path, count: int, seed: int) -> str:
    """A text and a variant of it match, two texts do not; every fifth negative is called hard. The path."""
    texts = sentences(2 * count, seed, shortest=4)
    with path.open("w") as file:
        for number in range(count):
            match = number % 2
            other = f"{texts[number]} please" if match else texts[count + number]
            kind = "positive" if match else "hard" if number % 10 == 0 else "random"
            record = {"id": f"p{number}", "text_a": texts[number], "text_b": other, "label": match, "kind": kind}
            file.write(json.dumps(record) + "\n")
    return str(path)


class ArrayReader:
    """Vectors of a table's texts in memory, in place of a store's reader."""

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors

    def rows(self, texts: list[str]) -> np.ndarray:
        assert len(texts) == len(self.vectors)
        return np.arange(len(texts))

    def at(self, rows: np.ndarray) -> np.ndarray:
        return self.vectors[rows]


class PairReader:
    """Scores of pairs in memory, in place of a store's reader; asked for another it raises KeyError."""

    def __init__(self, scores: dict[tuple[str, str], float]):
        self.numbers = {pair_text(*pair): row for row, pair in enumerate(scores)}
        self.scores = np.array(list(scores.values()), np.float32)

    def rows(self, texts: list[str]) -> np.ndarray:
        return np.array([self.numbers[text] for text in texts], np.int64)

    def at(self, rows: np.ndarray) -> np.ndarray:
        return self.scores[rows, None]


def signals_of(pairs: PairTable, vectors: np.ndarray) -> TeacherSignals:
    """A teacher of texts with the vectors [texts, d]."""
    return TeacherSignals(pairs, TextTeacher(ArrayReader(vectors)))


def fill_store(config: RunConfig) -> None:
    """All that the stage `score` does with the teacher, here and without Ray."""
    inputs = check_inputs(config)
    inputs.folder.open()

    def score_here(source, store, texts) -> None:
        score(texts(), store, score_shards_here(source.load(), store))

    if inputs.teacher is not None:
        score_here(inputs.teacher, inputs.store, lambda: inputs.texts)
    fill_pair_store(inputs, partial(score_here, inputs.pair_source, inputs.pair_store))
    calibrate(inputs)
