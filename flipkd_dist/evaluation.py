"""`evaluate(config)`: metrics of the run's adapter, on the workers that train it."""

import json

import numpy as np

from flipkd_dist.adapter import AdapterCard, check_probe
from flipkd_dist.config import RunConfig
from flipkd_dist.evaluate import metrics_by_kind, pair_texts, thresholds_from, token_overlap
from flipkd_dist.preflight import Inputs
from flipkd_dist.run_folder import write_json, write_whole
from flipkd_dist.teacher_stage import open_signals
from flipkd_dist.workbench import build


def evaluate(config: RunConfig) -> None:
    """Rebuild the student from the saved adapter and write metrics.json and the predictions of each split."""
    folder = config.run_dir
    card = AdapterCard.read(folder / "adapter")
    bench = build(config, folder / "adapter")
    [p_match], _ = bench.scores([(card.probe.text_a, card.probe.text_b)], "probe")
    check_probe(p_match, card, bench.dtype)
    rows = {}
    for split in ("validation", "test"):
        pairs = bench.inputs.splits.get(split)
        if pairs is not None:
            answers, cosines = bench.scores(pair_texts(pairs), split)
            rows[split] = {
                "student": answers,
                "student_readout": cosines,
                "teacher": open_signals(bench.inputs, split).of_pairs().astype(np.float64),
                "token_overlap": token_overlap(pairs),
            }
    if bench.world.is_main:
        write_evaluation(bench.inputs, rows, card)
    bench.world.barrier()
    bench.engine.close()


def write_evaluation(inputs: Inputs, rows: dict[str, dict[str, np.ndarray]], card: AdapterCard) -> None:
    validation = inputs.splits.get("validation")
    thresholds = thresholds_from(rows.get("validation"), validation)
    metrics = {
        "step": card.step,
        "threshold_from": "validation" if validation is not None else "0.5, no validation pairs",
    }
    for split in reversed(rows):  # test first
        pairs = inputs.splits[split]
        metrics |= metrics_by_kind(rows[split], pairs, thresholds, split)
        lines = [
            json.dumps(
                {
                    "id": pairs.ids[i],
                    "label": int(pairs.label[i]),
                    **{row: float(rows[split][row][i]) for row in rows[split]},
                }
            )
            for i in range(len(pairs))
        ]
        write_whole(inputs.folder.path / f"predictions-{split}.jsonl", "\n".join(lines) + "\n")
    write_json(inputs.folder.metrics, metrics)
