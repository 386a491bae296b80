"""What the runs of a comparison left in their folders, read back into one `Comparison`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flipkd_dist.comparison import READINGS, Comparison, Cost, Matrix, Row, RowScores, RunScores
from flipkd_dist.config import load_config
from flipkd_dist.errors import UserError
from flipkd_dist.pairs import PairTable, read_pairs
from flipkd_dist.planner_devices import GIB
from flipkd_dist.run_folder import read_json

INDEX = "comparison.json"
MATRIX = "similarity_matrix.json"
SPLITS = ("validation", "test")
COLUMNS = {"teacher": "teacher", "overlap": "token_overlap"}  # of the predictions, by kind of row


def read_comparison(folder: Path, pairs: dict[str, PairTable] | None = None) -> Comparison:
    """The comparison that `folder`/comparison.json names, as far as its runs are finished.

    Args:
        folder: `OUTPUT_DIR/NAME-compare`.
        pairs: of validation and test; None to read them again.
    Raises:
        UserError: there is no comparison, or the data are not those of the runs.
    """
    index = read_json(folder / INDEX)
    if index is None:
        raise UserError(f"{folder}: no {INDEX}: run `flipkd compare` first")
    if pairs is None:
        data = load_config(folder / "config.yaml").data
        given = {split: getattr(data, split) for split in SPLITS if getattr(data, split) is not None}
        pairs = {split: read_pairs(paths, data, f"data.{split}") for split, paths in given.items()}
    rows, matrices = [], {}
    for entry in index["rows"]:
        row = Row(**{key: entry[key] for key in ("name", "title", "overrides", "formula", "source", "kind")})
        runs = [(run["seed"], folder / run["folder"]) for run in entry["runs"] if run["status"] == "done"]
        if row.kind in COLUMNS:
            scores = [_encoder_scores(COLUMNS[row.kind], runs[0], pairs)] if runs else []
        else:
            scores = [_run_scores(seed, path, pairs) for seed, path in runs]
        rows.append(RowScores(row, scores))
        if row.kind not in COLUMNS and runs and (matrix := read_matrix(runs[0][1])):
            matrices[row.name] = matrix
    return Comparison(index["name"], pairs, rows, matrices)


def _encoder_scores(column: str, run: tuple[int, Path], pairs: dict[str, PairTable]) -> RunScores:
    """Scores that stand in the predictions of a student's run beside its own."""
    seed, path = run
    found = {split: _predictions(path, split, column, table)[None] for split, table in pairs.items()}
    return RunScores(seed, [0], {"similarity": found})


def _predictions(path: Path, split: str, column: str, pairs: PairTable) -> np.ndarray:
    lines = (path / f"predictions-{split}.jsonl").read_text(encoding="utf-8").splitlines()
    found = np.array([json.loads(line)[column] for line in lines], np.float64)
    _check_length(path, split, found, pairs)
    return found


def _check_length(path: Path, split: str, found: np.ndarray, pairs: PairTable) -> None:
    if len(found) != len(pairs):
        raise UserError(f"data.{split}: {len(pairs)} pairs now, {path} scored {len(found)}: run `flipkd compare` again")


def _run_scores(seed: int, path: Path, pairs: dict[str, PairTable]) -> RunScores:
    """Of `scores.parquet`; a run without a column of p(match), as an encoder's, has no such reading."""
    table = pq.read_table(path / "scores.parquet").sort_by([("split", "ascending"), ("pair", "ascending")])
    columns = {key: table[key].to_numpy() for key in ("split", "step", "pair", "similarity")}
    columns["p_match"] = table["p_match"].cast("float64").to_numpy()
    known = ((read_json(path / "metrics.json") or {}).get("test_checkpoints") or {}).get("steps")
    steps = known or sorted(set(columns["step"].tolist()))
    scores: dict[str, dict[str, np.ndarray]] = {}
    for reading in READINGS:
        if np.isnan(columns[reading]).all():
            continue
        scores[reading] = {}
        for split, its_pairs in pairs.items():
            its_rows = [(columns["split"] == split) & (columns["step"] == step) for step in steps]
            for rows in its_rows:
                _check_length(path, split, columns[reading][rows], its_pairs)
            scores[reading][split] = np.stack([columns[reading][rows] for rows in its_rows])
    return RunScores(seed, list(steps), scores, read_cost(path))


def read_cost(path: Path) -> Cost | None:
    """What a run's training took by its metrics.jsonl, an encoder's by its cost.json; None where nothing was trained.

    A line holds means since the line before; of a resumed training the steps that were done twice count once.
    """
    if told := read_json(path / "cost.json"):
        return Cost(**told)
    file = path / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    seconds = tokens = peak = 0.0
    before = 0
    for line in lines:
        if "step_seconds" in line:
            took = line["step_seconds"] * (line["step"] - before)
            seconds, tokens = seconds + took, tokens + took * line["tokens_per_second"]
            peak, before = max(peak, line["peak_memory_gib"]), line["step"]
    manifests = (read_json(found) or {} for found in sorted(path.glob("checkpoints/step-*/manifest.json")))
    shapes: dict[str, Any] = next((found["shapes"] for found in manifests if "shapes" in found), {})
    if not seconds:
        return None
    return Cost(seconds, round(tokens), round(peak * GIB), sum(math.prod(shape) for shape in shapes.values()))


def read_matrix(path: Path) -> Matrix | None:
    """A run's matrix, NaN where a teacher of pairs knows nothing; None where the run has none."""
    found = read_json(path / MATRIX)
    if found is None:
        return None
    return Matrix(found["pairs"], np.array(found["teacher"], np.float64), np.array(found["student"], np.float64))
