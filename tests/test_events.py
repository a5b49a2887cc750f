"""Events reach whoever asked for them, and nobody who asked can stop a training run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from holdfast import events
from holdfast.events import Event, arm, crash_point, emit, subscribe


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
