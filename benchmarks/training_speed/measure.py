"""What all contenders share: what they are told, the clock of their steps, the line that they print.

Standard library and torch alone at import: contenders run in environments of their own.
"""

import importlib.metadata
import json
import re
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULT = "RESULT "  # what the line begins with that the harness reads
MIB = 1024**2
PACKAGES = ("torch", "transformers", "peft", "accelerate", "sentence-transformers", "FlagEmbedding", "deepspeed")


@dataclass(frozen=True)
class Spec:
    """What a contender is told; the same for all but `options`."""

    prepared: str  # the folder that `prepare.py` made: model, pairs, groups, prompt, teacher
    scratch: str  # an empty folder
    batch_size: int  # sequences (prompt, text a, text b) of an optimizer step
    warmup: int  # steps before the clock counts
    steps: int  # that it counts
    group_size: int  # sequences of a positive and its negatives, for trainers of groups
    max_length: int  # tokens
    lora_r: int
    lora_dropout: float
    learning_rate: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)  # the variant's own

    @classmethod
    def of_command_line(cls) -> "Spec":
        return cls(**json.loads(sys.argv[1]))

    @property
    def num_steps(self) -> int:
        return self.warmup + self.steps

    @property
    def model(self) -> str:
        return str(Path(self.prepared) / "model")

    @property
    def targets(self) -> list[str]:
        """Modules with LoRA."""
        return ["q_proj", "k_proj", "v_proj", "o_proj"]

    def prompt(self) -> dict[str, str]:
        """What stands `before` text a, `between` the two and `after` text b."""
        return json.loads((Path(self.prepared) / "prompt.json").read_text(encoding="utf-8"))

    def pairs(self) -> list[dict[str, Any]]:
        """In the order of the batches; as many as all steps take."""
        lines = (Path(self.prepared) / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[: self.num_steps * self.batch_size]]

    def trainer_arguments(self) -> dict[str, Any]:
        """What every trainer that descends from transformers' is given: the same recipe, the same batches."""
        return {
            "output_dir": str(Path(self.scratch) / "output"),
            "per_device_train_batch_size": self.batch_size,
            "max_steps": self.num_steps,
            "learning_rate": self.learning_rate,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
            "train_sampling_strategy": self.options.get("sampling", "sequential"),
            "seed": self.seed,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 10_000,
            "disable_tqdm": True,
        }


def resident(kind: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM, the most since the last reset."""
    found = re.search(rf"{kind}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 / MIB


def reset_peak() -> bool:
    """Let VmHWM begin at what is resident now; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class StepClock:
    """Seconds from the end of one optimizer step to the end of the next, data loading included; tokens; memory."""

    def __init__(self, spec: Spec):
        """Made after the imports and before the model is loaded."""
        self.spec = spec
        self.libraries_mib = resident("VmRSS")
        self.ends: list[float] = []
        self.processor: list[float] = []  # seconds of all threads so far, at the same moments
        self.computed, self.real = [0], [0]  # tokens by step; the last entry is the running step's
        self.peak_mib, self.since_reset = 0.0, False
        self.notes: dict[str, Any] = {}

    def count_computed(self, embedding) -> None:
        """Count what goes through the token embedding, padding included."""

        def add(_module, inputs) -> None:
            self.computed[-1] += inputs[0].numel()

        embedding.register_forward_pre_hook(add)

    def count_real(self, body) -> None:
        """Count what the attention mask [R, L] given to the body of a causal LM calls tokens."""

        def add(_module, _inputs, named) -> None:
            self.real[-1] += int(named["attention_mask"].sum())

        body.register_forward_pre_hook(add, with_kwargs=True)

    def end_step(self) -> None:
        self.ends.append(time.perf_counter())
        self.processor.append(time.process_time())
        self.computed.append(0)
        self.real.append(0)
        if len(self.ends) == self.spec.warmup:
            self.since_reset = reset_peak()
        if len(self.ends) == self.spec.num_steps:
            self.peak_mib = resident("VmHWM")

    def callback(self):
        """For trainers that descend from transformers'."""
        from transformers import TrainerCallback

        clock = self

        class EndOfStep(TrainerCallback):
            def on_step_end(self, args, state, control, **others):
                clock.end_step()

        return EndOfStep()

    def print_result(self, **more: Any) -> None:
        spec = self.spec
        assert len(self.ends) == spec.num_steps, f"{len(self.ends)} steps in place of {spec.num_steps}"
        counted = slice(spec.warmup, spec.num_steps)
        result = {
            "seconds": differences(self.ends[spec.warmup - 1 :]),
            "processor_seconds": differences(self.processor[spec.warmup - 1 :]),
            "sequences": spec.batch_size,
            "computed_tokens": self.computed[counted],
            "real_tokens": self.real[counted],
            "peak_mib": self.peak_mib,
            "peak_is_of_steps": self.since_reset,
            "libraries_mib": self.libraries_mib,
            "versions": versions(),
            **self.notes,
            **more,
        }
        print(RESULT + json.dumps(result), flush=True)


def differences(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def trainable(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
