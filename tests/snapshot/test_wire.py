"""Frames between processes: what is sent arrives, what does not speak our protocol is shown out, and every failure has a name."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import ClusterError, ConfigError, CorruptData, HoldfastError, KeeperUnreachable, StaleEpoch
from holdfast.snapshot.wire import HEADER_LIMIT, PAYLOAD_LIMIT, Connection, Header, Server, receive_frame, send_frame

TOKEN = "a token"
LENGTHS = struct.Struct("!II")


def answer(verb: str, fields: Header, payload: memoryview) -> Any:
    """A keeper in small: echo, some errors, nothing."""
    match verb:
        case "echo":
            return {"fields": {k: v for k, v in fields.items() if k != "connection"}}, payload
        case "nothing":
            return None
        case "raise":
            kinds = {
                kind.__name__: kind
                for kind in (ConfigError, CorruptData, StaleEpoch, KeyError, TypeError, OSError, RuntimeError)
            }
            raise kinds[fields["kind"]](fields["message"])
        case "odd":
            raise type("FromTheFuture", (HoldfastError,), {})("new in the next release")
    raise ClusterError(f"no verb {verb}")


class Peer:
    """A real server on a UNIX socket and a TCP port, which notes every connection that ends."""

    def __init__(self, place: Path, handler: Callable[..., Any] = answer) -> None:
        local = socket.socket(socket.AF_UNIX)
        local.bind(str(place / "s"))
        network = socket.socket(socket.AF_INET)
        network.bind(("127.0.0.1", 0))
        for listener in (local, network):
            listener.listen()
        self.unix, self.tcp = str(place / "s"), network.getsockname()
        self.ended = threading.Semaphore(0)
        self.server = Server([local, network], TOKEN, handler, lambda _: self.ended.release())

    def raw(self, *frames: bytes) -> socket.socket:
        sock = socket.create_connection(self.tcp)
        sock.settimeout(30)
        for frame in frames:
            sock.sendall(frame)
        return sock


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return LENGTHS.pack(len(header), len(payload)) + header + payload


AUTH = frame(json.dumps({"verb": "auth", "token": TOKEN}).encode())


@pytest.fixture
def peer(shm: Path) -> Iterator[Peer]:
    made = Peer(shm)
    yield made
    made.server.close()


@pytest.fixture(params=["unix", "tcp"])
def connection(request: pytest.FixtureRequest, peer: Peer) -> Iterator[Connection]:
    made = Connection(getattr(peer, request.param), TOKEN, timeout_s=30)
    yield made
    made.close()


# -- what goes well ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 65536, (1 << 20) + 1, 9 << 20])
def test_payloads_arrive_as_they_were_sent(connection: Connection, nbytes: int) -> None:
    payload = os.urandom(nbytes)
    reply = connection.ask("echo", payload, text="ä\0", number=2**60, nested=[{"a": None}])
    header, body = reply if nbytes else (reply, b"")
    assert header == {"fields": {"text": "ä\0", "number": 2**60, "nested": [{"a": None}]}}
    assert bytes(body) == payload


def test_a_payload_lands_in_the_buffer_that_was_given_for_it(connection: Connection) -> None:
    payload = os.urandom(3 << 20)
    room = bytearray(4 << 20)
    _, body = connection.ask("echo", payload, out=memoryview(room))
    assert body.obj is room
    assert room[: len(payload)] == payload
    _, body = connection.ask("echo", payload, out=memoryview(room)[: 1 << 20])
    assert body.obj is not room, "a buffer that is too small is left alone"
    assert bytes(body) == payload


def test_an_answer_without_words_is_an_empty_header(connection: Connection) -> None:
    assert connection.ask("nothing") == {}


def test_threads_may_share_a_connection_and_each_gets_its_own_answer(connection: Connection) -> None:
    wrong: list[int] = []

    def talk(number: int) -> None:
        for turn in range(20):
            payload = bytes([number]) * (1 + 997 * turn)
            header, body = connection.ask("echo", payload, number=number)
            if header["fields"]["number"] != number or bytes(body) != payload:
                wrong.append(number)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ConfigError, CorruptData, StaleEpoch])
def test_an_error_of_ours_survives_the_wire_as_its_own_class_with_its_words(
    connection: Connection, kind: type[HoldfastError]
) -> None:
    with pytest.raises(kind, match=r"^step 5: é$") as caught:
        connection.ask("raise", kind=kind.__name__, message="step 5: é")
    assert type(caught.value) is kind
    assert connection.ask("nothing") == {}, "and the connection goes on"


def test_an_error_of_a_class_that_this_release_does_not_know_is_a_cluster_error(connection: Connection) -> None:
    with pytest.raises(ClusterError, match="new in the next release"):
        connection.ask("odd")


@pytest.mark.parametrize("kind", ["KeyError", "TypeError", "OSError", "RuntimeError"])
def test_a_fault_of_the_keeper_is_answered_and_does_not_end_the_connection(
    connection: Connection, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ClusterError, match=r"could not answer 'raise'.*boom") as caught:
        connection.ask("raise", kind=kind, message="boom")
    assert type(caught.value) is ClusterError
    assert connection.ask("nothing") == {}
    assert "could not be answered" in caplog.text


# -- who is not let in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "another token", "schlüssel", "\ud800"])
def test_a_wrong_token_is_refused(peer: Peer, token: str) -> None:
    with pytest.raises(ClusterError, match="wrong token"):
        Connection(peer.tcp, token, timeout_s=30)
    assert peer.ended.acquire(timeout=30)


def test_whoever_asks_before_showing_a_token_is_not_answered(peer: Peer) -> None:
    with peer.raw(frame(b'{"verb":"echo"}', b"x")) as sock:
        with suppress(ClusterError, EOFError, ConnectionError):
            header, _ = receive_frame(sock)
            assert header["error"] == "ClusterError"
        assert peer.ended.acquire(timeout=30)


def test_a_stranger_cannot_make_the_keeper_take_memory(peer: Peer) -> None:
    """Before the token only a small frame is read: the announcement of a large one ends the connection at once."""
    with peer.raw(LENGTHS.pack(60, PAYLOAD_LIMIT)) as sock:
        assert peer.ended.acquire(timeout=30)
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "garbage",
    [
        LENGTHS.pack(HEADER_LIMIT + 1, 0),
        LENGTHS.pack(2, PAYLOAD_LIMIT + 1),
        LENGTHS.pack(2**32 - 1, 2**32 - 1),
        b"GET / HTTP/1.1\r\nHost: keeper\r\n\r\n",
        frame(b"not json"),
        frame(b"\xff\xfe\x00"),
        frame(b"[1, 2]"),
        frame(b""),
        frame(b"[" * 200_000),
    ],
    ids=["header too long", "payload too long", "both", "http", "no json", "no text", "no object", "empty", "deep"],
)
@pytest.mark.parametrize("known", [False, True], ids=["stranger", "after the token"])
def test_garbage_ends_its_connection_and_no_other(peer: Peer, garbage: bytes, known: bool) -> None:
    with peer.raw(AUTH if known else b"") as sock:
        if known:
            assert receive_frame(sock)[0] == {}
        with suppress(ConnectionError):  # the keeper may hang up before all of it is sent
            sock.sendall(garbage)
        assert peer.ended.acquire(timeout=30)
    other = Connection(peer.tcp, TOKEN, timeout_s=30)
    assert other.ask("nothing") == {}
    other.close()


def test_a_peer_that_leaves_in_the_middle_of_a_frame_is_forgotten(peer: Peer) -> None:
    peer.raw(AUTH, LENGTHS.pack(2, 1 << 20), b"{}", b"x" * 1000).close()
    assert peer.ended.acquire(timeout=30)


# -- when the keeper goes --------------------------------------------------------------------------------------------------


def test_nobody_listening_is_an_unreachable_keeper(shm: Path) -> None:
    with pytest.raises(KeeperUnreachable, match="no keeper answers at"):
        Connection(str(shm / "nobody"), TOKEN)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(KeeperUnreachable, match="no keeper answers at 127"):
            Connection(bound.getsockname(), TOKEN)


@pytest.mark.parametrize(
    "last_words",
    [b"", LENGTHS.pack(20, 100)[:3], LENGTHS.pack(20, 0) + b'{"a"', LENGTHS.pack(2, 100) + b"{}" + b"x" * 50, b"\xff" * 8],
)
def test_a_keeper_that_dies_within_its_answer_is_unreachable(last_words: bytes) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def keeper() -> None:
        sock, _ = listener.accept()
        with sock:
            receive_frame(sock)
            send_frame(sock, {})
            receive_frame(sock)
            sock.sendall(last_words)

    thread = threading.Thread(target=keeper)
    thread.start()
    connection = Connection(listener.getsockname(), TOKEN, timeout_s=30)
    with pytest.raises(KeeperUnreachable, match="went away during 'ping'"):
        connection.ask("ping")
    with pytest.raises(KeeperUnreachable):
        connection.ask("ping")
    thread.join()
    listener.close()


def test_closing_the_server_ends_its_connections(peer: Peer, connection: Connection) -> None:
    assert connection.ask("nothing") == {}
    peer.server.close()
    assert peer.ended.acquire(timeout=30)
    with pytest.raises(KeeperUnreachable):
        connection.ask("nothing")
    with pytest.raises(KeeperUnreachable):
        Connection(peer.tcp, TOKEN, timeout_s=30)


def test_a_request_under_way_is_answered_before_the_server_closes(shm: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(verb: str, fields: Header, payload: memoryview) -> Header:
        begun.set()
        assert go_on.wait(30)
        return {"said": "all"}

    peer = Peer(shm, slow)
    connection = Connection(peer.unix, TOKEN, timeout_s=30)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(connection.ask("slow")))
    asking.start()
    assert begun.wait(30)
    closing = threading.Thread(target=peer.server.close)
    closing.start()
    go_on.set()
    asking.join()
    closing.join()
    assert answers == [{"said": "all"}]
    connection.close()


def test_refused_connections_are_said_in_the_log(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), peer.raw(AUTH, LENGTHS.pack(HEADER_LIMIT + 1, 0)):
        assert peer.ended.acquire(timeout=30)
    assert "does not speak our protocol" in caplog.text
