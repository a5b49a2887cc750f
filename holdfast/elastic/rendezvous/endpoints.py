"""The hosts that hold the rendezvous together: what `--rdzv-endpoint a:29400,b:29400,c:29400` means, checked before all else.

Every agent is given the same list in the same order; a replica is called by its place in it.
"""

from __future__ import annotations

import logging
import re
import socket
from contextlib import suppress
from dataclasses import dataclass

from holdfast.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_PORT = 29400
_HOST = re.compile(r"[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?")


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Two or more addresses, each of them once."""

    addresses: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        twice = {self.names[at] for at, address in enumerate(self.addresses) if address in self.addresses[:at]}
        if twice:
            raise ConfigError(
                f"--rdzv-endpoint lists {', '.join(sorted(twice))} more than once; each replica needs one of its own"
            )
        if len(self.addresses) < 2:
            raise ConfigError(
                f"a replicated rendezvous needs several hosts; --rdzv-endpoint lists {', '.join(self.names) or 'none'}"
            )

    @classmethod
    def parse(cls, text: str) -> Endpoints:
        found = cls(tuple(_address(part.strip(), text) for part in text.split(",")))
        if len(found.addresses) % 2 == 0:
            survives = (len(found.addresses) - 1) // 2
            logger.warning(
                "--rdzv-endpoint lists %d hosts: no more of them may die than of %d (%d); an odd number is better",
                len(found.addresses),
                len(found.addresses) - 1,
                survives,
            )
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{host}:{port}" for host, port in self.addresses)

    def take(self) -> tuple[int, socket.socket] | None:
        """The first listed place on this machine whose port is free, and the socket that listens there; None for a machine
        that is not listed, or whose places are taken by other agents."""
        for number, (host, port) in enumerate(self.addresses):
            listener = _listen(port) if _is_here(host) else None
            if listener is not None:
                return number, listener
        return None


def _address(part: str, text: str) -> tuple[str, int]:
    host, colon, port = part.partition(":")
    if not _HOST.fullmatch(host):
        raise ConfigError(
            f"--rdzv-endpoint {text!r}: {part!r} is no host:port; names and IPv4 addresses are understood, separated by commas"
        )
    if colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"--rdzv-endpoint {text!r}: the port of {part!r} has to be a number from 1 to 65535")
    return host.lower(), int(port) if colon else DEFAULT_PORT


def _is_here(host: str) -> bool:
    """Whether a name is this machine's own, or that of an address which can be bound here."""
    if host in (socket.gethostname().lower(), socket.getfqdn().lower()):
        return True
    try:
        addresses = {found[4][0] for found in socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)}
    except OSError:
        return False
    for address in addresses:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.bind((address, 0))
            return True
    return False


def _listen(port: int) -> socket.socket | None:
    """All addresses of this machine: a host's own name may lead to a loopback address, by which no other would find it."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("", port))
        listener.listen(4096)
    except OSError as error:
        logger.info("port %d of this machine is taken: %s", port, error)
        listener.close()
        return None
    return listener
