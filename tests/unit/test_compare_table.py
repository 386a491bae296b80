"""One call at a time in a comparison's folder, and Ctrl-C as any other signal that asks to stop."""

from types import SimpleNamespace

import pytest

from flipkd_dist import compare as module
from flipkd_dist.config import RunConfig
from flipkd_dist.durable import one_at_a_time
from flipkd_dist.errors import StoppedAtOnce, UserError

CONFIG = RunConfig(name="bank")


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """A table of one run that is not finished; what was called of it, and where it is interrupted."""
    found = SimpleNamespace(called=[], interrupted=None)

    def step(name):
        def call(*_):
            found.called.append(name)
            if name == found.interrupted:
                raise KeyboardInterrupt

        return call

    table = SimpleNamespace(
        runs=[SimpleNamespace(is_finished=False)],
        folder=SimpleNamespace(path=tmp_path / "bank-compare"),
        say_failures=lambda: 0,
        **{name: step(name) for name in ("join", "open", "make", "conclude")},
    )
    monkeypatch.setattr(module, "Table", lambda *_: table)
    found.table = table
    return found


def test_what_is_finished_needs_no_cluster(steps):
    assert module.compare(CONFIG) and steps.called == ["join", "open", "make", "conclude"]
    steps.called.clear()
    steps.table.runs[0].is_finished = True
    assert module.compare(CONFIG) and steps.called == ["open", "conclude"]


@pytest.mark.parametrize("name", ["join", "make", "conclude"])
def test_ctrl_c_is_a_stop_wherever_it_comes(steps, name):
    steps.interrupted = name
    with pytest.raises(StoppedAtOnce, match="run the same command again to go on"):
        module.compare(CONFIG)
    assert steps.called[-1] == name


def test_a_second_call_for_the_same_folder_is_refused(steps):
    folder = steps.table.folder.path
    with one_at_a_time(folder):
        with pytest.raises(UserError, match=f"^{folder}: another `flipkd compare` is at work there: wait for it, or"):
            module.compare(CONFIG)
    assert "open" not in steps.called
    assert module.compare(CONFIG)  # it has ended
