"""Which encoder a command means, options without effect, and how windows of texts are encoded."""

import types

import numpy as np
import pytest
from encoders import FACTS, MadeUpEncoder, made_up_vector, save_card
from tiny_teacher import TEXTS, save_tiny_teacher

from flipkd_dist import text_encoder
from flipkd_dist.errors import UserError
from flipkd_dist.teacher import Teacher
from flipkd_dist.text_encoder import BatchedEncoder, EncoderChoice, encoded_windows, located
from flipkd_dist.text_records import NamedText


def entries(texts):
    return [NamedText(str(n), text, f"file:{n}") for n, text in enumerate(texts)]


CONTRADICTIONS = {
    "neither": (dict(), "MODEL: name an adapter"),
    "both": (dict(model="a", encoder="b"), "MODEL: name an adapter"),
    "length of an adapter": (dict(model="a", max_length=5), "--max-length: has no effect on an adapter"),
    "prompt of an adapter": (dict(model="a", query_prompt="q: "), "--query-prompt: has no effect on an adapter"),
    "three prompts": (dict(encoder="a", prompt="", query_prompt="q", document_prompt="d"), "--prompt: has no effect b"),
    "tokens of an encoder": (dict(encoder="a", max_batch_tokens=5), "--max-batch-tokens: has no effect on an encoder"),
    "base of an encoder": (dict(encoder="a", base_model="b"), "--base-model: has no effect on an encoder"),
    "server of an encoder": (dict(encoder="a", tracking_uri="b"), "--tracking-uri: has no effect on an encoder"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_options_without_effect(case):
    given, message = CONTRADICTIONS[case]
    with pytest.raises(UserError, match=message), located(EncoderChoice(**given)):
        pass


def test_an_adapter_of_pairs_has_no_vectors(tmp_path):
    save_card(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"reads pairs.*student\.mode: alone, or give --encoder"):
        with located(EncoderChoice(str(tmp_path))):
            pass


def test_an_adapter_of_texts_is_loaded_with_its_limits(tmp_path, monkeypatch):
    save_card(tmp_path / "adapter", mode="alone")
    seen = []

    class Embedder:
        dimension, num_truncated, facts = 8, 0, FACTS

        def __init__(self, folder, base_model):
            seen.append((folder, base_model))

        def encode(self, texts, batch_size, max_batch_tokens, done):
            seen.append((max_batch_tokens, batch_size))
            return MadeUpEncoder().encode(texts)

    monkeypatch.setattr(text_encoder, "Embedder", Embedder)
    monkeypatch.setattr(text_encoder, "adapter_facts", lambda _: FACTS)
    monkeypatch.setattr(text_encoder, "saved_encoder", lambda folder, base: seen.append((folder, base)))
    adapter = tmp_path / "adapter"
    for given, limits in ((dict(), (8192, 512)), (dict(batch_size=3, max_batch_tokens=7, base_model="base"), (7, 3))):
        with located(EncoderChoice(str(tmp_path), **given)) as found:
            encoder = found.load()
        assert encoder.dimension == 8 and encoder.encode(["a", "b"]).shape == (2, 8) and encoder.facts == FACTS
        base = given.get("base_model")
        assert seen == [(adapter, base), (adapter, base), limits]
        seen.clear()


def test_an_encoder_is_the_teacher_of_that_folder(tmp_path):
    folder = save_tiny_teacher(tmp_path / "teacher")
    with located(EncoderChoice(encoder=str(folder), max_length=6, batch_size=2)) as found:
        encoder = found.load()
    plain = Teacher(folder, "mean", 6)
    assert np.allclose(encoder.encode(TEXTS), plain.encode(TEXTS, 64), atol=1e-6)
    assert encoder.dimension == 16 and encoder.num_truncated == plain.num_truncated > 0
    with pytest.raises(UserError, match="--encoder"), located(EncoderChoice(encoder=str(tmp_path / "none"))):
        pass


def test_windows_and_what_was_cut(monkeypatch, said):
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 4)
    inner = MadeUpEncoder()
    inner.num_truncated = 5  # of something before
    texts = [f"text {n % 3}" for n in range(10)]
    encode = inner.encode

    def counted(texts):
        inner.num_truncated += 1
        return encode(texts)

    inner.encode = counted
    found = list(encoded_windows(BatchedEncoder(inner, 8, {}, {}), entries(texts), 10, "embed", "file"))
    assert [len(window) for window, _ in found] == [4, 4, 2] and inner.calls == [3, 3, 2]
    for window, vectors in found:
        assert np.array_equal(vectors, np.array([made_up_vector(entry.text) for entry in window]))
    assert said == ["embed: 3 of 10 texts were cut to the maximum length (equal ones of a window count once)"]


@pytest.mark.parametrize(("total", "how"), [(9, "more"), (11, "fewer")])
def test_texts_that_changed_since_they_were_checked(monkeypatch, total, how):
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 4)
    windows, texts = [], [f"text {n}" for n in range(10)]
    with pytest.raises(UserError, match=f"^file: {total} texts were checked and {how} are read now"):
        windows.extend(encoded_windows(BatchedEncoder(MadeUpEncoder(), 8, {}, {}), entries(texts), total, "e", "file"))
    assert sum(len(window) for window, _ in windows) <= total


def test_vectors_that_are_not_finite():
    inner = types.SimpleNamespace(encode=lambda texts: np.full((len(texts), 2), np.nan))
    with pytest.raises(UserError, match="not finite"):
        BatchedEncoder(inner, 2, {}, {}).encode(["a"])


def test_prompts_of_an_encoder(tmp_path):
    """Each side has its own, else the common one; what a vector depends on is known, and told apart."""
    folder = save_tiny_teacher(tmp_path / "teacher")
    choice = EncoderChoice(encoder=str(folder), prompt="is it ", query_prompt="how ", max_length=16)
    revisions = set()
    with located(choice) as found:
        for side, prompt in (("query", "how "), ("document", "is it "), ("", "is it ")):
            encoder = found.load(side)
            expected = Teacher(folder, "mean", 16, prompt=prompt).encode(TEXTS, 64)
            assert np.allclose(encoder.encode(TEXTS), expected, atol=1e-6) and encoder.facts["prompt"] == prompt
            revisions.add(encoder.revision)
    assert len(revisions) == 2
    plain = Teacher(folder, "mean", 16).encode(TEXTS, 64)
    assert not np.allclose(expected, plain, atol=1e-3)
    with located(EncoderChoice(encoder=str(folder), max_length=600)) as found:
        with pytest.raises(UserError, match="--max-length = 600: "):
            found.load()
