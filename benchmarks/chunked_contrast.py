"""A large contrast batch in chunks against small ones at once: seconds a pair, peak memory, and where the time goes.

    python benchmarks/chunked_contrast.py --pairs 2048 --chunk 64 --rounds 3

Both learn from the same pairs with the same random GLM (512 wide, 8 layers, about 30 M weights) and LoRA on q, k, v, o,
in processes of their own that take turns. Prints a line a process, then medians, ratios and their spread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from flipkd_dist.base import load_tokenizer
from flipkd_dist.batches import BatchMaker
from flipkd_dist.chunks import ChunkedBackward
from flipkd_dist.config import LossConfig, StudentConfig
from flipkd_dist.engine import PlainEngine
from flipkd_dist.pairs import PairTable
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.signals import TeacherSignals, TextTeacher
from flipkd_dist.step import TrainingStep
from flipkd_dist.student import load_student
from flipkd_dist.world import World

PASSES = {"read": "first_pass_s", "cache_gradients": "losses_s", "replay": "second_pass_s"}
PROMPT = "Do these two questions have the same answer ? Reply Yes or No . {text_a} | {text_b} ="
VOCABULARY = 4000


class Vectors:
    """The teacher's store in memory."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def rows(self, texts: list[str]) -> np.ndarray:
        return np.arange(len(texts))

    def at(self, rows: np.ndarray) -> np.ndarray:
        return self.values[rows]


def save_base(folder: Path, hidden: int, layers: int) -> int:
    """A random GLM and a tokenizer of one token a word; the number of weights."""
    words = ["[UNK]", "Yes", "No", *PROMPT.split(), *(f"w{number}" for number in range(VOCABULARY))]
    vocabulary = {word: row for row, word in enumerate(dict.fromkeys(words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    model = GlmForCausalLM(
        GlmConfig(
            vocab_size=len(vocabulary),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    model.save_pretrained(folder)
    return model.num_parameters()


def random_pairs(count: int) -> TeacherSignals:
    """Texts of 6 to 16 words, all different; every second pair is said to match, its teacher vectors are close."""
    generator = np.random.default_rng(1)
    texts = [
        " ".join(f"w{word}" for word in generator.integers(VOCABULARY, size=length))
        for length in generator.integers(6, 17, size=2 * count)
    ]
    vectors = generator.normal(size=(2 * count, 384)).astype(np.float32)
    vectors[1::4] = vectors[::4] + 0.5 * vectors[1::4]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows, none = np.arange(count), np.full(count, -1)
    ids, label = [str(row) for row in rows], 1 - rows % 2
    pairs = PairTable(texts, 2 * rows, 2 * rows + 1, label, ids, [""] * count, none, none)
    return TeacherSignals(pairs, TextTeacher(Vectors(vectors)))


def peak_mib(reset: bool = False) -> float:
    """The largest resident size of this process, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def timed(seconds: dict[str, float], name: str):
    """The method `name` of the chunked backward, which adds its time to `seconds`."""
    method, key = getattr(ChunkedBackward, name), PASSES[name]

    def run(*arguments):
        start = time.perf_counter()
        result = method(*arguments)
        seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start
        return result

    return run


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One pass over the pairs: in a single contrast batch of chunks, or in contrast batches of a chunk's size."""
    torch.set_num_threads(options.threads)
    settings = StudentConfig(model_name_or_path=options.worker, lora_dropout=0.05)
    encoder = PairEncoder(load_tokenizer(Path(options.worker)), PROMPT, ["Yes", "No"], 256)
    student = load_student(Path(options.worker), settings, encoder.answer_ids, options.lora_r).train()
    engine = PlainEngine(student, partial(torch.optim.AdamW, lr=0.0, weight_decay=0.1), 1.0)
    chunk = options.chunk if options.chunked else None
    make_batch = BatchMaker(encoder, student, True)
    step = TrainingStep(engine, World(), random_pairs(options.pairs), make_batch, LossConfig(), chunk)
    size = options.pairs if options.chunked else options.chunk
    everything = np.arange(options.pairs)
    step(step.prepare([everything[: 2 * options.chunk if options.chunked else options.chunk]]), 1e-5)
    loaded, seconds = peak_mib(reset=True), {}
    for name in PASSES:
        setattr(ChunkedBackward, name, timed(seconds, name))
    start = time.perf_counter()
    for first in range(0, options.pairs, size):
        _, sums, _ = step(step.prepare([everything[first : first + size]]), 1e-5)
    total = time.perf_counter() - start
    rest = total - sum(seconds.values())  # teacher's counts, packs, optimizer; without chunks everything
    losses = dict(zip(("sup", "dist", "mcl"), sums[:3].tolist(), strict=True))
    return {
        "ms_per_pair": 1000 * total / options.pairs,
        "peak_mib": peak_mib(),
        "loading_peak_mib": loaded,
        **seconds,
        "rest_s": rest,
        **losses,
    }


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def compare(options: argparse.Namespace) -> None:
    found: dict[str, list[dict]] = {"whole": [], "chunked": []}
    with tempfile.TemporaryDirectory() as folder:
        weights = save_base(Path(folder), options.hidden, options.layers)
        print(f"{weights / 1e6:.1f} M weights, {options.pairs} pairs, {options.threads} threads", flush=True)
        for _ in range(options.rounds):
            for kind, runs in found.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--worker", folder]
                command += ["--chunked"] if kind == "chunked" else []
                environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(kind, json.dumps(runs[-1]), flush=True)
    whole, chunked = found["whole"], found["chunked"]
    for kind, runs in found.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(f"{kind}: {medians['ms_per_pair']:.2f} ms a pair, peak {medians['peak_mib']:.0f} MiB")
    print(
        "time ratio:",
        spread([two["ms_per_pair"] / one["ms_per_pair"] for one, two in zip(whole, chunked, strict=True)]),
    )
    print("memory ratio:", spread([two["peak_mib"] / one["peak_mib"] for one, two in zip(whole, chunked, strict=True)]))
    unit = [one["ms_per_pair"] * options.pairs / 1000 for one in whole]
    for key in (*PASSES.values(), "rest_s"):
        print(f"of the time at once, {key}:", spread([two[key] / one for one, two in zip(unit, chunked, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2048, help="of the large contrast batch")
    parser.add_argument("--chunk", type=int, default=64, help="pairs of a forward, and of a small contrast batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lora-r", type=int, default=384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--chunked", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options)))
    else:
        compare(options)


if __name__ == "__main__":
    main()
