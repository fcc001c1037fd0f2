"""Addresses that the servers listen at, and the names that they are called by."""

from __future__ import annotations

import ipaddress
import socket

from ..hd.errors import UsageError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; UsageError for an address that cannot be had."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port}: give a number from 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except UnicodeError as error:
        raise UsageError(f"--host {host} is not a host's name; give one, or an address") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"--host {host} --port {port} cannot be had ({reason})") from error


def shown_address(listening: socket.socket) -> str:
    """The socket's address as it stands in a URL: host, in brackets where it holds colons, port."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def called_name(host_header: str) -> str:
    """The name in a Host header, in lower case and without its port."""
    name = host_header.lower()
    return name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
