"""A connection is given up when its host is gone, and never because the other side is slow. `test_hosts.py` switches hosts off."""

from __future__ import annotations

import socket
import time
from contextlib import suppress

import pytest

from holdfast.elastic import silence
from holdfast.elastic.silence import Sentry, Wait, connections, wait_of
from holdfast.snapshot import wire
from holdfast.snapshot.verdicts import Trouble, Verdict
from holdfast.snapshot.view import Member
from holdfast.snapshot.wire import keep_alive

HERE, THERE = "127.0.0.1", "127.0.0.2"  # on Linux, all of 127/8 is this host


@pytest.fixture
def pair():
    """A connection between two addresses."""
    with socket.create_server((THERE, 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        theirs, _ = listener.accept()
        with theirs:
            yield ours, theirs


@pytest.mark.parametrize(
    ("wait", "in_vain"),
    [
        (Wait(0, 0, 3600.0), False),  # nothing was said for an hour, and nothing is waited for
        (Wait(5, 0, 21.0), False),
        (Wait(6, 0, 19.0), False),
        (Wait(6, 0, 20.0), True),
        (Wait(0, 2, 20.0), False),
        (Wait(0, 3, 20.0), True),
    ],
)
def test_a_host_is_silent_when_the_kernel_has_asked_often_and_long(wait, in_vain):
    assert wait.is_in_vain is in_vain


def test_connections_to_other_hosts_are_found_and_nothing_else(pair):
    ours, theirs = pair
    with socket.create_server((HERE, 0)) as listener, socket.create_connection(listener.getsockname()):
        found = [(sock.getsockname(), address) for sock, address in connections()]
    assert (ours.getsockname(), THERE) in found
    assert (theirs.getsockname(), HERE) in found
    assert not [address for own, address in found if own[0] == address]
    ours.sendall(b"still open")
    assert theirs.recv(10) == b"still open"


def test_a_peer_that_reads_nothing_is_not_silent(pair, monkeypatch):
    monkeypatch.setattr(wire, "ASK_EVERY_S", 1.0)
    monkeypatch.setattr(silence, "SILENT_S", 1.0)
    ours, _ = pair
    keep_alive(ours)
    ours.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            ours.send(bytes(1 << 20))
    time.sleep(3)
    wait = wait_of(ours)
    assert wait.unheard_s > 0
    assert not wait.is_in_vain


@pytest.mark.parametrize(("ranks", "trouble"), [((2, 3), Trouble.LEASE), ((), Trouble.LINK)])
def test_a_silent_host_is_named_by_its_ranks_and_a_server_of_the_users_own_ends_no_run(pair, monkeypatch, ranks, trouble):
    monkeypatch.setattr(silence, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(silence, "wait_of", lambda _: Wait(6, 0, 20.0))
    kept: list[Verdict] = []
    sentry = Sentry(kept.append)
    sentry.know(
        [Member(node, "host", address, 1, "token", "/dev/shm", ranks, "") for node, address in enumerate((HERE, THERE))]
    )
    try:
        assert [sock.recv(1) for sock in pair] == [b"", b""], "it is shut"
    finally:
        sentry.close()
    assert {(verdict.trouble, verdict.guilty) for verdict in kept} == {(trouble, ranks)}
    assert sentry.lost == (kept if ranks else [])
