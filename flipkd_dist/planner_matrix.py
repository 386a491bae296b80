"""A rank's rows of the contrast matrix: time and bytes by arithmetic alone; the formulas stand in docs/plan.md.

Shapes: m pairs of one rank (its rows), n pairs of all ranks (the columns), r the width of a read-out.
"""

from dataclasses import dataclass
from math import ceil

from flipkd_dist.chunks import BLOCK_ENTRIES, BLOCK_ROWS
from flipkd_dist.planner import FP32
from flipkd_dist.planner_devices import Device

# The host's part, measured on one core of an AVX2 processor with `benchmarks/played_rank.py`.
ROW_S, ROW_VALUE_S = 0.25e-6, 1.25e-9  # to look up a vector: for itself, and for each of its numbers
HOST_FLOPS = 5e10
ENTRY_S = 4e-9  # of the matrix: which entries are known to match, kept, negative
# Counted, operation by operation, in losses.py and contrast_terms.py (tests/parity/test_scaling_parity.py).
ENTRY_TOUCHED, VALUE_TOUCHED = 504, 126  # bytes read and written for an entry [m, n], for a value [n, r]
GATHER_TOUCHED = 28  # of a value: padded blocks, joined and cut; their gradient
ROWS_KEPT = 7  # bytes of an entry that the rows hold: the teacher's similarity and three masks
ENTRY_PEAK, VALUE_KEPT, VALUE_PEAK = 44, 4, 20  # bytes at most: by entries in the losses, by values in their backward


@dataclass(frozen=True)
class Matrix:
    """A rank's rows of the contrast matrix in a micro-step."""

    pairs: int
    ranks: int
    width: int
    teacher_width: int
    directions: int = 1  # 2 with loss.mcl_symmetric
    in_blocks: bool = False  # of rows, where the share runs in chunks

    @property
    def columns(self) -> int:
        return self.pairs * self.ranks

    @property
    def entries(self) -> int:
        return self.pairs * self.columns

    @property
    def values(self) -> int:
        return self.columns * self.width

    @property
    def block_rows(self) -> int:
        return min(self.pairs, max(BLOCK_ROWS, BLOCK_ENTRIES // self.columns)) if self.in_blocks else self.pairs

    @property
    def blocks(self) -> int:
        return ceil(self.pairs / self.block_rows)

    def host_seconds(self) -> float:
        """Vectors of all texts, their products, the masks; on one core. Every block looks all columns up anew."""
        looked_up = (self.pairs + self.blocks * self.columns) * (ROW_S + ROW_VALUE_S * self.teacher_width)
        product = 2 * self.entries * self.teacher_width / HOST_FLOPS
        return self.directions * (looked_up + product + ENTRY_S * self.entries)

    def counted_seconds(self) -> float:
        """Of the host, while the step before computes: in blocks one direction is made to be counted alone, and every
        direction again by the step itself."""
        return self.host_seconds() / (self.directions if self.in_blocks else 1)

    def waited_seconds(self) -> float:
        """Of the host, while the device waits for it."""
        return self.host_seconds() if self.in_blocks else 0.0

    def flops(self) -> int:
        """Of the cosines: forward, and backward to both sides."""
        return self.directions * 6 * self.entries * self.width

    def device_seconds(self, device: Device) -> float:
        products = self.flops() / (device.fp32_tflops * 1e12 * device.mfu)
        gathered = self.directions * GATHER_TOUCHED * self.values if self.ranks > 1 else 0
        return products + (self.touched() + gathered) / (device.memory_gb_s * 1e9)

    def touched(self) -> int:
        """Bytes that the losses read and write, forward and backward, on both sides of the cosines."""
        values = self.blocks * self.values + self.pairs * self.width
        return self.directions * (ENTRY_TOUCHED * self.entries + VALUE_TOUCHED * values)

    def memory(self) -> int:
        """Bytes on the device at most, the gathered read-outs included; in blocks their summed gradients too."""
        entries, kept = self.block_rows * self.columns, FP32 * self.values * (2 if self.in_blocks else 1)
        return self.directions * (ROWS_KEPT * entries + kept + self.losses_memory())

    def losses_memory(self) -> int:
        """Of them what the losses make themselves: the most is alive in L_MCL or behind the cosines."""
        own, entries = VALUE_KEPT * self.pairs * self.width, self.block_rows * self.columns
        return own + max(ENTRY_PEAK * entries + VALUE_KEPT * self.values, VALUE_PEAK * self.values)
