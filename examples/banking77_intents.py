"""Divide Banking77 by intent: what a model is tested on, no label of its training ever spoke of.

    python examples/banking77_intents.py FOLDER OUTPUT [--seed 42]

FOLDER holds train.csv and test.csv of Banking77. OUTPUT gets train.csv (55 intents, texts of train.csv), validation.csv
(10 others, texts of test.csv), test.csv (the last 12, texts of test.csv) and beir/, in which every text of that
test.csv but one of each intent looks for that one. No text stands twice, whatever its capitals and punctuation.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from flipkd_dist.grouped_texts import normalise

TRAINING_INTENTS, VALIDATION_INTENTS = 55, 10  # of 77
COLUMNS = ("text", "category")


def read(path: Path) -> list[tuple[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def write_beir(folder: Path, rows: list[tuple[str, str]], rng: np.random.Generator) -> None:
    """One text of each intent, drawn, is its document; all others are queries."""
    intents = sorted({intent for _, intent in rows})
    document = {
        intent: int(rng.choice([number for number, (_, other) in enumerate(rows) if other == intent]))
        for intent in intents
    }
    queries = [number for number, (_, intent) in enumerate(rows) if number != document[intent]]
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for intent in intents:
            file.write(json.dumps({"_id": intent, "text": rows[document[intent]][0]}) + "\n")
    with open(folder / "queries.jsonl", "w", encoding="utf-8") as file:
        for number in queries:
            file.write(json.dumps({"_id": f"q{number}", "text": rows[number][0]}) + "\n")
    with open(folder / "qrels" / "test.tsv", "w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"q{number}\t{rows[number][1]}\t1\n" for number in queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    train, test = (read(options.folder / name) for name in ("train.csv", "test.csv"))
    rng = np.random.default_rng(options.seed)
    intents = rng.permutation(sorted({intent for _, intent in train})).tolist()
    seen_later = TRAINING_INTENTS + VALIDATION_INTENTS
    options.output.mkdir(parents=True, exist_ok=True)
    seen = set()
    for name, rows, chosen in (
        ("train", train, intents[:TRAINING_INTENTS]),
        ("validation", test, intents[TRAINING_INTENTS:seen_later]),
        ("test", test, intents[seen_later:]),
    ):
        kept = []
        for text, intent in rows:
            if intent in chosen and normalise(text) not in seen:
                seen.add(normalise(text))
                kept.append((text, intent))
        if name == "validation":
            kept = kept[::2]  # enough for thresholds, and half the time
        if name == "test":
            write_beir(options.output / "beir", kept, rng)
        write_csv(options.output / f"{name}.csv", kept)
        print(f"{name}: {len(chosen)} intents, {len(kept)} texts")


if __name__ == "__main__":
    main()
