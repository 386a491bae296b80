"""The rows of a comparison as data: which settings each changes, and in which runs it is measured."""

import difflib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flipkd_dist.comparison import ENCODERS, REFERENCE, Row
from flipkd_dist.comparison_formula import formula_of
from flipkd_dist.config import LossConfig, RunConfig, listed, with_overrides
from flipkd_dist.errors import UserError

logger = logging.getLogger("flipkd_dist")
FLIPKD = "FlipKD (ACL 2025)"
LONGEST_NAME = 80  # characters: a folder's name carries a seed and a hash besides
SUP_ONLY = {"loss.dist_weight": 0.0, "loss.mcl_weight": 0.0}
COMMON = ("name", "output_dir", "seed", "data", "tracking")  # settings and sections that a row cannot have of its own
OF_A_ROW = ("data.train", "data.max_length")  # though they stand in one of them


def standard_rows(config: RunConfig) -> dict[str, Row]:
    """Every row that `--rows` can name, in the table's order; one that changes nothing is the configuration."""
    full = {"student.tuning": "full", "student.readout": "auto", "train.learning_rate": config.train.learning_rate / 10}
    if config.student.encoder_module is not None:
        full["student.encoder_module"] = None  # whose LoRA-A is read
    arccse = {**_contrastive("arccse", 0.1745), "loss.dist_weight": 0.0, "loss.threshold": None}
    kdmcse = {**_contrastive("kdmcse", 0.15), "loss.dist_weight": 0.0}
    rows = [
        Row("overlap", "token overlap", {}, "Jaccard overlap of words", kind="overlap"),
        Row("teacher", "teacher", {}, "cosine of its vectors", FLIPKD, kind="teacher"),
        Row("untrained", "student, untrained", {}, kind="untrained"),
        Row("full_sup", "full fine-tuning, L_sup", SUP_ONLY | full),
        Row("lora_sup", "LoRA, L_sup", SUP_ONLY),
        Row("arccse", "ArcCSE", arccse),
        Row("kdmcse", "KDMCSE", kdmcse),
        Row("infonce", "flip, InfoNCE for L_MCL", _contrastive("infonce", LossConfig().margin)),
        Row("flip", "flip", {}),
        Row("no_mcl", "flip without L_MCL", {"loss.mcl_weight": 0.0}),
        Row("no_dist", "flip without L_dist", {"loss.dist_weight": 0.0}),
        Row("no_filter", "flip without the filter", {"loss.threshold": None}),
        Row("classic", "large to small", SUP_ONLY, "mean of (cos - p(match) of the student)²", kind="classic"),
    ]
    return {row.name: row for row in rows}


def _contrastive(name: str, margin: float) -> dict[str, object]:
    """A baseline in the place of L_MCL, with its authors' margin and temperature and none of L_MCL's choices."""
    settings = {"contrastive": name, "margin": margin, "temperature": 0.05, "mcl_negative_margin": "negative"}
    return {f"loss.{key}": value for key, value in settings.items()}


def chosen_rows(
    config: RunConfig,
    names: Sequence[str] | None = None,
    sweeps: Sequence[str] = (),
    teachers: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> list[Row]:
    """The rows of a table: the named ones, REFERENCE, a `flip` for each value of a sweep and for each further teacher.

    Args:
        names: None for every standard row that the configuration allows.
        sweeps: `dotted.key=v1,v2` each; the value of the row `flip` is that row itself.
        teachers: as `teacher.model_name_or_path`.
        settings: `ROW.dotted.key=value` each, over what the row changes; those of `flip` are its sweeps' and further
            teachers' too.
    Raises:
        UserError: an unknown row or setting, with the nearest name; a value out of range; what all rows share.
    """
    if config.student.tuning == "full":
        raise UserError(
            "student.tuning: a table's rows are LoRA's, and full_sup is beside them: leave it out; "
            "--set ROW.student.tuning=full tunes a row in full"
        )
    standard = standard_rows(config)
    if names is None and config.student.load_in_4bit:
        logger.info("row full_sup: left out: a base in 4 bits cannot be tuned in full")
        names = [name for name in standard if name != "full_sup"]
    names = list(dict.fromkeys(standard if names is None else names))
    for name in names:
        _check_name(name, standard, "--rows")
    wanted = {*names, REFERENCE, *(["flip"] if sweeps or teachers else [])}
    rows = [row for row in standard.values() if row.name in wanted]
    rows += [row for sweep in sweeps for row in _sweep(sweep)]
    rows += [row for name in teachers for row in _of_teacher(config, name)]
    return _different(config, _with_settings(_named_apart(rows), settings))


def settings_of(config: RunConfig, row: Row) -> RunConfig:
    """The configuration with what the row changes.

    Raises:
        UserError: names the row.
    """
    return with_overrides(
        config, [f"{key}={json.dumps(value)}" for key, value in row.overrides.items()], f"row {row.name}"
    )


def _different(config: RunConfig, rows: list[Row]) -> list[Row]:
    """The rows with their losses written out; one that would train just what another does is left out."""
    found: dict[tuple[str, str], str] = {}
    kept: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.name != REFERENCE, row.name != "flip")):
        own = settings_of(config, row)
        same = found.setdefault((row.kind, json.dumps(_at_work(own))), row.name)
        if same != row.name:
            logger.info("row %s: left out: its settings are those of %s", row.name, same)
            continue
        if row.kind == "student":
            formula, source = formula_of(own)
            row = replace(row, formula=formula, source=source)
        kept[row.name] = row
    return [kept[row.name] for row in rows if row.name in kept]


def _at_work(config: RunConfig) -> dict[str, object]:
    """All settings but those of losses that have no weight."""
    values = config.model_dump(mode="json")
    loss = values["loss"]
    if not loss["mcl_weight"]:
        for key in ("contrastive", "margin", "temperature", "mcl_negative_margin", "mcl_symmetric"):
            del loss[key]
        if not loss["dist_weight"]:
            del loss["threshold"]
    return values


def _check_name(name: str, known: Sequence[str], option: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise UserError(f"{option} {name}: no such row: the nearest is {near}; all are {', '.join(known)}")


def _check_key(key: str, option: str) -> None:
    if key.split(".")[0] in COMMON and key not in OF_A_ROW:
        raise UserError(f"{option}: {key} is the same for all rows of a table: set it for all of them, {key}=VALUE")


def _sweep(sweep: str) -> list[Row]:
    try:
        key, values = listed(sweep)
    except UserError as error:
        raise UserError(f"--sweep {sweep}: write it as dotted.key=value,value ({error})") from None
    _check_key(key, f"--sweep {sweep}")
    return [
        Row(f"flip-{key}-{value}", f"flip, {key} = {'null' if value is None else value}", {key: value})
        for value in values
    ]


def _of_teacher(config: RunConfig, name: str) -> list[Row]:
    """A further teacher alone, and flip with it."""
    change = {"teacher.model_name_or_path": name}
    short = "-".join(Path(name).parts[-2:])
    rows = [
        Row(f"teacher-{short}", f"teacher {name}", change, kind="teacher"),
        Row(f"flip-{short}", f"flip, teacher {name}", change),
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
        _check_key(key, f"--set {setting}")
        if found[name].kind in ENCODERS:
            raise UserError(f"--set {setting}: {name} is no run of its own: set it for all rows, {key}=VALUE")
        value = values[0] if len(values) == 1 else values
        found[name] = replace(found[name], overrides={**found[name].overrides, key: value})
        if name == "flip":  # what is flip but for one change stays so
            for row in [row for row in found.values() if row.name.startswith("flip-")]:
                found[row.name] = replace(row, overrides={key: value, **row.overrides})
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
