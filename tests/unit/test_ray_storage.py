"""A cluster whose nodes do not all see the run folder is refused, by name; nodes are asked by a stand-in."""

import threading

import pytest

from flipkd_dist.errors import UserError
from flipkd_dist.ray_storage import check_reached, sees

NODES = {"1a": "head (10.0.0.1)", "2b": "worker (10.0.0.2)"}


def test_one_node_is_not_asked(tmp_path):
    check_reached(tmp_path / "teacher", {"1a": "head"}, ask=None)
    assert not (tmp_path / "teacher").exists()


def test_every_node_that_sees_the_token_passes_and_nothing_stays(tmp_path):
    asked = []

    def ask(nodes, path, content):
        asked.extend(nodes)
        return [sees(path, content, patience_s=0) for _ in nodes]

    check_reached(tmp_path / "teacher", NODES, ask)
    assert asked == ["1a", "2b"] and not list((tmp_path / "teacher").iterdir())


def test_a_node_with_a_disk_of_its_own_is_named(tmp_path):
    elsewhere = tmp_path / "disk of the worker"
    elsewhere.mkdir()

    def ask(nodes, path, content):
        return [sees(path, content, 0), sees(elsewhere / path.name, content, 0)]

    with pytest.raises(UserError, match=r"^output_dir: node worker \(10\.0\.0\.2\) .* does not see .*teacher.*: put "):
        check_reached(tmp_path / "teacher", NODES, ask)
    assert not list((tmp_path / "teacher").iterdir())


def test_another_content_under_the_name_is_not_the_token(tmp_path):
    (tmp_path / "token").write_text("another")
    assert not sees(tmp_path / "token", "mine", patience_s=0)


def test_a_slow_file_system_has_its_time(tmp_path):
    timer = threading.Timer(0.3, (tmp_path / "token").write_text, ["mine"])
    timer.start()
    assert sees(tmp_path / "token", "mine", patience_s=10)
    timer.join()
