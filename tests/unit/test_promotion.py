"""Promotion: only what is not worse on the same pairs, with a way back; the registry is stood in for."""

from types import SimpleNamespace

import pytest

from flipkd_dist import promotion
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.promotion import measured_tags, promote

CONFIG = RunConfig(name="bank")


def tags(roc_auc: float | None, pairs: str = "p") -> dict[str, str]:
    return measured_tags({"test": {"student": {"roc_auc": roc_auc, "f1": 0.5}}}, pairs)


class Missing(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


class Registry:
    def __init__(self, aliases: dict[str, str], **versions: dict[str, str]):
        self.aliases, self.versions, self.moves = dict(aliases), versions, []
        self.dies_after = 99

    def get_registered_model(self, name):
        if name != "bank":
            raise Missing(f"no {name}")
        return SimpleNamespace(aliases=self.aliases)

    def get_model_version(self, name, version):
        return SimpleNamespace(tags=self.versions[f"v{version}"])

    def set_registered_model_alias(self, name, alias, version):
        if len(self.moves) == self.dies_after:
            raise KeyboardInterrupt
        self.aliases[alias] = version
        self.moves.append((alias, version))


@pytest.fixture
def registry(monkeypatch):
    """Version 1 is champion, version 2 a better challenger."""
    found = Registry({"champion": "1", "challenger": "2"}, v1=tags(0.8), v2=tags(0.9))
    monkeypatch.setattr(promotion, "client", lambda _uri: found)
    monkeypatch.setattr(promotion, "has_store", lambda _: True)
    return found


def test_a_better_challenger_becomes_champion_and_the_old_one_is_remembered(registry):
    said = promote(CONFIG)
    assert registry.aliases == {"champion": "2", "challenger": "2", "previous": "1"}
    assert said == [
        "bank: @champion is version 2 now: test roc_auc 0.9000, f1 0.5000",
        "bank: @previous is version 1, until now @champion: test roc_auc 0.8000, f1 0.5000",
    ]
    assert promote(CONFIG) == ["bank: @champion is version 2 already"]
    assert registry.aliases["previous"] == "1"


def test_the_way_back_needs_no_comparison(registry):
    promote(CONFIG)
    promote(CONFIG, source="previous")
    assert registry.aliases == {"champion": "1", "challenger": "2", "previous": "1"}
    assert promote(CONFIG, source="previous") == ["bank: @champion is version 1 already"]
    assert registry.aliases["champion"] == "1"


def test_without_a_server_and_before_a_training_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(promotion, "client", lambda _uri: 1 / 0)
    with pytest.raises(UserError, match=r"no mlflow\.db in it, and no server is named: set MLFLOW_TRACKING_URI"):
        promote(RunConfig(name="bank", output_dir=str(tmp_path / "runs")))
    assert not any(tmp_path.iterdir())


def test_the_first_champion_has_nothing_to_beat(registry):
    del registry.aliases["champion"]
    registry.versions["v2"] = {}
    assert promote(CONFIG) == ["bank: @champion is version 2 now: not measured on test pairs"]
    assert "previous" not in registry.aliases


def test_other_aliases_have_a_past_of_their_own(registry):
    registry.aliases["production"] = "1"
    promote(CONFIG, target="production")
    assert registry.aliases["previous-production"] == "1" and "previous" not in registry.aliases
    promote(CONFIG, source="previous-production", target="production")
    assert registry.aliases["production"] == "1"


@pytest.mark.parametrize(
    "champion, challenger, metric, why",
    [
        (tags(0.95), tags(0.9), "roc_auc", "challenger has test roc_auc 0.9000, champion 0.9500"),
        (tags(0.8, "others"), tags(0.9), "roc_auc", "cannot be compared .measured on other test pairs"),
        ({}, tags(0.9), "roc_auc", "no roc_auc on test pairs of champion"),
        (tags(0.8), tags(None), "roc_auc", "no roc_auc on test pairs of challenger"),
        (tags(0.8), tags(0.9), "accuracy", "no accuracy on test pairs of challenger and champion"),
    ],
)
def test_what_is_worse_or_unknown_stays_where_it_is_unless_forced(registry, champion, challenger, metric, why):
    registry.versions.update(v1=champion, v2=challenger)
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"metric_for_best_model": metric})})
    with pytest.raises(UserError, match=why):
        promote(config)
    assert registry.moves == []
    promote(config, force=True)
    assert registry.aliases["champion"] == "2"


def test_an_equal_one_is_not_worse(registry):
    registry.versions["v2"] = tags(0.8)
    promote(CONFIG)
    assert registry.aliases["champion"] == "2"


def test_a_missing_alias_and_a_missing_model_are_the_users(registry):
    with pytest.raises(UserError, match="no version has the alias newcomer: run `flipkd register --alias newcomer`"):
        promote(CONFIG, source="newcomer")
    with pytest.raises(UserError, match="other: no such registered model"):
        promote(RunConfig(name="other"))


@pytest.mark.parametrize("source", ["challenger", "previous"])
def test_a_kill_between_the_two_moves_is_made_good(registry, source):
    if source == "previous":
        promote(CONFIG)
        registry.moves.clear()
    wanted = {"challenger": "2", "previous": "1"}[source]
    registry.dies_after = {"challenger": 1, "previous": 0}[source]
    with pytest.raises(KeyboardInterrupt):
        promote(CONFIG, source=source)
    registry.dies_after = 99
    promote(CONFIG, source=source)
    assert registry.aliases["champion"] == wanted


def test_tags_hold_what_was_measured():
    assert measured_tags(None, "p") == {} and measured_tags({"validation": {}}, "p") == {}
    assert tags(1 / 3) == {
        "flipkd.test_pairs": "p", "flipkd.test.roc_auc": repr(1 / 3), "flipkd.test.f1": "0.5"
    }  # fmt: skip
