"""p(match) of pairs from a saved adapter, in one process and without the teacher."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from tqdm import tqdm

from flipkd_dist.adapter import WEIGHTS, AdapterCard, check_probe, load_weights
from flipkd_dist.base import check_base, fills_blank, load_tokenizer, shares_prefix
from flipkd_dist.base_loader import Streamed, Whole
from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import batch_scores
from flipkd_dist.losses import alone_logits
from flipkd_dist.model_files import fingerprint, resolve_model
from flipkd_dist.prompt import PairEncoder, TextEncoder, student_encoder
from flipkd_dist.run_folder import read_json
from flipkd_dist.student import Student, load_student
from flipkd_dist.text_vectors import text_vectors
from flipkd_dist.token_batches import BatchLimits, token_batches, windows
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")


@dataclass(frozen=True)
class Ranked:
    """A candidate in its place: `index` counts from 0 in the list that was ranked."""

    index: int
    p_match: float
    similarity: float  # cosine of the read-outs


def ranked(p_match: Sequence[float], similarity: Sequence[float], top_k: int | None = None) -> list[Ranked]:
    """Candidates by falling p(match), equal ones in the order in which they came; the best `top_k` of them."""
    best = sorted(range(len(p_match)), key=lambda index: -p_match[index])[:top_k]
    return [Ranked(index, float(p_match[index]), float(similarity[index])) for index in best]


@contextmanager
def progress(total: int, description: str, unit: str = "pairs") -> Iterator[Callable[[int, int], None]]:
    """A bar over pairs or texts with its ETA; the function takes how many are done, and how many of them were cut."""
    cut = 0
    with tqdm(total=total, desc=description, unit=f" {unit}", disable=None, leave=False) as bar:

        def done(num_pairs: int, num_truncated: int) -> None:
            nonlocal cut
            cut += num_truncated
            bar.update(num_pairs)

        yield done
    if cut:
        logger.warning("%s: %d of %d %s were cut to the maximum length", description, cut, total, unit)


def merge_lora(student: Student) -> None:
    """Add (alpha / r) B A to the base's weights, and drop A and B; but not where the read-out needs A.

    The products of LoRA are then no work of their own. For fp32 weights it is exact up to fp32's rounding; packed 4-bit
    weights cannot take it, and bf16 would round the sum, which changes answers.
    """
    lora = {name: module for name, module in student.model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in lora.items():
        if name != student.encoder_name or student.reads != "lora_a":
            module.merge()
            student.model.set_submodule(name, module.get_base_layer())


class Matcher:
    """A base with its adapter, or a tuned model; `threshold` is the decision threshold of p(match) from validation."""

    def __init__(
        self,
        folder: Path,
        base_model: str | None = None,
        device: str | None = None,
        merge: bool = True,
        streamed: bool = False,
    ):
        """
        Args:
            folder: an adapter folder.
            base_model: where the base is, if not where it was in training.
            merge: add the adapter to the base's weights in memory (`merge_lora`), where they are dense and fp32: there
                alone it is exact.
            streamed: read the base again for each forward, one layer in memory at a time (`Streamed`): for a few pairs
                where the whole has no room. Nothing is merged then.
        Raises:
            UserError: no adapter there, a base that is not the one it was trained on, or one that cannot be streamed.
            RuntimeError: the adapter does not answer its probe pair as it did when it was saved.
        """
        card, base, encoder = _saved_reading(folder, base_model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # On a CPU bf16 is slow, and fp32 answers the same up to bf16's rounding.
        dtype = torch.float32 if device == "cpu" else getattr(torch, card.dtype)
        settings = _saved_settings(folder, card, base)
        placement = Streamed(device) if streamed else Whole(device)
        student = load_student(base, settings, encoder.answer_ids, settings.lora_r, dtype=dtype, placement=placement)
        if card.tuning == "lora":
            load_weights(student, folder / WEIGHTS)
        if merge and not streamed and dtype == torch.float32 and not card.load_in_4bit:
            merge_lora(student)
        self.threshold, self.student = card.threshold, student.to(device).eval()
        self.make_batch = BatchMaker(encoder, student, shares_prefix(student.model.config, card.max_length))
        self.world = World(device=torch.device(device))
        [p_match], _ = self.predict([(card.probe.text_a, card.probe.text_b)])
        check_probe(p_match, card, dtype)

    def predict(
        self, texts: Sequence[tuple[str, str]], batch_size: int = 512, max_batch_tokens: int = 8192
    ) -> tuple[np.ndarray, np.ndarray]:
        """p(match) and the cosine of the read-outs of each pair, float64 [N] each, in the order of `texts`.

        Args:
            batch_size: the most pairs of a forward.
            max_batch_tokens: the most tokens that a forward computes, shared ones counted once.
        Raises:
            UserError: a text without a token.
        """
        with progress(len(texts), "predict") as done:
            scores = self.scores(texts, BatchLimits(max_batch_tokens, batch_size), done)
        return scores[:, 0], scores[:, 1]

    def rank(
        self,
        query: str,
        candidates: Sequence[str],
        top_k: int | None = None,
        batch_size: int = 512,
        max_batch_tokens: int = 8192,
    ) -> list[Ranked]:
        """The candidates by falling p(match) with `query` as first text, equal ones in their own order."""
        return ranked(*self.predict([(query, text) for text in candidates], batch_size, max_batch_tokens), top_k)

    def scores(
        self, texts: Sequence[tuple[str, str]], limits: BatchLimits, done: Callable[[int, int], None]
    ) -> np.ndarray:
        """p(match) and the cosine of the read-outs of each pair, float64 [N, 2].

        Args:
            done: told how many pairs are done, and how many of them were cut to the maximum length.
        """
        score = self._window_alone if self.student.alone else self._window
        parts = [score(window, limits, done) for window in windows(texts, _characters, lambda _: 1)]
        return np.concatenate([np.zeros((0, 2)), *parts])

    def vectors(self, texts: Sequence[str], limits: BatchLimits, done: Callable[[int, int], None]) -> np.ndarray:
        """Unit vectors of texts, float32 [N, d], of a student that encodes them alone.

        Args:
            done: told how many texts are done, and how many of them were cut to the maximum length.
        """
        parts = [self._vectors(window, limits, done)[0].cpu().numpy() for window in windows(texts, len, lambda _: 1)]
        return np.concatenate([np.zeros((0, self.student.readout_width), np.float32), *parts])

    def _vectors(self, texts: Sequence[str], limits: BatchLimits, done: Callable[[int, int], None]):
        return text_vectors(self.student, self.make_batch, texts, limits, self.world.device, done)

    def _window_alone(
        self, texts: list[tuple[str, str]], limits: BatchLimits, done: Callable[[int, int], None]
    ) -> np.ndarray:
        firsts, seconds = zip(*texts, strict=True)
        vectors, cut = self._vectors([*firsts, *seconds], limits, lambda *_: None)
        sides = vectors.chunk(2)
        first_cut, second_cut = cut.chunk(2)
        done(len(texts), int((first_cut | second_cut).sum()))
        return batch_scores(alone_logits(*sides), *sides)

    @torch.inference_mode()
    def _window(
        self, texts: list[tuple[str, str]], limits: BatchLimits, done: Callable[[int, int], None]
    ) -> np.ndarray:
        rows: dict[tuple[str, str], list[int]] = {}  # a pair that comes again is computed once, and scores the same
        for row, pair in enumerate(texts):
            rows.setdefault(pair, []).append(row)
        pairs, found = list(rows), np.zeros((len(texts), 2))
        encoder = self.make_batch.encoder
        encoded = encoder.encode_pairs(pairs)
        for batch in token_batches(encoded, len(encoder.prefix), limits, self.make_batch.share_prefix):
            packed = self.make_batch.of_encoded([encoded[number] for number in batch])
            scores = batch_scores(*self.student(**packed.tensors(self.world.device)))
            for number, score in zip(batch, scores, strict=True):
                found[rows[pairs[number]]] = score
            copies = [len(rows[pairs[number]]) for number in batch]
            done(sum(copies), sum(n for n, number in zip(copies, batch, strict=True) if encoded[number].truncated))
        return found


def _characters(pair: tuple[str, str]) -> int:
    return len(pair[0]) + len(pair[1])


def saved_encoder(folder: Path, base_model: str | None = None) -> PairEncoder | TextEncoder:
    """What turns pairs into the tokens of the student whose adapter is in `folder`; no weights are loaded.

    Args:
        base_model: where the base is, if not where it was in training.
    Raises:
        UserError: no adapter there, or a base that is not the one it was trained on.
    """
    return _saved_reading(folder, base_model)[2]


def _saved_reading(folder: Path, base_model: str | None) -> tuple[AdapterCard, Path, PairEncoder | TextEncoder]:
    card = AdapterCard.read(folder)
    base = find_base(card, folder, base_model)
    blank = fills_blank(check_base(base, StudentConfig(model_name_or_path=str(base))))
    tokenizer = load_tokenizer(folder)
    return card, base, student_encoder(tokenizer, card.mode, card.prompt, card.answers, card.max_length, blank)


def _saved_settings(folder: Path, card: AdapterCard, base: Path) -> StudentConfig:
    """Those of the student that was saved in `folder`."""
    reading = dict(
        model_name_or_path=str(base),
        attn_implementation=card.attn_implementation,
        tuning=card.tuning,
        mode=card.mode,
        readout=card.readout,
        bidirectional=card.bidirectional,
    )
    if card.tuning == "full":
        return StudentConfig(**reading)
    lora = read_json(folder / "adapter_config.json")
    if lora is None or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: adapter_config.json or {WEIGHTS} is missing: name a complete adapter folder")
    return StudentConfig(
        **reading,
        lora_r=lora["r"],
        lora_alpha=float(lora["lora_alpha"]),
        lora_target_modules=sorted(lora["target_modules"]),
        encoder_module=card.encoder_module if card.readout == "lora_a" else None,
        load_in_4bit=card.load_in_4bit,
        bnb_4bit_quant_type=card.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=card.bnb_4bit_use_double_quant,
    )


def find_base(card: AdapterCard, folder: Path, base_model: str | None = None) -> Path:
    """The folder of the base that the adapter in `folder` was trained on; with full tuning `folder` itself.

    Args:
        base_model: where it is, if not where it was in training.
    Raises:
        UserError: not found, or another one.
    """
    if card.tuning == "full":
        if base_model is not None:
            raise UserError(f"--base-model {base_model}: {folder} holds all of its model's weights: leave it out")
        return folder
    base = resolve_model(base_model or card.base_model, "student.model_name_or_path")
    if fingerprint(base) != card.base_fingerprint:
        raise UserError(
            f"student.model_name_or_path: {base} is not the base that {folder} was trained on: name that one"
        )
    return base


def adapter_folder(model: str) -> Path:
    """The adapter in a run folder, or the adapter folder itself."""
    for folder in (Path(model) / "adapter", Path(model)):
        if (folder / "flipkd.json").is_file():
            return folder
    raise UserError(f"{model}: neither a run folder nor an adapter folder: name one, or models:/NAME@ALIAS")
