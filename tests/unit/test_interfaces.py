"""Which network interface gloo and NCCL would take, told before they try."""

import pytest

from flipkd_dist import interfaces
from flipkd_dist.interfaces import AddressError, nccl_choice, own_addresses

NAMES = ["lo", "docker0", "eth0", "eth10", "ib0"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, ["ib0", "eth0", "eth10", "docker0", "lo"]),
        ("eth", ["eth0", "eth10"]),
        ("eth1,ib", ["eth10", "ib0"]),
        ("=eth0", ["eth0"]),
        ("=eth1", []),
        ("^docker,lo", ["eth0", "eth10", "ib0"]),
        ("^=eth0", ["lo", "docker0", "eth10", "ib0"]),
        ("eth0:1234", ["eth0"]),
    ],
)
def test_nccl_takes_prefixes_whole_names_and_exceptions(wanted, expected):
    assert nccl_choice(wanted, NAMES) == expected


def test_loopback_is_among_the_interfaces():
    assert interfaces.interfaces()["lo"] == "127.0.0.1"


def test_gloo_takes_whole_names_and_several(monkeypatch):
    monkeypatch.setattr(interfaces, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.2"})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0,lo")
    assert own_addresses("gloo") == ["10.0.0.2", "127.0.0.1"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth")
    with pytest.raises(AddressError, match=r"GLOO_SOCKET_IFNAME: eth is no .* take one of lo 127.0.0.1, eth0 10.0.0.2"):
        own_addresses("gloo")


def test_without_the_variable_gloo_takes_the_host_names_address_or_loopback(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(interfaces.socket, "gethostname", lambda: "127.0.0.1")
    assert own_addresses("gloo") == ["127.0.0.1"]
    monkeypatch.setattr(interfaces.socket, "gethostname", lambda: "no-such-host.invalid")
    assert own_addresses("gloo") == ["127.0.0.1"]


def test_nccl_without_an_interface_that_fits(monkeypatch):
    monkeypatch.setattr(interfaces, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.2"})
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    with pytest.raises(AddressError, match="NCCL_SOCKET_IFNAME: ib is no"):
        own_addresses("nccl")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    assert own_addresses("nccl") == ["10.0.0.2"]
