"""The verb `cluster`: do the vectors of texts fall into the groups that people gave them?

Shapes: N texts in G groups, d the width of a vector.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score, homogeneity_completeness_v_measure

from flipkd_dist.durable import room_in
from flipkd_dist.errors import UserError
from flipkd_dist.text_encoder import EncoderChoice, encoded_windows, located
from flipkd_dist.text_records import read_grouped
from flipkd_dist.vector_search import vector_file

MANY = 20_000  # texts, above which k-means goes by small batches
BATCH = 4096
STARTS = 3  # of k-means for a seed, the best of which is taken
METRICS = ("v_measure", "homogeneity", "completeness", "adjusted_rand")


def cluster_file(
    choice: EncoderChoice, source: Path, text: str = "text", group: str = "group", num_seeds: int = 5
) -> dict[str, Any]:
    """k-means over the vectors with as many clusters as groups, from several seeds: mean and deviation of each metric.

    Vectors lie on disk; of the texts a window is held, of groups a number each.

    Raises:
        UserError: an unreadable input, fewer than two groups, or no such model.
    """
    with located(choice) as found:
        numbers: dict[str, int] = {}
        entries = found.checked(read_grouped(source, text, group))
        labels = np.array([numbers.setdefault(entry.name, len(numbers)) for entry in entries], np.int32)
        if len(numbers) < 2:
            raise UserError(f"--input {source}: {len(numbers)} groups in column {group}: clusters need two or more")
        if len(numbers) == len(labels):
            raise UserError(f"--input {source}: every text has a group of its own: name another column with --group")
        encoder, folder = found.load(), Path(tempfile.gettempdir())
        with room_in(folder), vector_file(folder, len(labels), encoder.dimension) as vectors:
            start = 0
            entries = read_grouped(source, text, group)
            for window, part in encoded_windows(encoder, entries, len(labels), "embed", f"--input {source}"):
                vectors[start : start + len(window)] = part
                start += len(window)
            runs = [agreement(labels, clusters(vectors, len(numbers), seed)) for seed in range(num_seeds)]
    scores = np.array(runs)
    deviation = scores.std(axis=0, ddof=1) if num_seeds > 1 else np.zeros(len(METRICS))
    return {
        "data": str(source),
        "encoder": {"name": choice.name, **found.facts},
        "texts": len(labels),
        "groups": len(numbers),
        "seeds": num_seeds,
        "mean": dict(zip(METRICS, scores.mean(axis=0).tolist(), strict=True)),
        "standard_deviation": dict(zip(METRICS, deviation.tolist(), strict=True)),
    }


def clusters(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The cluster of each vector, int32 [N]; equal seeds give equal clusters.

    Args:
        vectors: unit vectors [N, d], in memory or on disk. Beyond `MANY` they are read by small batches.
    """
    if len(vectors) <= MANY:
        return KMeans(count, n_init=STARTS, random_state=seed).fit_predict(np.asarray(vectors))
    means = MiniBatchKMeans(
        count, n_init=STARTS, random_state=seed, batch_size=BATCH, init_size=max(3 * BATCH, 3 * count)
    ).fit(vectors)
    return np.concatenate([means.predict(vectors[start : start + BATCH]) for start in range(0, len(vectors), BATCH)])


def agreement(groups: np.ndarray, found: np.ndarray) -> tuple[float, float, float, float]:
    """V-measure, homogeneity, completeness and the adjusted Rand index of two divisions, int [N] each."""
    homogeneity, completeness, v_measure = homogeneity_completeness_v_measure(groups, found)
    return v_measure, homogeneity, completeness, adjusted_rand_score(groups, found)


def table(found: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{found['texts']} texts, {found['groups']} groups, {found['seeds']} seeds"]
    mean, deviation = found["mean"], found["standard_deviation"]
    lines += [f"{name:14} {mean[name]:.4f} +- {deviation[name]:.4f}" for name in METRICS]
    return "\n".join(lines)
