"""One callback for progress, metrics and incidents, and the named points where a rehearsal may break things.

Whoever wants numbers subscribes; holdfast itself only emits. A subscriber that raises is logged and dropped, because a broken
dashboard must not stop a training run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
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


def to_tensorboard(writer: Any) -> Callback:
    """A callback for `subscribe` that draws every number of every event with a torch SummaryWriter, by step where there is one.

    `holdfast.subscribe(holdfast.events.to_tensorboard(SummaryWriter("runs/exp1")))`
    """

    def draw(event: Event) -> None:
        step = event.fields.get("step")
        for name, value in event.fields.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(f"holdfast/{event.name}/{name}", value, step, walltime=event.time_s)

    return draw


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
    """Arm this process with a schedule: [{"do": …, "at": point, "role": "keeper" or "trainer", "place": node or rank, …}, …].

    "do" is "kill" (the default: SIGKILL, as an out-of-memory killer would), "stop" (SIGSTOP; with "seconds" it is continued
    after that long, else somebody else has to) or "delay" (sleep for "seconds"). It happens when the process passes the point
    for the "nth" time (1), and at the "times" - 1 passes after that (1; 0 is for ever). With "once": path, that file is made
    first, with the process id in it, and whoever finds it there is spared: the successor does not suffer the same.

    `holdfast.elastic.faults` builds such schedules.
    """
    mine = [item for item in json.loads(schedule) if item["role"] == role and item.get("place", place) == place]
    passed: dict[str, int] = {}

    def handler(name: str) -> None:
        passed[name] = passed.get(name, 0) + 1
        for item in mine:
            if item["at"] == name and _is_due(item, passed[name]) and _first_to(item.get("once")):
                logger.warning("rehearsal: %s %d passes %s: %s", role, place, name, item.get("do", "kill"))
                _suffer(item.get("do", "kill"), item.get("seconds"))

    if mine:
        arm(handler)


def _is_due(item: Mapping[str, Any], passes: int) -> bool:
    first, times = item.get("nth", 1), item.get("times", 1)
    return bool(passes >= first and (times == 0 or passes < first + times))


def _first_to(path: str | None) -> bool:
    """True for one process only: the file appears whole, so that who finds it can read whose it is."""
    if path is None:
        return True
    mine = f"{path}.{os.getpid()}"
    with open(mine, "w") as file:
        file.write(str(os.getpid()))
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(mine)
    return True


def _suffer(do: str, seconds: float | None) -> None:
    if do == "delay":
        time.sleep(seconds or 0.0)
        return
    if do == "stop" and seconds is not None:
        waking = f"sleep {float(seconds)}; kill -CONT {os.getpid()}"
        subprocess.Popen(["/bin/sh", "-c", waking], start_new_session=True).returncode = 0  # nobody waits for it
    os.kill(os.getpid(), signal.SIGSTOP if do == "stop" else signal.SIGKILL)
