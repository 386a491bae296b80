"""Encoders without a model: vectors that depend on the text alone, an adapter folder of mode `alone`, BEIR folders."""

import json
import logging
import sys
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
from peft_reference import CARD
from test_predict_file import write_jsonl

from flipkd_dist import cli, text_encoder
from flipkd_dist.text_encoder import BatchedEncoder

WIDTH = 8
FACTS = {"step": 3, "fingerprint": "abc", "max_length": 120, "prompt": None}


def made_up_vector(text: str) -> np.ndarray:
    """Three words decide, so that several texts share a vector."""
    seed = zlib.crc32(" ".join(text.split()[:3]).encode())
    vector = np.random.default_rng(seed).normal(0.3, 1, WIDTH).astype(np.float32)
    return vector / np.linalg.norm(vector)


class MadeUpEncoder:
    """Notes how many texts it is given at a time."""

    num_truncated = 0
    dimension = WIDTH

    def __init__(self):
        self.calls: list[int] = []

    def encode(self, texts, **_) -> np.ndarray:
        self.calls.append(len(texts))
        return np.array([made_up_vector(text) for text in texts], np.float32).reshape(-1, WIDTH)


class Tokens:
    """Stands for a student's tokens: the replacement character has none."""

    def first_without_tokens(self, texts):
        return next((text for text in texts if "\ufffd" in text), None)


def save_card(folder, **changes):
    folder.mkdir()
    (folder / "flipkd.json").write_text(json.dumps(asdict(replace(CARD, **changes))))


@pytest.fixture
def encoders(monkeypatch, tmp_path):
    """The encoders that were loaded; `adapter` is a folder of mode alone, `pairs` one of mode pair."""
    made = []

    def load(*_):
        made.append(MadeUpEncoder())
        return BatchedEncoder(made[-1], WIDTH, {}, FACTS)

    monkeypatch.setattr(text_encoder, "_student_encoder", load)
    monkeypatch.setattr(text_encoder, "adapter_facts", lambda _: FACTS)
    monkeypatch.setattr(text_encoder, "saved_encoder", lambda *_: Tokens())
    monkeypatch.chdir(tmp_path)
    save_card(tmp_path / "adapter", mode="alone")
    save_card(tmp_path / "pairs")
    return made


@pytest.fixture
def said():
    """What the package logs, however the command line has set its logger up."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("flipkd_dist")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def flipkd(monkeypatch, *arguments):
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["flipkd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
        raise SystemExit(0)
    return stopped.value.code


def refused(code, capsys, where, remedy=""):
    [line] = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith(f"flipkd: {where}") and remedy in line, line


def write_beir(folder, corpus, queries, judged, split="test"):
    """Args: corpus and queries: id -> text or object; judged: (query, document, grade)."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", corpus), ("queries", queries)):
        objects = {key: value if isinstance(value, dict) else {"text": value} for key, value in texts.items()}
        write_jsonl(folder / f"{name}.jsonl", [{"_id": key, **value} for key, value in objects.items()])
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, one)) for one in judged)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder
