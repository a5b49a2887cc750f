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
        self.role = berth.role
        self._channel = socket.socket(fileno=berth.channel)
        self._page = mmap.mmap(berth.pulse, mmap.PAGESIZE)
        self._pulse = memoryview(self._page).cast("Q")
        self._transcript = Path(f"/proc/self/fd/{berth.transcript}")
        self._waiting = berth.role in ("ready", "import")

    def tell(self, message: str) -> None:
        try:
            self._channel.sendall(f"{message}\n".encode())
        except OSError:
            sys.exit("the launcher is gone")

    def completed(self, step: int) -> None:
        self._pulse[0] = step

    def keep(self, heard: bytes) -> None:
        """Leave with the launcher what this trainer heard from other ranks before it entered protect()."""
        self._transcript.write_bytes(heard)

    def kept(self) -> bytes:
        """What the rank's first trainer has left; empty where none has."""
        return self._transcript.read_bytes()

    def await_call(self) -> None:
        """Block until the launcher calls; returns at once where this process need not wait."""
        if self._waiting:
            self._waiting = False
            self.tell("ready")
            if self._channel.recv(64) != b"go\n":
                sys.exit(0)


active: Post | None = None
"""This process's line to its launcher, where one has started it."""
