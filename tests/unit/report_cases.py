"""Comparisons that the tests of the report share: made-up rows, of the size that a user's have."""

from dataclasses import replace

import numpy as np
from noise_cases import HOSTILE

from flipkd_dist.comparison import (
    METRICS,
    READINGS,
    REFERENCE,
    Comparison,
    Cost,
    Matrix,
    MetricResult,
    Results,
    Row,
    RowResult,
    RowScores,
    RunScores,
)
from flipkd_dist.evaluate import hard_negatives
from flipkd_dist.pairs import PairTable

LOSS = "L_sup + 0.1 L_dist + 0.1 L_MCL"
SKILL = {  # of p(match) and of the read-out: how far matches stand above non-matches
    "untrained": (0.3, 0.2),
    "full_sup": (1.4, 0.5),
    REFERENCE: (1.2, 0.6),
    "arccse": (1.3, 0.9),
    "kdmcse": (1.3, 1.0),
    "infonce": (1.2, 1.0),
    "flip": (1.5, 1.4),
    "no_mcl": (1.4, 1.2),
    "no_dist": (1.3, 1.1),
    "no_filter": (1.4, 1.3),
}
ENCODERS = {"teacher": 1.6, "overlap": 0.7, "classic": 1.1}


def pair_table(num_pairs=600, num_hard=100, texts=None, label=None):
    rows = np.arange(num_pairs)
    texts = texts or [f"question {number} about cards" for number in range(2 * num_pairs)]
    hard = (rows >= num_pairs - num_hard) if num_hard else np.zeros(num_pairs, bool)
    label = np.where(hard, 0, rows % 2) if label is None else label
    kind = np.where(hard, "hard", "").tolist()
    group = np.where(label == 1, rows % 7, -1)
    ids = [f"test:{row}" for row in rows]
    return PairTable(texts, rows % len(texts), (rows + num_pairs) % len(texts), label, ids, kind, group, group)


def scores(pairs, skill, generator, checkpoints):
    """[checkpoints, N] in [0, 1]: those of one run are alike."""
    run = generator.normal(size=len(pairs))
    noise = run + 0.3 * generator.normal(size=(checkpoints, len(pairs)))
    gap = np.where(pairs.label == 1, skill, np.where(hard_negatives(pairs), skill / 2, 0.0))
    return 1 / (1 + np.exp(-(gap - skill / 2 + noise)))


def row_scores(row, pairs, skills, seeds, checkpoints):
    runs = []
    for seed in seeds:
        generator = np.random.default_rng([seed, *row.name.encode()])
        found = {
            reading: {split: scores(table, skill, generator, checkpoints) for split, table in pairs.items()}
            for reading, skill in skills.items()
        }
        cost = Cost(754.0 + seed, 1_234_567, 3 << 30, 4_321_000) if row.kind == "student" else None
        runs.append(RunScores(seed, [10 * (step + 1) for step in range(checkpoints)], found, cost))
    return RowScores(row, runs)


def comparison(seeds=range(42, 47), checkpoints=2, sweep=(0.0, 0.02, 0.1), pairs=None, names=None):
    """13 rows, and those of a sweep; fewer with `names`."""
    pairs = pairs or {"validation": pair_table(200, 0), "test": pair_table()}
    rows = []
    for name, skill in ENCODERS.items():
        row = Row(name, f"{name} alone", {}, kind=name)
        own = seeds if name == "classic" else [42]
        rows.append(row_scores(row, pairs, {"similarity": skill}, own, 1))
    for name, skills in SKILL.items():
        row = Row(name, f"the row {name}", {"loss.mcl_weight": 0.0} if name == "no_mcl" else {}, LOSS, "FlipKD, Eq 6")
        row = replace(row, kind="untrained") if name == "untrained" else row
        own = [42] if name == "untrained" else seeds
        rows.append(row_scores(row, pairs, dict(zip(READINGS, skills, strict=True)), own, checkpoints))
    for margin in sweep:
        row = Row(f"flip-loss.margin-{margin:g}", f"flip, loss.margin = {margin:g}", {"loss.margin": margin}, LOSS)
        rows.append(row_scores(row, pairs, {"p_match": 1.3 + margin, "similarity": 1.2}, seeds, checkpoints))
    rows = [row for row in rows if names is None or row.row.name in names]
    matrices = {name: matrix(scale) for name, scale in ((REFERENCE, 0.3), ("flip", 0.9)) if names is None}
    return Comparison("bank-compare", pairs, rows, matrices)


def matrix(scale, size=32):
    generator = np.random.default_rng(0)
    group = np.arange(size) // 6
    teacher = 0.2 + 0.5 * (group[:, None] == group) + 0.1 * generator.random((size, size))
    return Matrix(list(range(size)), teacher, scale * teacher + 0.05 * generator.random((size, size)))


def results(found, alpha=0.01):
    """As the statistics give them, with made-up p-values: 0.0004 for flip's ROC-AUC, else 0.4."""
    table = found.pairs["test"]
    hard = hard_negatives(table)
    splits = {"test": ~hard} | ({"test_hard": hard | (table.label == 1)} if hard.any() else {})
    rows = []
    for split, mask in splits.items():
        for reading in READINGS:
            means = {}
            for row in (row for row in found.rows if row.runs and reading in row.runs[0].scores):
                means[row.row.name] = values = metric_values(row, reading, table.label, mask)
                base = means.get(REFERENCE)
                judged = {m: metric_result(row.row.name, m, v, base) for m, v in values.items()}
                rows.append(RowResult(row.row.name, row.row.title, reading, split, judged))
    return Results(rows, REFERENCE, alpha, 2000)


def metric_values(row, reading, label, mask):
    """Made up: they rise with the distance of the two labels' mean scores."""
    names = METRICS if len(set(label[mask].tolist())) == 2 else METRICS[:2]
    values = []
    for run in row.runs:
        mean = run.scores[reading]["test"].mean(axis=0)[mask]
        matches = label[mask] == 1
        values.append(0.6 + (mean[matches].mean() - mean[~matches].mean() if len(names) == 3 else 0.0) / 2)
    return {name: [float(value) + 0.01 * number for value in values] for number, name in enumerate(names)}


def metric_result(name, metric, values, base):
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
    if base is None or name == REFERENCE:
        return MetricResult(mean, std, values)
    difference = mean - float(np.mean(base[metric]))
    p, verdict = (0.0004, "better") if (name, metric) == ("flip", "roc_auc") else (0.4, "no difference")
    low, high = difference - 0.01, difference + 0.01
    return MetricResult(mean, std, values, difference, low, high, 0.03, p / 2, p, verdict)


def hostile():
    """Texts, titles and reasons that a page must show as they are."""
    texts = [*HOSTILE, "| a | [link](http://a.example) `code` *bold* <b>"]
    table = pair_table(60, 0, texts=texts)
    made = comparison(seeds=[42], checkpoints=1, sweep=(), pairs={"test": table}, names=(REFERENCE, "flip"))
    flip = made.row("flip")
    named = replace(flip.row, title=HOSTILE[0], source=HOSTILE[3], formula=HOSTILE[4], overrides={"a": HOSTILE[0]})
    rows = [made.row(REFERENCE), replace(flip, row=named), RowScores(Row("lost", HOSTILE[4], {}), [])]
    return replace(made, name=HOSTILE[0], rows=rows), {"lost": HOSTILE[0]}
