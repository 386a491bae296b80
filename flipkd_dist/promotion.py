"""`flipkd promote`: an alias of a registered model moves to a version that is not worse on the same test pairs."""

from typing import Any

from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.tracking import client, model_name
from flipkd_dist.tracking_server import OWN, has_store, server_errors, tracking_uri

TEST_PAIRS, FIGURE = "flipkd.test_pairs", "flipkd.test."  # tags of a version: which pairs, and how it did on them
SHOWN = ("roc_auc", "f1", "accuracy", "average_precision")


def measured_tags(metrics: dict[str, Any] | None, pairs: str) -> dict[str, str]:
    """What a registered version says of its p(match) on the test pairs with this hash."""
    figures = (metrics or {}).get("test", {}).get("student", {})
    found = {FIGURE + name: repr(figures[name]) for name in SHOWN if figures.get(name) is not None}
    return found and {TEST_PAIRS: pairs, **found}


def previous_of(alias: str) -> str:
    """The alias that remembers what another one meant before it moved."""
    return "previous" if alias == "champion" else f"previous-{alias}"


def promote(config: RunConfig, source: str = "challenger", target: str = "champion", force: bool = False) -> list[str]:
    """Let the alias `target` mean the version of `source`; what it meant stays reachable as `previous`.

    Args:
        force: without a comparison. Going back to `previous` needs none.
    Returns:
        Lines that say what has changed.
    Raises:
        UserError: no version has the alias `source`; it is worse by train.metric_for_best_model on the same test
            pairs, or it cannot be compared; the server is down.
    """
    name = model_name(config)
    if not has_store(config):
        raise UserError(
            f"{config.run_dir}: there is no {OWN} in it, and no server is named: set MLFLOW_TRACKING_URI or "
            "tracking.mlflow_tracking_uri, or run `flipkd register` first"
        )
    with server_errors(config):
        registry = client(tracking_uri(config))
        aliases = _aliases(registry, name)
        if source not in aliases:
            raise UserError(f"{name}: no version has the alias {source}: run `flipkd register --alias {source}` first")
        new, old = str(aliases[source]), aliases.get(target)
        if old is not None and str(old) == new:
            return [f"{name}: @{target} is version {new} already"]
        tags = {version: registry.get_model_version(name, version).tags for version in (new, old) if version}
        is_way_back = source == previous_of(target)
        if old is not None and not (force or is_way_back):
            _compare(name, config.train.metric_for_best_model, (source, tags[new]), (target, tags[old]))
        # The way back leaves `previous` where it is: run twice, it does not bring back what was left.
        keeps = [] if old is None or is_way_back else [(previous_of(target), old)]
        for alias, version in (*keeps, (target, new)):  # a kill between them can be made good
            registry.set_registered_model_alias(name, alias, version)
    lines = [f"{name}: @{target} is version {new} now: {_figures(tags[new])}"]
    if old is not None:
        kept = "" if is_way_back else f"@{previous_of(target)} is "
        lines.append(f"{name}: {kept}version {old}, until now @{target}: {_figures(tags[old])}")
    return lines


def _aliases(registry: Any, name: str) -> dict[str, Any]:
    try:
        return registry.get_registered_model(name).aliases
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"{name}: no such registered model: run `flipkd register` first") from None


def _compare(name: str, metric: str, new: tuple[str, dict[str, str]], old: tuple[str, dict[str, str]]) -> None:
    """
    Raises:
        UserError: the new version is worse, or the two were not measured on the same test pairs.
    """
    (source, ours), (target, theirs) = new, old
    key = FIGURE + metric
    measured = [tags.get(TEST_PAIRS) if key in tags else None for tags in (ours, theirs)]
    if None in measured or measured[0] != measured[1]:
        missing = [alias for alias, found in zip((source, target), measured, strict=True) if found is None]
        why = f"no {metric} on test pairs of {' and '.join(missing)}" if missing else "measured on other test pairs"
        raise UserError(
            f"{name}: {source} and {target} cannot be compared ({why}): evaluate and register both on the same "
            "data.test, or add --force"
        )
    if float(ours[key]) < float(theirs[key]):
        raise UserError(
            f"{name}: {source} has test {metric} {float(ours[key]):.4f}, {target} {float(theirs[key]):.4f}: "
            "train a better one, or add --force"
        )


def _figures(tags: dict[str, str]) -> str:
    found = [f"{name} {float(tags[FIGURE + name]):.4f}" for name in SHOWN if FIGURE + name in tags]
    return f"test {', '.join(found)}" if found else "not measured on test pairs"
