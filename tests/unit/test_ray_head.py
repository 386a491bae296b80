"""The head of a cluster: an address at which nobody answers, and the end of a head that was there."""

import socket
import threading

import pytest

from flipkd_dist import ray_head
from flipkd_dist.errors import UserError
from flipkd_dist.ray_head import HeadWatch, check_head, patience_s, place, refusal


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize(
    "address, found",
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("[::1]:6379", ("::1", 6379)),
        ("auto", None),
        ("local", None),
    ],
)
def test_the_place_that_an_address_names(address, found):
    assert place(address) == found


def test_an_address_at_which_nothing_listens_is_refused_with_host_port_and_remedy(listener):
    host, port = listener.getsockname()
    check_head(f"{host}:{port}")
    check_head("auto")
    listener.close()
    with pytest.raises(UserError, match=f"RAY_ADDRESS: nothing answers at 127.0.0.1:{port}: start the head there"):
        check_head(f"{host}:{port}")


def test_what_ray_says_of_a_cluster_that_cannot_be_joined_becomes_a_line():
    other = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.9")
    assert "Ray: 2.9.0 Python: 3.9: install the versions of the cluster at h:1 here" in str(refusal("h:1", other))
    assert "no Ray head that lets us in at auto (none): check the port, and that RAY_AUTH_MODE" in str(
        refusal("auto", ConnectionError("none"))
    )
    assert refusal("h:1", RuntimeError("a bug")) is None
    assert refusal("local", ValueError("object_store_memory is too small")) is None  # there is no head to look for


def test_a_head_that_comes_back_in_time_ends_nothing(monkeypatch, listener):
    monkeypatch.setenv(ray_head.RECONNECT, "1.2")
    seen, gone, host, port = [True, False, True, *[False] * 100], threading.Event(), *listener.getsockname()
    asked, lost = [], []

    def answers(*where):
        asked.append(where)
        return seen[len(asked) - 1]

    monkeypatch.setattr(ray_head, "answers", answers)
    HeadWatch(host, port, lambda line: (lost.append(line), gone.set()), every_s=0.05).start()
    assert gone.wait(10)
    assert len(asked) > 4 and set(asked) == {(host, port)}  # one absence was too short
    [line] = lost
    assert line == f"Ray's head at {host}:{port} is gone: start it, and run the same command again to go on"


def test_it_leaves_before_ray_does(monkeypatch):
    assert patience_s() == 30
    monkeypatch.setenv(ray_head.RECONNECT, "600")  # a head that is restarted with its memory
    assert patience_s() == 300
