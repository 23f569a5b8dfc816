"""Addresses of this host as the other nodes of a run see them. Imports no torch."""

from __future__ import annotations

import fcntl
import socket
import struct
import time

from longspan.errors import UsageError

_SIOCGIFADDR = 0x8915  # netdevice(7): the IPv4 address of an interface


def split_endpoint(text: str) -> tuple[str, int]:
    """HOST and PORT of "HOST:PORT".

    Raises:
        UsageError: it is written otherwise, or the port is not 1 to 65535.
    """
    found = split_address(text)
    if found is None:
        raise UsageError(f"--rendezvous {text}: write it as HOST:PORT with a port of 1 to 65535, e.g. node1:29400.")
    return found


def split_address(text: str) -> tuple[str, int] | None:
    """HOST and PORT of "HOST:PORT"; None if it is written otherwise, or the port is not 1 to 65535."""
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        return None
    return host, int(port)


def is_local(host: str) -> bool:
    """Whether `host` is an address of this host: one that a socket can be bound to.

    Raises:
        UsageError: the name does not resolve.
    """
    with socket.socket() as probe:
        try:
            probe.bind((resolve(host), 0))
        except OSError:
            return False
    return True


def resolve(host: str) -> str:
    """The IPv4 address of `host`.

    Raises:
        UsageError: the name does not resolve.
    """
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UsageError(f"--rendezvous: the host name {host} does not resolve here ({error}).") from error


def local_address(towards: str) -> str:
    """This host's address on the way to `towards`; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address; None if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def wait_reachable(host: str, port: int, timeout_seconds: float) -> None:
    """Wait until something listens at --rendezvous host:port.

    Raises:
        UsageError: nothing did within the timeout.
    """
    error = unreachable(host, port, timeout_seconds)
    if error is not None:
        raise UsageError(
            f"no launcher answers at --rendezvous {host}:{port} within {timeout_seconds:.0f} s ({error}). "
            f"Start the same command on {host} too, check the port and the firewall between the nodes, or "
            f"wait longer with parallel.timeout_seconds."
        ) from error


def unreachable(host: str, port: int, timeout_seconds: float) -> OSError | None:
    """Why nothing answers at host:port within the timeout; None as soon as something does."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, left))).close()
            return None
        except OSError as error:
            if time.monotonic() >= deadline - 0.5:
                return error
            time.sleep(0.5)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
