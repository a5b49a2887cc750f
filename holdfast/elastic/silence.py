"""A host that loses its power says no last word, and no rank waits for it for half an hour.

A process that dies has its connections closed by its kernel. When the kernel goes as well, or the cable, they stay open: whoever
waits in a collective for that host's bytes waits as long as the process group's timeout allows, and torchrun restarts nobody,
because nobody has failed. So every connection of a trainer is looked at from a thread. One whose other side has acknowledged
nothing for `SILENT_S`, neither data nor the kernel's own question whether it is there, is shut; the collective then fails, the
process with it, and the launcher starts the job again with whom there is.

The kernels of both sides answer each other, so a process that is stopped, swaps or computes for an hour is not silent.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from holdfast.elastic.sensors import announce
from holdfast.snapshot.verdicts import Trouble, Verdict
from holdfast.snapshot.view import Member
from holdfast.snapshot.wire import SILENT_S, keep_alive

LOOK_EVERY_S = 2.0
AT_MOST = 0.005
"""Share of the time that may go into looking: with thousands of connections, it is done less often."""

RETRANSMITS, PROBES = 6, 3
"""So often in a row has the kernel sent the same bytes (12.6 s at least, it waits twice as long each time), or asked."""

SHUT = "connections to it are closed"

_TCP_INFO = struct.Struct("=2x2B52xI")  # linux/tcp.h: tcpi_retransmits, tcpi_probes, …, tcpi_last_ack_recv (ms)


@dataclass(frozen=True, slots=True)
class Wait:
    """What a kernel waits for on one connection: how often it has sent the same bytes, or asked, and since when nothing comes."""

    retransmits: int
    probes: int
    unheard_s: float

    @property
    def is_in_vain(self) -> bool:
        # A receiver that reads nothing for long answers all the same: it says that it has no room.
        return self.unheard_s >= SILENT_S and (self.retransmits >= RETRANSMITS or self.probes >= PROBES)


class Sentry:
    """Looks at this process's TCP connections from when it is built until `close`. Of every silent host a verdict is announced, and
    given to `keep` on the sentry's thread, before connections to it are shut."""

    def __init__(self, keep: Callable[[Verdict], None]) -> None:
        self._keep = keep
        self._ranks: dict[str, list[int]] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="holdfast-sentry", daemon=True)
        self._thread.start()

    def know(self, members: Iterable[Member]) -> None:
        """Whose ranks run where, for the verdicts."""
        ranks: dict[str, list[int]] = {}
        for member in members:
            ranks.setdefault(member.address, []).extend(member.ranks)
        self._ranks = ranks

    @property
    def lost(self) -> list[Verdict]:
        """What was said of hosts that ranks run on."""
        return [verdict for verdict in self._verdicts.values() if verdict.guilty]

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        took_s = 0.0
        while not self._closed.wait(max(LOOK_EVERY_S, took_s / AT_MOST)):
            started = time.monotonic()
            for sock, address in connections():
                with suppress(OSError):
                    keep_alive(sock, 2 * SILENT_S)  # by then it was judged here, with a word
                    if wait_of(sock).is_in_vain:
                        self._judge(address)
                        sock.shutdown(socket.SHUT_RDWR)
            took_s = time.monotonic() - started

    def _judge(self, address: str) -> None:
        if address in self._verdicts:
            return
        silent = f"host {address} has acknowledged nothing for {SILENT_S:.0f} s"
        ranks = tuple(sorted(self._ranks.get(address, ())))
        if ranks:
            verdict = Verdict(Trouble.LEASE, ranks, 0.9, (f"{silent}: it is lost or cut off", SHUT))
        else:  # another interface of a rank's host, or a server of the user's own
            verdict = Verdict(Trouble.LINK, (), 0.5, (f"{silent}; no rank's keeper is known to listen there", SHUT))
        self._verdicts[address] = verdict
        announce(verdict)
        self._keep(verdict)


def connections() -> Iterator[tuple[socket.socket, str]]:
    """This process's TCP connections to other hosts, whoever opened them, with the address of the other side.

    The socket is a duplicate, closed when the next one is asked for.
    """
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with _taken(os.dup(int(name))) as sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                    theirs, ours = sock.getpeername()[0], sock.getsockname()[0]  # fails for one that listens: it is left alone
                    if theirs != ours:
                        yield sock, theirs.removeprefix("::ffff:")


def _taken(fd: int) -> socket.socket:
    """The socket that a descriptor is; where it is none by now, the descriptor is closed."""
    try:
        return socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise


def wait_of(sock: socket.socket) -> Wait:
    """What the kernel says of a connection (tcp(7), TCP_INFO)."""
    retransmits, probes, unheard_ms = _TCP_INFO.unpack_from(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104))
    return Wait(retransmits, probes, unheard_ms / 1000)
