"""SIGTERM to a trainer: the keepers get the grace time to make the newest snapshot a checkpoint, then the process ends.

Python runs a handler only when the main thread comes back to it, and a rank that waits in a collective does not. So the signal is
heard through the interpreter's wake-up socket by a thread of its own, which also ends the process where nobody else's handler
would have: a rank that is stuck must not keep its launcher waiting.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class Preemption:
    """From now until `close`, `save` is called once when this process is told to end. Needs the main thread; elsewhere it does
    nothing, and SIGTERM ends the process at once."""

    def __init__(self, save: Callable[[], None], grace_s: float) -> None:
        self._save, self._grace_s = save, grace_s
        self._saved = threading.Event()
        self._once = threading.Lock()
        self._installed = threading.current_thread() is threading.main_thread()
        if not self._installed:
            return
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._others_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        if self._others_fd != -1:  # somebody's event loop listens there already
            signal.set_wakeup_fd(self._others_fd)
        self._previous = signal.signal(signal.SIGTERM, self._handle)
        threading.Thread(target=self._listen, name="holdfast-preemption", daemon=True).start()

    def close(self) -> None:
        if not self._installed:
            return
        self._installed = False
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._previous)
        if self._others_fd == -1:
            signal.set_wakeup_fd(-1)
        self._mouth.close()  # ends the listener

    def _listen(self) -> None:
        with self._ears:
            while heard := self._ears.recv(16):
                if signal.SIGTERM in heard:
                    self._save_once()
                    if self._previous is signal.SIG_DFL:
                        _end()

    def _save_once(self) -> None:
        if not self._once.acquire(blocking=False):
            return
        try:
            self._save()
        except Exception:  # whatever goes wrong, the process was told to end and has to
            logger.exception("the newest snapshot could not be saved before the end")
        finally:
            self._saved.set()

    def _handle(self, number: int, frame: Any) -> None:
        if self._others_fd != -1:
            threading.Thread(target=self._save_once, name="holdfast-preemption", daemon=True).start()
        self._saved.wait(self._grace_s)
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous is signal.SIG_DFL:
            _end()


def _end() -> None:
    """End as SIGTERM ends a process that does not listen; from any thread, whatever the main thread is doing."""
    ctypes.pythonapi.PyOS_setsig(int(signal.SIGTERM), 0)  # signal.signal is for the main thread alone
    os.kill(os.getpid(), signal.SIGTERM)
