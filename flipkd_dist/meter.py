"""What a run measures of itself: throughput, arithmetic rate, seconds by phase, peak memory.

Rates are of the time that steps took since the last line, in this process: validations, checkpoints and what was done
before a resume are left out.
"""

import logging
import re
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from flipkd_dist.phases import ASIDE, PHASES, PhaseClock
from flipkd_dist.planner_devices import GIB, device_of_driver
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")
IN_LAYER = re.compile(r"\.\d+\.")
# A weight and token: 2 forward, 2 for the gradient of the input, and 2 for its own where it is trained (docs/plan.md).
OPERATIONS = {"lora": 4, "full": 6}
OWN = ("steps", "pairs", "tokens", *PHASES)  # what a rank adds to the sums over ranks


class Meter:
    def __init__(self, world: World, clock: PhaseClock, linear_weights: int, dtype: torch.dtype, operations: int = 4):
        """
        Args:
            linear_weights: the base's weights of linear layers in decoder layers, on all ranks together.
            dtype: of the run's products, by which a device's peak is looked up.
            operations: that are counted for each of these weights and each token.
        """
        self.operations = operations
        self.world, self.clock, self.linear_weights = world, clock, linear_weights
        self.peak_tflops = peak_tflops(world.device, dtype)
        self.steps = self.pairs = self.tokens = 0.0

    def start(self) -> None:
        """The next step is the first that counts."""
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.world.device)
        self.clock.start()
        self.steps = self.pairs = self.tokens = 0.0

    def add(self, pairs: float, tokens: float) -> None:
        """An optimizer step of `pairs` on all ranks and `tokens`, without padding, on this one."""
        self.steps, self.pairs, self.tokens = self.steps + 1, self.pairs + pairs, self.tokens + tokens

    def take(self) -> Tensor:
        """What this rank adds since the last call, float64 [len(OWN) + ranks]; its sum over ranks is for `values`."""
        seconds = self.clock.take()
        seconds.pop(ASIDE)
        peaks = torch.zeros(self.world.size, dtype=torch.float64)
        peaks[self.world.rank] = peak_memory_gib(self.world.device)
        own = [self.steps, self.pairs, self.tokens, *(seconds[phase] for phase in PHASES)]
        self.steps = self.pairs = self.tokens = 0.0
        return torch.cat([torch.tensor(own, dtype=torch.float64), peaks])

    def values(self, total: Tensor) -> dict[str, float]:
        """Logged values; seconds are means over ranks and steps, `tflops_4n` (full: `tflops_6n`) is of one device."""
        found = dict(zip(OWN, (total[: len(OWN)] / self.world.size).tolist(), strict=True))
        elapsed = sum(found[phase] for phase in PHASES)
        tflops = self.operations * self.linear_weights * found["tokens"] / elapsed / 1e12
        mfu = {} if self.peak_tflops is None else {f"mfu_{self.operations}n": tflops / self.peak_tflops}
        return {
            "pairs_per_second": found["pairs"] / elapsed,
            "tokens_per_second": found["tokens"] * self.world.size / elapsed,
            f"tflops_{self.operations}n": tflops,
            **mfu,
            "step_seconds": elapsed / found["steps"],
            **{f"seconds_{phase}": found[phase] / found["steps"] for phase in PHASES},
            "peak_memory_gib": total[len(OWN) :].max().item(),
        }


def linear_weights(model: nn.Module) -> int:
    """The base's weights of linear layers in decoder layers, frozen or trained, sharded or not, in four bits or not."""
    layers = ((name, module) for name, module in model.named_modules() if IN_LAYER.search(f"{name}."))
    return sum(_weights(module) for name, module in layers if ".lora_" not in name)


def _weights(module: nn.Module) -> int:
    weight = module._parameters.get("weight")  # its own: LoRA's layers lend those of the layer that they wrap
    if weight is None or isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, nn.Linear):  # packed bytes are fewer
        return module.in_features * module.out_features
    shape = getattr(weight, "ds_shape", weight.shape)
    return shape.numel() if len(shape) == 2 else 0


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """By the maker's data sheet; None on CPUs and unknown devices."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if (known := device_of_driver(name)) is None:
        logger.info(
            "no share of the peak (mfu_4n, mfu_6n): the peak of %r is not among those of planner_devices.py", name
        )
        return None
    return known.tflops(dtype.itemsize)


def peak_memory_gib(device: torch.device) -> float:
    """CUDA: the most that tensors held since `Meter.start`. CPU: the process's largest resident size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")  # getrusage would tell of the process that started this one, if that was larger
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found.group(1)) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
