"""A trainer's or spare's line to its launcher: messages both ways, and the page with its pulse. Knows nothing of torch."""

from __future__ import annotations

import mmap
import socket
import sys
from pathlib import Path

from holdfast.environment import Berth

RESTART = 75
"""Exit code of a trainer that cannot be replaced in place: the launcher ends too, and torchrun restarts all processes."""


class RestartNeeded(Exception):
    """Recovery in place is not possible; every process has to start again."""


class Post:
    """This process's side of its launcher: messages both ways, and the page with its pulse."""

    def __init__(self, berth: Berth) -> None:
        self.role, self.cradle = berth.role, berth.cradle
        self._channel = socket.socket(fileno=berth.channel)
        self._page = mmap.mmap(berth.pulse, mmap.PAGESIZE)
        self._pulse = memoryview(self._page).cast("Q")
        self._transcript = Path(f"/proc/self/fd/{berth.transcript}")
        self._waiting = berth.role in ("ready", "import")
        self._is_fresh = False

    def tell(self, message: str) -> None:
        try:
            self._channel.sendall(f"{message}\n".encode())
        except OSError:
            sys.exit("the launcher is gone")

    def entered(self) -> None:
        """The run is entered, for the first time or after a recovery."""
        self._is_fresh = True
        self.tell("running")

    def completed(self, step: int) -> None:
        self._pulse[0] = step
        if self._is_fresh:
            self._is_fresh = False
            self.tell("stepping")

    def keep(self, heard: bytes) -> None:
        """Leave with the launcher what this trainer heard from other ranks before it entered protect()."""
        self._transcript.write_bytes(heard)

    def kept(self) -> bytes:
        """What the rank's first trainer has left; empty where none has."""
        return self._transcript.read_bytes()

    def await_call(self) -> int:
        """Block until the launcher calls, and return the epoch that it calls for; 0 at once where this process need not wait."""
        if not self._waiting:
            return 0
        self._waiting = False
        self.tell("ready")
        called = self._channel.recv(64)
        return int(called) if called else sys.exit(0)


active: Post | None = None
"""This process's line to its launcher, where one has started it."""
