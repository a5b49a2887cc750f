"""Events reach whoever asked for them, and nobody who asked can stop a training run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import events
from holdfast.events import Event, arm, arm_from_text, crash_point, emit, subscribe, to_tensorboard


@pytest.fixture(autouse=True)
def nobody_listens() -> Iterator[None]:
    yield
    events._callbacks.clear()
    arm(None)


def test_every_subscriber_gets_every_event_in_order() -> None:
    first: list[Event] = []
    second: list[Event] = []
    subscribe(first.append)
    subscribe(second.append)
    emit("snapshot.committed", step=3, wall_s=0.5)
    emit("snapshot.committed", step=4, wall_s=0.25)
    assert [(event.name, dict(event.fields)) for event in first] == [
        ("snapshot.committed", {"step": 3, "wall_s": 0.5}),
        ("snapshot.committed", {"step": 4, "wall_s": 0.25}),
    ]
    assert first == second
    assert first[0].time_s <= first[1].time_s


def test_an_event_without_listeners_costs_nothing_and_is_not_kept() -> None:
    emit("snapshot.committed", step=3)
    seen: list[Event] = []
    subscribe(seen.append)
    assert seen == []


def test_nothing_arrives_after_the_subscription_has_ended() -> None:
    seen: list[Event] = []
    unsubscribe = subscribe(seen.append)
    unsubscribe()
    unsubscribe()
    emit("snapshot.committed", step=3)
    assert seen == []


def test_a_subscriber_may_end_its_subscription_while_it_is_called() -> None:
    seen: list[str] = []

    def once(event: Event) -> None:
        seen.append(event.name)
        unsubscribe()

    unsubscribe = subscribe(once)
    after: list[Event] = []
    subscribe(after.append)
    emit("one")
    emit("two")
    assert seen == ["one"]
    assert [event.name for event in after] == ["one", "two"]


def test_a_subscriber_that_raises_is_logged_and_dropped_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def broken(event: Event) -> None:
        calls.append(event.name)
        raise RuntimeError("dashboard is down")

    subscribe(broken)
    seen: list[Event] = []
    subscribe(seen.append)
    with caplog.at_level(logging.ERROR, logger="holdfast.events"):
        emit("one")
        emit("two")
    assert calls == ["one"]
    assert [event.name for event in seen] == ["one", "two"]
    assert "failed on one and was dropped" in caplog.text
    assert "dashboard is down" in caplog.text


def test_crash_points_call_the_handler_while_it_is_armed_and_only_then() -> None:
    passed: list[str] = []
    crash_point("snapshot.filled")
    arm(passed.append)
    crash_point("snapshot.verified")
    arm(None)
    crash_point("snapshot.encoded")
    assert passed == ["snapshot.verified"]


def test_what_the_handler_raises_breaks_the_protocol_at_that_point() -> None:
    def handler(name: str) -> None:
        raise ConnectionResetError(name)

    arm(handler)
    with pytest.raises(ConnectionResetError, match=r"snapshot\.verified"):
        crash_point("snapshot.verified")


def test_tensorboard_gets_every_number_at_its_step() -> None:
    drawn: list[tuple[object, ...]] = []

    class Writer:
        def add_scalar(self, name: str, value: float, step: int | None, walltime: float) -> None:
            drawn.append((name, value, step))

    subscribe(to_tensorboard(Writer()))
    emit("snapshot.captured", rank=1, step=7, seconds=0.25, taken=True, job="run")
    emit("scrub.done", nbytes=5)
    assert drawn == [
        ("holdfast/snapshot.captured/rank", 1, 7),
        ("holdfast/snapshot.captured/seconds", 0.25, 7),
        ("holdfast/snapshot.captured/taken", True, 7),
        ("holdfast/scrub.done/nbytes", 5, None),
    ]


# -- armed processes ---------------------------------------------------------------------------------------------------


def armed(tmp_path: Path, *faults: dict[str, object], role: str = "keeper", place: int = 1) -> int:
    """What becomes of a process that passes the point "p" four times; how often it got past is left in a file."""
    schedule = json.dumps(faults)
    code = (
        "from holdfast.events import *; from pathlib import Path\n"
        f"arm_from_text({schedule!r}, role={role!r}, place={place})\n"
        f"for number in range(4): Path({str(tmp_path / 'passed')!r}).write_text(str(number)); crash_point('p')"
    )
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode


def test_a_process_is_killed_at_the_pass_that_the_schedule_names(tmp_path: Path) -> None:
    assert armed(tmp_path, {"at": "p", "role": "keeper", "place": 1, "nth": 3}) == -9
    assert (tmp_path / "passed").read_text() == "2"


def test_a_schedule_for_others_arms_nobody(tmp_path: Path) -> None:
    others = [{"at": "p", "role": "trainer"}, {"at": "p", "role": "keeper", "place": 2}, {"at": "q", "role": "keeper"}]
    assert armed(tmp_path, *others) == 0
    assert (tmp_path / "passed").read_text() == "3"


def test_whoever_finds_the_mark_is_spared_and_the_mark_says_who_was_not(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    fault = {"at": "p", "role": "keeper", "once": str(mark)}
    assert armed(tmp_path, fault) == -9
    assert int(mark.read_text()) > 1
    assert armed(tmp_path, fault) == 0


def test_a_stopped_process_goes_on_after_its_seconds(tmp_path: Path) -> None:
    assert armed(tmp_path, {"at": "p", "role": "keeper", "do": "stop", "seconds": 0.2}) == 0
    assert (tmp_path / "passed").read_text() == "3"


def test_a_delay_is_suffered_as_often_as_the_schedule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("holdfast.events.time.sleep", slept.append)
    arm_from_text('[{"at": "p", "role": "keeper", "do": "delay", "seconds": 3, "nth": 2, "times": 2}]', role="keeper", place=0)
    for _ in range(6):
        crash_point("p")
    assert slept == [3, 3]
    arm_from_text('[{"at": "p", "role": "keeper", "do": "delay", "seconds": 1, "times": 0}]', role="keeper", place=0)
    for _ in range(6):
        crash_point("p")
    assert slept[2:] == [1] * 6
