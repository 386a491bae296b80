"""`evaluate(config)`: metrics of the run's adapter and its scores of every pair, on the workers that train it.

The paper's protocol takes several checkpoints, the best on validation, and averages their test results: the adapter is
the best of them, the others follow.
"""

import json
import logging
import os
from collections.abc import Iterator

import numpy as np

from flipkd_dist.adapter import AdapterCard, check_probe
from flipkd_dist.checkpoint import best_checkpoints
from flipkd_dist.config import RunConfig
from flipkd_dist.evaluate import metrics_by_kind, pair_texts, thresholds_from, token_overlap
from flipkd_dist.preflight import Inputs
from flipkd_dist.run_folder import write_json, write_whole
from flipkd_dist.similarity_matrix import similarity_matrix, write_matrix
from flipkd_dist.teacher_stage import open_signals
from flipkd_dist.workbench import Workbench, build

logger = logging.getLogger("flipkd_dist")
SPLITS = ("validation", "test")
READOUTS = {"student": "p_match", "student_readout": "similarity"}  # row of the metrics -> column of scores.parquet
Scores = dict[str, dict[str, np.ndarray]]  # split -> row of the metrics -> [N]


def evaluate(config: RunConfig, untrained: bool = False) -> None:
    """Rebuild the student and write metrics.json, scores.parquet, similarity_matrix.json and each split's predictions.

    Args:
        untrained: the base as it is, with LoRA's B at zero; else what the run has trained.
    """
    folder = config.run_dir
    card = None if untrained else AdapterCard.read(folder / "adapter")
    bench = build(config, None if card is None else folder / "adapter")
    if card is not None:
        [p_match], _ = bench.scores([(card.probe.text_a, card.probe.text_b)], "probe")
        check_probe(p_match, card, bench.dtype)
    step = 0 if card is None else card.step
    scores = {step: _scores(bench)}
    matrix = similarity_matrix(bench)
    if card is not None:
        scores |= {other: _scores(bench) for other in _other_checkpoints(bench, step)}
    if bench.world.is_main:
        write_evaluation(bench.inputs, scores)
        if matrix is not None:
            write_matrix(folder, matrix)
    bench.world.barrier()
    bench.engine.close()


def _scores(bench: Workbench) -> Scores:
    tables = {split: bench.inputs.splits[split] for split in SPLITS if split in bench.inputs.splits}
    found = {split: bench.scores(pair_texts(pairs), split) for split, pairs in tables.items()}
    return {split: dict(zip(READOUTS, answers, strict=True)) for split, answers in found.items()}


def _other_checkpoints(bench: Workbench, adapter_step: int) -> Iterator[int]:
    """Put the weights of each further checkpoint that counts into the student, the better ones first; its step."""
    inputs, world, engine = bench.inputs, bench.world, bench.engine
    wanted = inputs.config.train.test_checkpoints
    best = best_checkpoints(inputs.folder.checkpoints, wanted + 1) if world.is_main and wanted > 1 else []
    best = world.gather_object(best)[0]  # one answer for all: file systems may show different ones
    others = [found for found in best if found.step != adapter_step][: wanted - 1]
    if len(others) + 1 < wanted:
        logger.info(
            "evaluate: train.test_checkpoints is %d, there are %d to average: lower train.eval_steps for more",
            wanted,
            len(others) + 1,
        )
    for found in others:
        slices = {name: (part.start, part.stop) for name, part in engine.slices().items()}
        engine.restore(found.read(slices, ("weight",)), found.step)  # nothing is trained: moments may stay
        yield found.step


def write_evaluation(inputs: Inputs, scores: dict[int, Scores]) -> None:
    """
    Args:
        scores: of each checkpoint by its step, those of the adapter first.
    """
    step, *_ = scores
    rows = {
        split: {
            **answers,
            "teacher": open_signals(inputs, split).of_pairs().astype(np.float64),
            "token_overlap": token_overlap(inputs.splits[split]),
        }
        for split, answers in scores[step].items()
    }
    validation = inputs.splits.get("validation")
    metrics = {
        "step": step,
        "threshold_from": "validation" if validation is not None else "0.5, no validation pairs",
        **_metrics(inputs, rows),
    }
    if len(scores) > 1 and "test" in rows:
        metrics["test_checkpoints"] = {"steps": list(scores), **_mean_metrics(inputs, list(scores.values()))}
    for split, table in rows.items():
        _write_predictions(inputs, split, table)
    write_scores(inputs, scores)
    write_json(inputs.folder.metrics, metrics)


def _metrics(inputs: Inputs, rows: Scores) -> dict[str, dict[str, dict]]:
    thresholds = thresholds_from(rows.get("validation"), inputs.splits.get("validation"))
    found = {}
    for split in reversed(rows):  # test first
        found |= metrics_by_kind(rows[split], inputs.splits[split], thresholds, split)
    return found


def _mean_metrics(inputs: Inputs, scores: list[Scores]) -> dict[str, dict[str, dict]]:
    """Of the test tables: each figure's mean over checkpoints, each with its own threshold from validation."""
    every = [_metrics(inputs, rows) for rows in scores]

    def mean(split: str, row: str, key: str) -> float | int | None:
        values = [metrics[split][row][key] for metrics in every]
        return values[0] if key == "num_pairs" or None in values else float(np.mean(values))

    return {
        split: {row: {key: mean(split, row, key) for key in figures} for row, figures in table.items()}
        for split, table in every[0].items()
        if split.startswith("test")
    }


def _write_predictions(inputs: Inputs, split: str, rows: dict[str, np.ndarray]) -> None:
    pairs = inputs.splits[split]
    lines = [
        json.dumps({"id": pairs.ids[i], "label": int(pairs.label[i]), **{row: float(rows[row][i]) for row in rows}})
        for i in range(len(pairs))
    ]
    write_whole(inputs.folder.path / f"predictions-{split}.jsonl", "\n".join(lines) + "\n")


def write_scores(inputs: Inputs, scores: dict[int, Scores]) -> None:
    """`scores.parquet`: a record per split, checkpoint and pair, in the order of `scores` and of the pairs' files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [(split, step, rows) for step, splits in scores.items() for split, rows in splits.items()]
    sizes = [len(rows["student"]) for _, _, rows in parts]
    columns = {
        "split": pa.array(np.repeat([split for split, _, _ in parts], sizes), pa.string()),
        "step": pa.array(np.repeat([step for _, step, _ in parts], sizes), pa.int64()),
        "pair": pa.array(np.concatenate([np.arange(size) for size in sizes]), pa.int64()),
        **{
            column: pa.array(np.concatenate([rows[row] for _, _, rows in parts]), pa.float64())
            for row, column in READOUTS.items()
        },
    }
    path = inputs.folder.path / "scores.parquet"
    draft = path.with_name(f"{path.name}.tmp")
    pq.write_table(pa.table(columns), draft)
    os.replace(draft, path)
