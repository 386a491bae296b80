"""A rendezvous that cannot work ends on every process with one line, in time; two hosts are network namespaces."""

import ctypes
import multiprocessing
import os
import socket
import subprocess
import time

import namespaces
import pytest
import torch
import torch.distributed as dist
from namespaces import INTERFACE, Host
from ray_cluster import free_port

from flipkd_dist.engine import join_world
from flipkd_dist.errors import UserError

pytestmark = pytest.mark.system
TIMEOUT_S = 3
MARGIN_S = 15  # of a loaded machine, and of what ranks grant each other beyond timeout_s
NEW_NETWORK, NEW_NAME = 0x40000000, 0x04000000  # of setns and unshare


def _arrive(rank: int, environment: dict, host: Host | None, queue) -> None:
    start, total, line = time.monotonic(), None, None
    try:
        if host:
            _move_to(host)
        os.environ.update({"RANK": str(rank), **environment})
        world = join_world(False, TIMEOUT_S)
        total = world.sum(torch.ones(1)).item()
        world.barrier()
    except UserError as error:
        line = str(error)
    except BaseException as error:  # is seen as what it is
        line = repr(error)
    queue.put((rank, total, line, time.monotonic() - start))
    queue.close()
    queue.join_thread()
    os._exit(0)


def _move_to(host: Host) -> None:
    """Let this process live on that host, where its name resolves to nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(NEW_NAME) == 0, os.strerror(ctypes.get_errno())
    socket.sethostname(host.name)
    with open(f"/var/run/netns/{host.namespace}") as namespace:
        assert libc.setns(namespace.fileno(), NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())


def arrive(size: int, ranks: list[int], hosts: dict[int, Host] | None = None, by_rank=None, **environment) -> dict:
    """rank -> (sum of ones over all, or None; the line, or None) of these ranks of `size`, started at once."""
    context = multiprocessing.get_context("fork")
    queue, hosts, by_rank = context.Queue(), hosts or {}, by_rank or {}
    environment = {"WORLD_SIZE": str(size), **{key: str(value) for key, value in environment.items()}}
    members = [
        context.Process(target=_arrive, args=(rank, environment | by_rank.get(rank, {}), hosts.get(rank), queue))
        for rank in ranks
    ]
    for member in members:
        member.start()
    try:
        found = [queue.get(timeout=TIMEOUT_S + 4 * MARGIN_S) for _ in members]
    finally:
        for member in members:
            member.join(5)
            member.kill()
    assert all(elapsed < TIMEOUT_S + MARGIN_S for *_, elapsed in found)
    print({rank: (line, round(elapsed, 2)) for rank, _, line, elapsed in found})
    return {rank: (total, line) for rank, total, line, _ in found}


def lines(found: dict) -> list[str]:
    return [line or "" for _, (_, line) in sorted(found.items())]


def test_three_ranks_meet():
    found = arrive(3, [0, 1, 2], MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), GLOO_SOCKET_IFNAME="lo")
    assert found == dict.fromkeys(range(3), (3.0, None))


def test_a_name_that_does_not_resolve():
    for line in lines(arrive(2, [0, 1], MASTER_ADDR="no-such-host.invalid", MASTER_PORT=29500)):
        assert line.startswith("MASTER_ADDR: no-such-host.invalid:29500: the name is not known on ")
        assert line.endswith("set it to an address of rank 0's host")


def test_nobody_listens():
    port = free_port()
    [line] = lines(arrive(2, [1], MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    assert line.startswith(f"MASTER_ADDR: 127.0.0.1:{port} cannot be reached from ") and "connection refused" in line
    assert "is rank 0 running there" in line


def test_rank_0_names_those_that_never_came_and_tells_those_that_did():
    port = free_port()
    found = arrive(4, [0, 2], MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    for line in lines(found):
        assert line.startswith(f"ranks 1, 3 did not come within {TIMEOUT_S} s to 127.0.0.1:{port}: ")


def test_a_taken_port():
    with socket.socket(socket.AF_INET6) as server:
        server.bind(("::", 0))
        server.listen()
        port = server.getsockname()[1]
        first, second = lines(arrive(2, [0, 1], MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    assert first.startswith(f"MASTER_PORT: {port} is taken on ") and first.endswith("choose another")
    assert second.startswith(f"MASTER_PORT: what listens at 127.0.0.1:{port} is not rank 0 of this run")


def test_an_interface_that_is_not_there():
    port = free_port()
    by_rank = {1: {"GLOO_SOCKET_IFNAME": "eth77"}}
    found = arrive(2, [0, 1], by_rank=by_rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    for line in lines(found):
        assert line.startswith("rank 1 on ") and "GLOO_SOCKET_IFNAME: eth77 is no interface" in line
        assert "lo 127.0.0.1" in line


def test_under_the_store_of_torchrun():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "GLOO_SOCKET_IFNAME": "lo"}
    assert arrive(2, [0, 1], **place, **agent) == dict.fromkeys(range(2), (2.0, None))
    grown = arrive(3, [0, 1, 2], **place, **agent)  # a node came: no restart that counts
    assert grown == dict.fromkeys(range(3), (3.0, None))
    again = arrive(2, [0, 1], **place, **agent | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert again == dict.fromkeys(range(2), (2.0, None))
    [line] = lines(arrive(2, [0], **place, **agent | {"TORCHELASTIC_RESTART_COUNT": "2"}))
    assert line.startswith("rank 1 did not come")


@pytest.fixture(scope="module")
def hosts():
    with namespaces.hosts(2) as made:
        yield made


def test_loopback_between_two_hosts_is_told_and_the_interface_helps(hosts):
    first, second = hosts
    where, port = {0: first, 1: second}, free_port()
    found = arrive(2, [0, 1], where, MASTER_ADDR=first.address, MASTER_PORT=port, GLOO_SOCKET_IFNAME="")
    for line in lines(found):
        assert line == lines(found)[0]
        assert line.startswith(f"rank 0 on {first.name} cannot reach rank 1 on {second.name} at 127.0.0.1:")
        assert "set GLOO_SOCKET_IFNAME to the interface that the hosts share" in line
        assert f"({second.name} has lo 127.0.0.1, {INTERFACE} {second.address})" in line
    found = arrive(2, [0, 1], where, MASTER_ADDR=first.address, MASTER_PORT=port, GLOO_SOCKET_IFNAME=INTERFACE)
    assert found == dict.fromkeys(range(2), (2.0, None))


def test_a_port_that_drops_everything(hosts):
    """As behind a firewall: what is sent there vanishes."""
    _, second = hosts
    subprocess.run(["ip", "-n", second.namespace, "route", "add", "10.98.0.0/24", "via", "10.77.0.9"], check=True)
    [line] = lines(arrive(2, [1], {1: second}, MASTER_ADDR="10.98.0.1", MASTER_PORT=29500))
    assert line.startswith(f"MASTER_ADDR: 10.98.0.1:29500 cannot be reached from {second.name} within ")
    assert "is MASTER_PORT open to this host?" in line


def test_an_address_that_is_not_rank_0s(hosts):
    """MASTER_ADDR is the second host's: rank 0 listens where nobody looks."""
    first, second = hosts
    where, port = {0: first, 1: second}, free_port()
    zero, one = lines(arrive(2, [0, 1], where, MASTER_ADDR=second.address, MASTER_PORT=port))
    assert zero.startswith(
        f"MASTER_ADDR: rank 0 listens on {first.name}, and {second.address}:{port} does not lead there"
    )
    assert one.startswith(f"MASTER_ADDR: {second.address}:{port} cannot be reached from {second.name}")
