"""One process plays one rank of a large world: its own rows of the contrast matrix against the columns of all ranks.

    python benchmarks/played_rank.py --worlds 1 8 64 512 1024 --pairs 32 --dim 384 --folder /tmp/played

The rank looks up the real vectors of all columns and multiplies them (`teacher`), asks the table for known matches,
makes its rows (`all rows`: with both of these), takes the losses and goes backward to the gathered read-outs; those of
the other ranks are random, and nothing is sent. Every world runs in a process of its own. Prints a table (milliseconds
of one core, the least of several rounds; MiB by which the process grew at most) and a line of JSON.
"""

import argparse
import json
import multiprocessing
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from flipkd_dist.config import LossConfig
from flipkd_dist.contrast import ContrastRows, contrast_rows
from flipkd_dist.contrast_terms import contrast_terms
from flipkd_dist.pairs import PairTable
from flipkd_dist.signals import TeacherSignals, TextTeacher
from flipkd_dist.store import Store, StoreSpec

SHARD = 65536  # texts
HOST = ("teacher", "known matches", "all rows")
DEVICE = ("losses forward", "losses backward")


def played_table(num_pairs: int, positives_per_text: int = 1) -> PairTable:
    """Pair k of text k with a text of its own; every text has so many positives in the table, if the batch has them."""
    text_a = np.arange(num_pairs)
    text_b = num_pairs + text_a // positives_per_text
    none = np.full(num_pairs, -1)
    texts = [f"text {number}" for number in range(2 * num_pairs)]
    return PairTable(texts, text_a, text_b, text_a % 2, list(map(str, text_a)), [""] * num_pairs, none, none)


def played_signals(folder: Path, table: PairTable, dim: int) -> TeacherSignals:
    """The teacher's word out of a store of random unit vectors, written at the first call."""
    store = Store(folder, StoreSpec("played", "mean", 128, dim))
    if not store.is_complete(table.texts):
        for start in range(0, len(table.texts), SHARD):
            texts = table.texts[start : start + SHARD]
            vectors = np.random.default_rng(start).standard_normal((len(texts), dim), dtype=np.float32)
            store.write_shard(texts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        store.publish()
    return TeacherSignals(table, TextTeacher(store.open()))


def losses(rows: ContrastRows, readout_a: torch.Tensor, gathered_b: torch.Tensor) -> torch.Tensor:
    """L_dist and L_MCL of the own rows, as a step takes them, with its statistics; weights and counts aside."""
    terms = contrast_terms(readout_a, readout_a, None, gathered_b, [rows], LossConfig())
    return terms.distance + terms.contrastive


def play(signals: TeacherSignals, pairs: int, world: int, width: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a core by part, and the MiB by which this process grew at most."""
    torch.set_num_threads(1)
    size, rank, random = pairs * world, world // 2, np.random.default_rng(world)
    own = slice(rank * pairs, (rank + 1) * pairs)
    readout_a, readout_b = (torch.randn(pairs, width, requires_grad=True) for _ in range(2))
    before, after = torch.randn(rank * pairs, width), torch.randn(size - own.stop, width)
    found: dict[str, list[float]] = {name: [] for name in (*HOST, *DEVICE)}
    for number in range(rounds):
        if number == 1:  # the first round loads and allocates what stays
            resident = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        batch = random.permutation(len(signals.pairs))[:size]
        clock = [time.process_time()]
        lap = partial(_lap, clock, found)
        signals.of_batch(batch, own)
        lap("teacher")
        signals.pairs.known_match(batch[own], batch)
        lap("known matches")
        rows = contrast_rows(signals, batch, own, 0.5)
        lap("all rows")
        loss = losses(rows, readout_a, torch.cat([before, readout_b, after]))
        lap("losses forward")
        loss.backward()
        lap("losses backward")
        del rows, loss
    took = {name: min(seconds[1:]) * 1e3 for name, seconds in found.items()}
    return {"world": world, **took, "grown_mib": (_status("VmHWM") - resident) / 2**10}


def _lap(clock: list[float], found: dict[str, list[float]], name: str) -> None:
    clock.append(time.process_time())
    found[name].append(clock[-1] - clock[-2])


def _status(field: str) -> int:
    """A memory figure of this process, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 8, 64, 512, 1024])
    parser.add_argument("--pairs", type=int, default=32, help="of one rank")
    parser.add_argument("--dim", type=int, default=384, help="of the teacher's vectors and of the read-outs")
    parser.add_argument("--table", type=int, default=65536, help="pairs to train on, at least the largest batch")
    parser.add_argument("--positives", type=int, default=1, help="of a second text in the table")
    parser.add_argument("--folder", type=Path, required=True, help="for the store")
    parser.add_argument("--rounds", type=int, default=6, help="the first is not counted")
    options = parser.parse_args()
    table = played_table(max(options.table, options.pairs * max(options.worlds)), options.positives)
    signals = played_signals(options.folder, table, options.dim)
    signals.pairs.known_match(np.arange(1), np.arange(1))  # what the table sorts once
    found = []
    for world in options.worlds:
        _here[:] = [signals]
        with multiprocessing.get_context("fork").Pool(1) as pool:
            play_here = partial(_play_here, options.pairs, world, options.dim, options.rounds)
            found.append(pool.apply(play_here))
    print("  ".join(f"{name:>15}" for name in found[0]))
    for line in found:
        print("  ".join(f"{value:>15.2f}" if isinstance(value, float) else f"{value:>15}" for value in line.values()))
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "pairs": options.pairs, "dim": options.dim, "found": found}))


_here: list[TeacherSignals] = []  # what forks inherit


def _play_here(*arguments) -> dict[str, float]:
    return play(_here[0], *arguments)


if __name__ == "__main__":
    main()
