"""What runs left in their folders, read back into one comparison."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import pair_table

from flipkd_dist.comparison import Row
from flipkd_dist.comparison_reading import read_comparison, read_cost
from flipkd_dist.errors import UserError

PAIRS = {"validation": pair_table(5, seed=1), "test": pair_table(7, seed=2)}
ROWS = [
    Row("overlap", "token overlap", {}, kind="overlap"),
    Row("teacher", "teacher", {}, kind="teacher"),
    Row("lora_sup", "LoRA", {"loss.mcl_weight": 0.0}),
    Row("classic", "large to small", {}, kind="classic"),
    Row("flip", "flip", {}),
]


def answer(step: int, split: str, pair: int) -> float:
    return step / 1000 + pair / 100 + (split == "test") / 2


def write_run(folder, steps=(20, 10), encoder=False) -> None:
    """Scores in an order of their own; the best checkpoint is not the last."""
    folder.mkdir(parents=True)
    rows = [(split, step, pair) for split in PAIRS for step in sorted(steps) for pair in range(len(PAIRS[split]))]
    np.random.default_rng(0).shuffle(rows)
    rows = [(str(split), int(step), int(pair)) for split, step, pair in rows]
    columns = {
        "split": [row[0] for row in rows],
        "step": [row[1] for row in rows],
        "pair": [row[2] for row in rows],
        "p_match": pa.array([None if encoder else answer(row[1], row[0], row[2]) for row in rows], pa.float64()),
        "similarity": [-answer(row[1], row[0], row[2]) for row in rows],
    }
    pq.write_table(pa.table(columns), folder / "scores.parquet")
    checkpoints = {"test_checkpoints": {"steps": list(steps)}} if len(steps) > 1 else {}
    (folder / "metrics.json").write_text(json.dumps({"step": steps[0], **checkpoints}))
    for split, pairs in PAIRS.items():
        lines = [json.dumps({"teacher": pair / 10, "token_overlap": 0.5}) for pair in range(len(pairs))]
        (folder / f"predictions-{split}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "rows/a")
    write_run(tmp_path / "rows/b")
    write_run(tmp_path / "rows/c", (30,), encoder=True)
    students = [run(42, "rows/a"), run(43, "rows/b"), run(44, "rows/x", "failed")]
    runs = {"overlap": students, "teacher": students, "lora_sup": students, "classic": [run(42, "rows/c")], "flip": []}
    index = {"name": "bank", "rows": [{**asdict(row), "runs": runs[row.name]} for row in ROWS]}
    (tmp_path / "comparison.json").write_text(json.dumps(index))
    return tmp_path


def run(seed: int, folder: str, status: str = "done") -> dict:
    return {"seed": seed, "folder": folder, "status": status, "reason": ""}


def test_every_score_stands_where_its_pair_and_its_checkpoint_are(folder):
    found = read_comparison(folder, PAIRS)
    assert [scores.row for scores in found.rows] == ROWS
    runs = found.row("lora_sup").runs
    assert [(one.seed, one.steps) for one in runs] == [(42, [20, 10]), (43, [20, 10])]
    for split, pairs in PAIRS.items():
        expected = [[answer(step, split, pair) for pair in range(len(pairs))] for step in (20, 10)]
        np.testing.assert_array_equal(runs[0].scores["p_match"][split], expected)
        np.testing.assert_array_equal(runs[0].scores["similarity"][split], -np.array(expected))
    assert found.row("flip").runs == []


def test_encoders_have_similarities_alone(folder):
    found = read_comparison(folder, PAIRS)
    [classic], [teacher], [overlap] = (found.row(name).runs for name in ("classic", "teacher", "overlap"))
    assert classic.scores.keys() == teacher.scores.keys() == {"similarity"}
    assert classic.steps == [30] and classic.scores["similarity"]["test"].shape == (1, 7)
    np.testing.assert_array_equal(teacher.scores["similarity"]["test"], [np.arange(7) / 10])
    np.testing.assert_array_equal(overlap.scores["similarity"]["validation"], [[0.5] * 5])


def test_other_data_than_the_runs_had_are_refused(folder):
    with pytest.raises(UserError, match=r"data.test: 6 pairs now, .*rows/a scored 7"):
        read_comparison(folder, {**PAIRS, "test": pair_table(6)})


def test_a_folder_without_a_comparison(tmp_path):
    with pytest.raises(UserError, match=r"no comparison\.json: run `flipkd compare` first"):
        read_comparison(tmp_path, PAIRS)


def test_a_matrix_is_that_of_the_first_run(folder):
    matrix = {"pairs": [3, 4], "teacher": [[1.0, None], [0.5, 1.0]], "student": [[1, 0], [0, 1]]}
    (folder / "rows/a/similarity_matrix.json").write_text(json.dumps(matrix))
    found = read_comparison(folder, PAIRS).matrices
    assert found.keys() == {"lora_sup"} and found["lora_sup"].pairs == [3, 4]
    assert np.isnan(found["lora_sup"].teacher[0, 1]) and found["lora_sup"].student.dtype == np.float64


def test_cost_counts_steps_between_lines_whatever_else_is_logged(tmp_path):
    lines = [
        {"step": 1, "step_seconds": 2.0, "tokens_per_second": 10.0, "peak_memory_gib": 1.0},
        {"step": 1, "lora_b_norm": 1.0},
        {"step": 10, "step_seconds": 0.5, "tokens_per_second": 100.0, "peak_memory_gib": 3.0},
        {"step": 10, "validation_roc_auc": 0.9},
        {"step": 12, "step_seconds": 1.0, "tokens_per_second": 50.0, "peak_memory_gib": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = tmp_path / "checkpoints/step-000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"shapes": {"a": [3, 4], "b": [5]}}))
    cost = read_cost(tmp_path)
    assert cost.seconds == pytest.approx(2 + 9 * 0.5 + 2)
    assert cost.tokens == 20 + 450 + 100
    assert cost.peak_memory == 3 * 2**30 and cost.trainable_parameters == 17
    assert read_cost(tmp_path / "nothing") is None
    (tmp_path / "cost.json").write_text(json.dumps(asdict(cost) | {"tokens": 1}))
    assert read_cost(tmp_path).tokens == 1
