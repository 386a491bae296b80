"""Time and memory of a teacher's store with many vectors: build it, then open it and look texts up in fresh processes.

    python benchmarks/store_lookup.py --num-texts 10000000 --dim 384 --folder /tmp/store

The vectors are synthetic (random directions), the texts are "text 0", "text 1", ... Prints a table and a line of JSON.
A folder that holds the texts already is measured as it is. It needs about (4 dim + 64) bytes a text on the disk.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flipkd_dist.store import Store, StoreSpec

SHARD = 65536  # texts
LOOKED_UP = 256


def vectors_of(numbers: range, dim: int) -> np.ndarray:
    """Unit vectors that only these numbers have, float32 [n, d]."""
    vectors = np.random.default_rng(numbers.start).random((len(numbers), dim), dtype=np.float32) - np.float32(0.5)
    vectors /= np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    return vectors


def shards_of(num_texts: int) -> list[range]:
    return [range(start, min(start + SHARD, num_texts)) for start in range(0, num_texts, SHARD)]


def build(store: Store, num_texts: int) -> dict[str, float]:
    """Seconds of writing all shards and of publishing them, GiB of memory at most."""
    start = time.monotonic()
    for numbers in tqdm(shards_of(num_texts), desc="shards"):
        store.write_shard([f"text {number}" for number in numbers], vectors_of(numbers, store.spec.hidden_size))
    written = time.monotonic()
    store.publish()
    published = time.monotonic()
    peak = int(_status("VmHWM")) / 2**10
    return {"write_s": written - start, "publish_s": published - written, "build_peak_mib": peak}


def _status(field: str) -> int:
    """A memory figure of this process, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def look_up(store: Store, num_texts: int, rounds: int) -> dict[str, float]:
    """Opening, `rounds` look-ups of random texts, growth of private memory, and agreement with the truth."""
    random = np.random.default_rng(1)
    before = _status("RssAnon")
    start = time.perf_counter()
    reader = store.open()
    opened = time.perf_counter() - start
    seconds = []
    for _ in range(rounds):
        texts = [f"text {number}" for number in random.integers(0, num_texts, LOOKED_UP)]
        start = time.perf_counter()
        reader.vectors(texts)
        seconds.append(time.perf_counter() - start)
    grown = _status("RssAnon") - before
    numbers = shards_of(num_texts)[-1]
    truth = vectors_of(numbers, store.spec.hidden_size)
    cosine = np.sum(reader.vectors([f"text {number}" for number in numbers]) * truth, axis=1)
    warm = np.array(seconds[-1000:]) * 1e3
    return {
        "open_ms": opened * 1e3,
        "median_ms": float(np.median(warm)),
        "p99_ms": float(np.percentile(warm, 99)),
        "first_ms": seconds[0] * 1e3,
        "private_mib": grown / 2**10,
        "lowest_cosine": float(cosine.min()),
    }


def warm_up(store: Store) -> None:
    """Read the index once, so that it is in the page cache as far as memory reaches."""
    for path in [*store.folder.glob("*.keys"), *store.folder.glob("*.rows")]:
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def _in_fresh_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-texts", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=10_000, help="look-ups; the last 1,000 are timed")
    parser.add_argument("--remove", action="store_true", help="the folder, afterwards")
    options = parser.parse_args()
    store = Store(options.folder, StoreSpec("benchmark", "mean", 128, options.dim))
    found = {"date": time.strftime("%Y-%m-%d"), "num_texts": options.num_texts, "dim": options.dim}
    found |= {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if not store.is_complete([f"text {options.num_texts - 1}"]):
        found |= _in_fresh_process(build, store, options.num_texts)
    found["shard_bytes"] = sum(size for size, _ in store.shards().values())
    found["index_bytes"] = sum(
        path.stat().st_size for suffix in ("keys", "rows") for path in store.folder.glob(f"*.{suffix}")
    )
    warm_up(store)
    found |= _in_fresh_process(look_up, store, options.num_texts, options.rounds)
    for name, value in found.items():
        print(f"{name:<18} {value:>16,.3f}" if isinstance(value, float) else f"{name:<18} {value!s:>16}")
    print(json.dumps(found))
    if options.remove:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
