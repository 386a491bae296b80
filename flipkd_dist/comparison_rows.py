"""The rows of a comparison as data: which settings each changes, and in which runs it is measured."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flipkd_dist.comparison import REFERENCE, Row
from flipkd_dist.config import LossConfig, RunConfig, listed, with_overrides
from flipkd_dist.errors import UserError
from flipkd_dist.losses import FORMULAS

FLIPKD = "FlipKD (ACL 2025)"
ENCODERS = ("teacher", "overlap")  # kinds whose scores stand in the predictions of every run
LONGEST_NAME = 80  # characters: a folder's name carries a seed and a hash besides
SUP_ONLY = {"loss.dist_weight": 0.0, "loss.mcl_weight": 0.0}


def standard_rows(config: RunConfig) -> dict[str, Row]:
    """Every row that `--rows` can name, in the table's order; one that changes nothing is the configuration."""
    loss = config.loss
    full = {"student.tuning": "full", "student.readout": "auto", "train.learning_rate": config.train.learning_rate / 10}
    lora = {"student.tuning": "lora"}
    dist, mcl = (loss.dist_weight, "dist"), (loss.mcl_weight, loss.contrastive)
    arccse = {**_contrastive("arccse", 0.1745), "loss.dist_weight": 0.0, "loss.threshold": None}
    kdmcse = {**_contrastive("kdmcse", 0.15), "loss.dist_weight": 0.0}
    infonce = _contrastive("infonce", LossConfig().margin)
    rows = [
        Row("overlap", "token overlap", {}, "Jaccard overlap of words", kind="overlap"),
        Row("teacher", "teacher", {}, "cosine of its vectors", FLIPKD, kind="teacher"),
        Row("untrained", "student, untrained", {}, kind="untrained"),
        Row("full_sup", "full fine-tuning, L_sup", SUP_ONLY | full, *_formula()),
        Row("lora_sup", "LoRA, L_sup", SUP_ONLY | lora, *_formula()),
        Row("arccse", "ArcCSE", arccse, *_formula((loss.mcl_weight, "arccse"))),
        Row("kdmcse", "KDMCSE", kdmcse, *_formula((loss.mcl_weight, "kdmcse"))),
        Row("infonce", "flip, InfoNCE for L_MCL", infonce, *_formula(dist, (loss.mcl_weight, "infonce"))),
        Row("flip", "flip", {}, *_formula(dist, mcl)),
        Row("no_mcl", "flip without L_MCL", {"loss.mcl_weight": 0.0}, *_formula(dist)),
        Row("no_dist", "flip without L_dist", {"loss.dist_weight": 0.0}, *_formula(mcl)),
        Row("no_filter", "flip without the filter", {"loss.threshold": None}, *_formula(dist, mcl, also="all φ = 1")),
        Row("classic", "large to small", SUP_ONLY | lora, "mean of (cos - p(match) of the student)²", kind="classic"),
    ]
    return {row.name: row for row in rows}


def _contrastive(name: str, margin: float) -> dict[str, object]:
    """A baseline in the place of L_MCL, with its authors' margin and temperature and none of L_MCL's choices."""
    settings = {"contrastive": name, "margin": margin, "temperature": 0.05, "mcl_negative_margin": "negative"}
    return {f"loss.{key}": value for key, value in settings.items()}


def _formula(*terms: tuple[float, str], also: str = "") -> tuple[str, str]:
    """L_sup and weighted losses of `losses.FORMULAS` written out, and their sources."""
    names = ["sup", *(name for _, name in terms)]
    total = " + ".join(["L_sup", *(f"{weight:g} L_{name}" for weight, name in terms)])
    written = [f"L_{name} = {FORMULAS[name][0]}" for name in names]
    sources = dict.fromkeys(FORMULAS[name][1] for name in names)
    return "; ".join([total, *written, *([also] if also else [])]), "; ".join(sources)


def chosen_rows(
    config: RunConfig,
    names: Sequence[str] | None = None,
    sweeps: Sequence[str] = (),
    teachers: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> list[Row]:
    """The rows of a table: the named ones, REFERENCE, a `flip` for each value of a sweep and for each further teacher.

    Args:
        names: None for every standard row.
        sweeps: `dotted.key=v1,v2` each; the configuration's own value is the row `flip` itself.
        teachers: as `teacher.model_name_or_path`.
        settings: `ROW.dotted.key=value` each, over what the row changes.
    Raises:
        UserError: an unknown row or setting, with the nearest name; a value out of range.
    """
    standard = standard_rows(config)
    names = list(dict.fromkeys(standard if names is None else names))
    for name in names:
        _check_name(name, standard, "--rows")
    wanted = {*names, REFERENCE, *(["flip"] if sweeps or teachers else [])}
    rows = [row for row in standard.values() if row.name in wanted]
    rows += [row for sweep in sweeps for row in _sweep(config, sweep)]
    rows += [row for name in teachers for row in _of_teacher(config, name)]
    rows = _with_settings(_named_apart(rows), settings)
    for row in rows:
        settings_of(config, row)
    return rows


def settings_of(config: RunConfig, row: Row) -> RunConfig:
    """The configuration with what the row changes.

    Raises:
        UserError: names the row.
    """
    return with_overrides(
        config, [f"{key}={json.dumps(value)}" for key, value in row.overrides.items()], f"row {row.name}"
    )


def _flip(config: RunConfig) -> tuple[str, str]:
    flip = standard_rows(config)["flip"]
    return flip.formula, flip.source


def _check_name(name: str, known: Sequence[str], option: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise UserError(f"{option} {name}: no such row: the nearest is {near}; all are {', '.join(known)}")


def _sweep(config: RunConfig, sweep: str) -> list[Row]:
    try:
        key, values = listed(sweep)
    except UserError as error:
        raise UserError(f"--sweep {sweep}: write it as dotted.key=value,value ({error})") from None
    rows = []
    for value in values:
        title = f"flip, {key} = {'null' if value is None else value}"
        row = Row(f"flip-{key}-{value}", title, {key: value}, *_flip(config))
        if settings_of(config, row) != config:
            rows.append(row)
    return rows


def _of_teacher(config: RunConfig, name: str) -> list[Row]:
    """A further teacher alone, and flip with it."""
    change = {"teacher.model_name_or_path": name}
    short = "-".join(Path(name).parts[-2:])
    rows = [
        Row(f"teacher-{short}", f"teacher {name}", change, kind="teacher"),
        Row(f"flip-{short}", f"flip, teacher {name}", change, *_flip(config)),
    ]
    return rows if settings_of(config, rows[1]) != config else []


def _named_apart(rows: list[Row]) -> list[Row]:
    """Names made fit for folders, and different where the letters that a folder may not have were the difference."""
    found: dict[str, Row] = {}
    for row in rows:
        short = re.sub(r"[^A-Za-z0-9._-]+", "-", row.name)[:LONGEST_NAME].rstrip("-")
        name, number = short, 1
        while name in found and found[name].overrides != row.overrides:
            number += 1
            name = f"{short}-{number}"
        found[name] = replace(row, name=name)
    return list(found.values())


def _with_settings(rows: list[Row], settings: Sequence[str]) -> list[Row]:
    found = {row.name: row for row in rows}
    for setting in settings:
        name = next((name for name in sorted(found, key=len, reverse=True) if setting.startswith(f"{name}.")), None)
        if name is None:
            _check_name(setting.partition(".")[0], list(found), "--set")
        try:
            key, values = listed(setting.removeprefix(f"{name}."))
        except UserError as error:
            raise UserError(f"--set {setting}: write it as ROW.dotted.key=value ({error})") from None
        value = values[0] if len(values) == 1 else values
        found[name] = replace(found[name], overrides={**found[name].overrides, key: value})
    return list(found.values())


@dataclass(frozen=True)
class PlannedRun:
    """One of a row's runs, before its folder is known."""

    row: Row
    seed: int
    config: RunConfig


def planned_runs(config: RunConfig, rows: Sequence[Row], num_seeds: int) -> list[PlannedRun]:
    """Seed by seed, so that an early end leaves whole tables; rows that do not depend on the seed once.

    In each seed REFERENCE comes first: `classic` is taught by it.
    """
    runs = []
    for seed in range(config.seed, config.seed + num_seeds):
        for row in sorted(rows, key=lambda row: row.name != REFERENCE):
            if row.kind in ENCODERS or (row.kind == "untrained" and seed != config.seed):
                continue
            runs.append(PlannedRun(row, seed, settings_of(config, row).model_copy(update={"seed": seed})))
    return runs
