"""One callback for progress, metrics and incidents, and the named points where a rehearsal may break things.

Whoever wants numbers subscribes; holdfast itself only emits. A subscriber that raises is logged and dropped, because a broken
dashboard must not stop a training run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: `name` like "snapshot.committed", with its numbers in `fields` (units ride in the names)."""

    name: str
    fields: Mapping[str, Any]
    time_s: float = field(default_factory=time.time)


Callback = Callable[[Event], None]
_callbacks: list[Callback] = []


def subscribe(callback: Callback) -> Callable[[], None]:
    """Call `callback` for every event of this process from now on; returns the function that ends it."""
    _callbacks.append(callback)

    def unsubscribe() -> None:
        if callback in _callbacks:
            _callbacks.remove(callback)

    return unsubscribe


def emit(name: str, **fields: Any) -> None:
    """Tell every subscriber; blocks for as long as they take."""
    if not _callbacks:
        return
    event = Event(name, fields)
    for callback in tuple(_callbacks):
        try:
            callback(event)
        except Exception:
            logger.exception("event callback %r failed on %s and was dropped", callback, name)
            if callback in _callbacks:
                _callbacks.remove(callback)


# -- crash points ------------------------------------------------------------------------------------------------------

_armed: Callable[[str], None] | None = None


def crash_point(name: str) -> None:
    """A named place in a protocol; free until `arm` has set a handler, which may then kill, delay or damage."""
    if _armed is not None:
        _armed(name)


def arm(handler: Callable[[str], None] | None) -> None:
    """Call `handler(name)` at every crash point of this process; None disarms."""
    global _armed
    _armed = handler


def arm_from_text(schedule: str, *, role: str, place: int) -> None:
    """Arm this process with a schedule: [{"at": point, "role": "keeper" or "trainer", "place": node or rank, "nth": n}, …].

    The process is killed with SIGKILL, as an out-of-memory killer would, when it passes the point for the nth time. With
    "once": path, that file is made first, and whoever finds it there lives: the successor is not killed again.
    """
    mine = [item for item in json.loads(schedule) if item["role"] == role and item.get("place", place) == place]
    passed: dict[str, int] = {}

    def handler(name: str) -> None:
        passed[name] = passed.get(name, 0) + 1
        due = [item for item in mine if item["at"] == name and item.get("nth", 1) == passed[name]]
        if any(_first_to(item.get("once")) for item in due):
            logger.warning("rehearsal: %s %d is killed at %s", role, place, name)
            os.kill(os.getpid(), signal.SIGKILL)

    if mine:
        arm(handler)


def _first_to(path: str | None) -> bool:
    if path is None:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
