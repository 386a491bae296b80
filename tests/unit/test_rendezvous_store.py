"""The port that rank 0 holds before it comes to the meeting; the meeting itself is in tests/system."""

import socket
import time

import pytest

from flipkd_dist.errors import UserError
from flipkd_dist.rendezvous import open_store, serve


def test_a_served_port_is_held_and_rank_0_finds_its_store_there():
    port, until = serve(), time.monotonic() + 10
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("", port))
    open_store("localhost", port, 1, until).set("came/1", "here")
    assert open_store("localhost", port, 0, until).get("came/1") == b"here"
    assert serve() != port


def test_a_port_of_a_stranger_is_refused():
    with socket.create_server(("", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(UserError, match=f"^MASTER_PORT: {port} is taken on "):
            open_store("localhost", port, 0, time.monotonic() + 10)
