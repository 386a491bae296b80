"""This host's network interfaces, and which of them gloo and NCCL would take; they do not say it themselves."""

import fcntl
import os
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915
VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
IPV6_LIST = Path("/proc/net/if_inet6")


class AddressError(Exception):
    """The variable names no usable interface of this host; the message is one line."""


def interfaces() -> dict[str, str]:
    """Name -> its address, IPv4 before IPv6; those without an address are left out."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
            except OSError:  # it has none
                continue
    for line in IPV6_LIST.read_text().splitlines() if IPV6_LIST.exists() else []:
        digits, _, _, scope, _, name = line.split()
        if scope != "20" and name not in found:  # 20: valid on its own link only
            found[name] = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
    return found


def own_addresses(backend: str) -> list[str]:
    """The addresses at which the other ranks would reach this process.

    Raises:
        AddressError: the variable of the backend names no interface of this host.
    """
    there, variable = interfaces(), VARIABLES[backend]
    wanted = os.environ.get(variable)
    if backend == "nccl":
        names = nccl_choice(wanted, list(there))
        if wanted and not names:
            raise AddressError(_no_such(variable, wanted, there))
        return [there[name] for name in names[:1]]
    if not wanted:
        return [_address_of_host_name()]
    for name in wanted.split(","):
        if name not in there:
            raise AddressError(_no_such(variable, name, there))
    return [there[name] for name in wanted.split(",")]


def _no_such(variable: str, wanted: str, there: dict[str, str]) -> str:
    return f"{variable}: {wanted} is no interface with an address here: take one of {shown(there)}"


def shown(there: dict[str, str]) -> str:
    return ", ".join(f"{name} {address}" for name, address in there.items())


def nccl_choice(wanted: str | None, names: list[str]) -> list[str]:
    """The interfaces that NCCL considers, in its order.

    Args:
        wanted: NCCL_SOCKET_IFNAME: prefixes, after `=` whole names, after `^` what to leave out.
    """
    if not wanted:
        virtual = [name for name in names if name.startswith(("docker", "lo"))]
        ranked = [name for name in names if name not in virtual]
        ranked.sort(key=lambda name: not name.startswith("ib"))
        return ranked + sorted(virtual)  # docker before lo
    without, rest = wanted.startswith("^"), wanted.removeprefix("^")
    exact, rest = rest.startswith("="), rest.removeprefix("=")
    listed = [entry.split(":")[0] for entry in rest.split(",")]  # a port may follow

    def matches(name: str) -> bool:
        return any(name == entry if exact else name.startswith(entry) for entry in listed)

    return [name for name in names if matches(name) != without]


def _address_of_host_name() -> str:
    """What gloo takes: the first address of the host's name that is this host's, else loopback."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
                return address[0]
            except OSError:
                continue
    return "127.0.0.1"
