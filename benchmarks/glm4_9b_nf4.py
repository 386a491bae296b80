"""One complete training step of a GLM-4-9B shape (9.4 B parameters) with random weights: time of each phase, memory.

    python benchmarks/glm4_9b_nf4.py                                            # NF4 on a CPU, 2 pairs of 32 tokens
    python benchmarks/glm4_9b_nf4.py --device cuda --dtype bfloat16 --batch 32 --sequence 64 --steps 5
    python benchmarks/glm4_9b_nf4.py --device cuda --dtype bfloat16 --batch 4 --sequence 2048 --checkpointing --steps 5
    python benchmarks/glm4_9b_nf4.py --device cuda --dtype bfloat16 --dense --batch 32 --sequence 64 --steps 5

Weights are made layer by layer by a generator in place of files, and everything else is the package's own: loader,
student, plain engine in one process, TrainingStep with all three losses, AdamW. The output matrix is never made. Only
LoRA is trained, so that a token costs 4 N operations, 2 N forward and 2 N for the gradient of the inputs, with N the
parameters of the linear layers inside the decoder layers; attention, LoRA and unpacking do not count. MFU is that over
the time and over --peak-tflops.
"""

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4Config, GlmConfig

from flipkd_dist.base_loader import Whole
from flipkd_dist.config import LossConfig, StudentConfig
from flipkd_dist.engine import PlainEngine
from flipkd_dist.fourbit import Linear4bit
from flipkd_dist.packing import PackedBatch, pack
from flipkd_dist.pairs import PairTable
from flipkd_dist.prompt import EncodedPair
from flipkd_dist.signals import TeacherSignals, TextTeacher
from flipkd_dist.step import TrainingStep, summarise
from flipkd_dist.student import Student, load_student
from flipkd_dist.world import World

SHAPE = dict(
    hidden_size=4096, intermediate_size=13696, num_attention_heads=32, num_key_value_heads=2, head_dim=128,
    vocab_size=151552, pad_token_id=151329, attention_bias=True, max_position_embeddings=8192,
)  # fmt: skip
CONFIGS = {"glm": GlmConfig, "glm4": Glm4Config}
GIB = 2**30


class RandomWeights:
    """In place of a model's files: tensors of the right shapes, made when they are read."""

    def __init__(self, config, dtype: torch.dtype):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.shapes = {name: value.shape for name, value in model.named_parameters()}
        self.num_parameters = sum(shape.numel() for shape in self.shapes.values())
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> Tensor:
        return self._random(self.shapes[name])

    def rows(self, name: str, rows: list[int]) -> Tensor:
        return self._random((len(rows), *self.shapes[name][1:]))

    def _random(self, shape) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype)
        return torch.empty(shape, dtype=self.dtype).normal_(std=0.02, generator=self.generator)


class TimedEngine(PlainEngine):
    """The plain engine with the seconds of each phase."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seconds = dict.fromkeys(("forward", "backward", "update"), 0.0)

    def _timed(self, phase: str, function, *arguments, **named):
        start = now()
        result = function(*arguments, **named)
        self.seconds[phase] += now() - start
        return result

    def forward(self, **batch):
        return self._timed("forward", super().forward, **batch)

    def backward(self, loss, last):
        self._timed("backward", super().backward, loss, last)

    def step(self, learning_rate):
        return self._timed("update", super().step, learning_rate)


class Vectors:
    """The teacher's vectors in memory, in place of a store's reader."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def rows(self, texts: list[str]) -> np.ndarray:
        return np.arange(len(texts))

    def at(self, rows: np.ndarray) -> np.ndarray:
        return self.array[rows]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def random_pairs(count: int) -> PairTable:
    numbers, none = np.arange(count), np.full(count, -1)
    texts = [f"text {number}" for number in range(2 * count)]
    label = np.array([1, 0] * count)[:count]
    return PairTable(texts, numbers, numbers + count, label, [str(n) for n in numbers], [""] * count, none, none)


def batch_of(texts: list[tuple[str, str]], sequence: int, vocabulary: int) -> PackedBatch:
    """A row of `sequence` random tokens for each pair, a quarter of them the shared prompt."""
    generator = np.random.default_rng(0)
    prefix = sequence // 4
    own, half = sequence - prefix, (sequence - prefix) // 2

    def ids(size: int) -> list[int]:
        return generator.integers(vocabulary, size=size).tolist()

    pairs = [EncodedPair(ids(own), slice(0, half), slice(half, own - 1)) for _ in texts]
    return pack(ids(prefix), pairs, share=False)


def peak_bytes(device: str) -> dict[str, float]:
    found = {"peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    if device == "cuda":
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def load(options, dtype: torch.dtype) -> tuple[Student, int]:
    """The student, and the parameters of the model whose shape it has, output matrix included."""
    config = CONFIGS[options.model](num_hidden_layers=options.layers, **SHAPE)
    config.architectures = ["GlmForCausalLM" if options.model == "glm" else "Glm4ForCausalLM"]
    settings = StudentConfig(
        model_name_or_path="random", load_in_4bit=not options.dense, lora_r=options.lora_r, lora_dropout=0.0
    )
    placement = Whole(options.device)
    placement.by_parts = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        weights = RandomWeights(config, dtype)
        student = load_student(
            Path(folder), settings, [5, 6], options.lora_r, dtype=dtype, placement=placement, weights=weights,
            gradient_checkpointing=options.checkpointing,
        )  # fmt: skip
    return student.to(options.device), weights.num_parameters


def linear_parameters(student: Student) -> int:
    """N: the base's matrices inside the decoder layers."""
    layers = [module for name, module in student.named_modules() if "layers." in name and "lora_" not in name]
    linear = [module for module in layers if isinstance(module, Linear4bit) or type(module) is torch.nn.Linear]
    return sum(module.in_features * module.out_features for module in linear)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="glm4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--dense", action="store_true", help="no four bits")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--lora-r", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="pairs")
    parser.add_argument("--sequence", type=int, default=32, help="tokens of a pair")
    parser.add_argument("--steps", type=int, default=1, help="the fastest counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    start = now()
    student, num_parameters = load(options, getattr(torch, options.dtype))
    result = {"options": vars(options), "parameters": num_parameters, "load_s": now() - start}
    result["lora_parameters"] = sum(value.numel() for value in student.trained_parameters().values())
    result["after_loading"] = peak_bytes(options.device)
    print(json.dumps(result), flush=True)

    engine = TimedEngine(student, partial(torch.optim.AdamW, lr=0.0, weight_decay=0.1), 1.0)
    student.train()
    pairs = random_pairs(options.batch)
    vectors = np.random.default_rng(1).normal(size=(len(pairs.texts), 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    loss = LossConfig(threshold=None)
    make_batch = partial(batch_of, sequence=options.sequence, vocabulary=SHAPE["vocab_size"])
    step = TrainingStep(
        engine,
        World(device=torch.device(options.device)),
        TeacherSignals(pairs, TextTeacher(Vectors(vectors))),
        make_batch,
        loss,
    )
    steps = []
    for _ in range(options.steps):
        engine.seconds = dict.fromkeys(engine.seconds, 0.0)
        start = now()
        counts, sums, norm = step(step.prepare([np.arange(options.batch)]), 1e-4)
        steps.append({"step_s": now() - start, **{f"{phase}_s": value for phase, value in engine.seconds.items()}})
        losses = summarise(counts, sums.cpu(), loss)
        steps[-1] |= {"loss": losses["loss"], "grad_norm": norm}
        print(json.dumps(steps[-1]), flush=True)
    moved = [bool(value.any()) for name, value in student.trained_parameters().items() if ".lora_B." in name]
    fastest = min(entry["step_s"] for entry in steps)
    tokens = options.batch * options.sequence
    operations = 4 * linear_parameters(student) * tokens
    result = {
        "linear_parameters": linear_parameters(student),
        "lora_b_moved": f"{sum(moved)} of {len(moved)}",
        "tokens_per_s": tokens / fastest,
        "pairs_per_s": options.batch / fastest,
        "tflops_4n": operations / fastest / 1e12,
        **peak_bytes(options.device),
    }
    if options.peak_tflops:
        result["mfu"] = result["tflops_4n"] / options.peak_tflops
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
