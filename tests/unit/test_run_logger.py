"""A tracking server that cannot be reached stops nothing, and a stop is not taken for its failure."""

import pytest

from flipkd_dist import tracking
from flipkd_dist.errors import StoppedAtOnce


def test_a_client_that_cannot_be_made_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(tracking, "client", lambda _uri: 1 / 0)
    logger = tracking.RunLogger("http://127.0.0.1:1", "run")
    logger.pass_over_known()
    logger.reopen()
    logger.metrics({"loss": 1.0}, 3)
    logger.finish("KILLED")
    assert [line.startswith("mlflow: ") for line in caplog.messages] == [True] * 4


def test_a_stop_while_it_is_made_is_not_swallowed(monkeypatch):
    def stop(_uri):
        raise StoppedAtOnce("now")

    monkeypatch.setattr(tracking, "client", stop)
    with pytest.raises(StoppedAtOnce):
        tracking.RunLogger("http://127.0.0.1:1", "run").reopen()


def test_other_ranks_say_nothing(monkeypatch, caplog):
    monkeypatch.setattr(tracking, "client", lambda _uri: 1 / 0)
    tracking.RunLogger("http://127.0.0.1:1", None).finish()
    assert not caplog.messages
