"""Messages between keepers, and between a trainer and its keeper: a small JSON header and, where there are any, raw bytes.

A frame is two big-endian 32-bit lengths, the header and the payload. Both lengths are bounded before anything is allocated, a
TCP connection has to show the keeper's token first, and nothing that arrives is ever executed or unpickled.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from holdfast.errors import ClusterError, HoldfastError, KeeperUnreachable, error_named

logger = logging.getLogger(__name__)

HEADER_LIMIT = 64 << 20
PAYLOAD_LIMIT = 1 << 30
CLOSING_S = 2.0
SILENT_S = 20.0
"""A host whose kernel has acknowledged nothing for so long is lost. torchrun forgets an agent after 15 s."""

ASK_EVERY_S = 5.0
"""How often the kernel asks the other side of an idle connection whether it is there."""

STRANGER_LIMIT = 4096
"""Longest frame of somebody who has not shown the token yet."""

_LENGTHS = struct.Struct("!II")

Header = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FileRange:
    """A payload that the kernel takes from a file: no byte of it passes through this process. `fd` is closed once it is sent."""

    fd: int
    offset: int
    nbytes: int

    def __len__(self) -> int:
        return self.nbytes

    def send(self, sock: socket.socket) -> None:
        sent = 0
        while sent < self.nbytes:
            count = os.sendfile(sock.fileno(), self.fd, self.offset + sent, self.nbytes - sent)
            if count == 0:  # the file is shorter than was said; what follows would be taken for these bytes
                raise EOFError("a slot shrank while it was sent")
            sent += count

    def close(self) -> None:
        os.close(self.fd)


Payload = memoryview | bytes | FileRange
Reply = tuple[Header, Payload]
Handler = Callable[[str, Header, memoryview], Reply | Header | None]


# -- frames ------------------------------------------------------------------------------------------------------------


def send_frame(sock: socket.socket, header: Header, payload: Payload = b"") -> None:
    body = json.dumps(header, separators=(",", ":")).encode()
    more = socket.MSG_MORE if len(payload) else 0  # one segment fewer, and one waking up of the receiver
    sock.sendall(_LENGTHS.pack(len(body), len(payload)) + body, more)
    if isinstance(payload, FileRange):
        payload.send(sock)
    elif len(payload):
        sock.sendall(payload)


def receive_frame(
    sock: socket.socket, out: memoryview | None = None, *, limits: tuple[int, int] = (HEADER_LIMIT, PAYLOAD_LIMIT)
) -> tuple[Header, memoryview]:
    """The next frame; a payload that fits lands in `out`. Raises EOFError when the other side has closed."""
    header_nbytes, payload_nbytes = _LENGTHS.unpack(_receive_exactly(sock, memoryview(bytearray(_LENGTHS.size))))
    if header_nbytes > limits[0] or payload_nbytes > limits[1]:
        raise ClusterError(
            f"a peer announced a frame of {header_nbytes} + {payload_nbytes} bytes; it does not speak our protocol"
        )
    try:
        header = json.loads(bytes(_receive_exactly(sock, memoryview(bytearray(header_nbytes)))))
    except (ValueError, RecursionError) as error:
        raise ClusterError(f"a peer sent a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ClusterError("a peer sent a header that is not a JSON object")
    fits = out is not None and len(out) >= payload_nbytes
    target = out[:payload_nbytes] if out is not None and fits else memoryview(bytearray(payload_nbytes))
    return header, _receive_exactly(sock, target)


def _receive_exactly(sock: socket.socket, out: memoryview) -> memoryview:
    have = 0
    while have < len(out):
        count = sock.recv_into(out[have:], 0, socket.MSG_WAITALL)
        if count == 0:
            raise EOFError("connection closed")
        have += count
    return out


# -- the asking side ---------------------------------------------------------------------------------------------------


class Connection:
    """One request at a time to one keeper. Any failure of the transport closes it and raises KeeperUnreachable.

    An error that the keeper itself raised arrives as the same class of holdfast.errors with the same words.
    """

    def __init__(self, address: str | tuple[str, int], token: str, *, timeout_s: float = 60.0) -> None:
        self.address, self._timeout_s = address, timeout_s
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        self._lock = threading.Lock()
        try:
            self._sock.settimeout(timeout_s)
            self._sock.connect(address)
            if family == socket.AF_INET:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                keep_alive(self._sock)
            _let_the_kernel_wait(self._sock, timeout_s)
        except OSError as error:
            self._sock.close()
            raise KeeperUnreachable(f"no keeper answers at {_text(address)} ({error})") from error
        try:
            self.ask("auth", token=token)
        except HoldfastError:
            self.close()
            raise

    def send(self, verb: str, **fields: Any) -> None:
        """Send a request without waiting; its answer comes with `receive`, in the order of requests.

        For one thread, and never beside `ask`.
        """
        try:
            send_frame(self._sock, {"verb": verb, **fields})
        except OSError as error:
            raise self._gone(verb, error) from error

    def receive(self, out: memoryview) -> tuple[Header, memoryview]:
        """The answer to the oldest request that has none yet. After an error the connection is of no more use."""
        try:
            header, body = receive_frame(self._sock, out)
        except (OSError, EOFError, ClusterError) as error:
            raise self._gone("receive", error) from error
        if "error" in header:
            self.close()
            raise (error_named(header["error"]) or ClusterError)(header["message"])
        return header, body

    def _gone(self, verb: str, error: Exception) -> KeeperUnreachable:
        self.close()
        what = f"no answer for {self._timeout_s:.0f} s" if isinstance(error, BlockingIOError) else error
        return KeeperUnreachable(f"the keeper at {_text(self.address)} went away during {verb!r} ({what})")

    def ask(self, verb: str, payload: memoryview | bytes = b"", *, out: memoryview | None = None, **fields: Any) -> Any:
        """Send a request, wait for its answer; returns the header, or (header, payload) where the answer has bytes."""
        with self._lock:
            try:
                send_frame(self._sock, {"verb": verb, **fields}, payload)
                header, body = receive_frame(self._sock, out)
            except (OSError, EOFError, ClusterError) as error:
                raise self._gone(verb, error) from error
        if "error" in header:
            raise (error_named(header["error"]) or ClusterError)(header["message"])
        return (header, body) if len(body) else header

    def has_ended(self, stop: threading.Event, seconds: float) -> bool:
        """Block until the other side hangs up, `stop` is set, or so many seconds have passed; True unless it was the last.

        Ask nothing over a connection that is watched.
        """
        self._sock.settimeout(min(0.5, seconds))
        deadline = time.monotonic() + seconds
        while not stop.is_set():
            try:
                if not self._sock.recv(1):
                    return True
            except TimeoutError:
                if time.monotonic() > deadline:
                    return False
            except OSError:
                return True
        return True

    def close(self) -> None:
        self._sock.close()


def _let_the_kernel_wait(sock: socket.socket, timeout_s: float) -> None:
    """Time out in the kernel. Python's own timeouts make a socket non-blocking, and every few packets would wake us up."""
    sock.settimeout(None)
    limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, direction, limit)


def keep_alive(sock: socket.socket, patience_s: float = SILENT_S) -> None:
    """Have the kernel close an idle TCP connection whose other side is gone without a word, in `patience_s`.

    Never by TCP_USER_TIMEOUT: that also ends the connection to a peer that lives and does not read for so long.
    """
    times = int(patience_s / ASK_EVERY_S) - 1
    is_on = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    if is_on and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == times:
        return  # setting it anew would have the kernel ask at once, and count that
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, times)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(ASK_EVERY_S))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(ASK_EVERY_S))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _text(address: str | tuple[str, int]) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


# -- the answering side ------------------------------------------------------------------------------------------------


class Server:
    """Answers every connection on its own thread with `handler(verb, header, payload)` until closed.

    A connection whose first frame is not the right token is closed. `on_close(connection_id)` tells which one ended.
    """

    def __init__(
        self, listeners: list[socket.socket], token: str, handler: Handler, on_close: Callable[[int], None] | None = None
    ) -> None:
        self._listeners, self._token, self._handler, self._on_close = listeners, token, handler, on_close
        self._open: set[socket.socket] = set()
        self._closed = threading.Event()
        for listener in listeners:
            threading.Thread(target=self._accept, args=(listener,), name="holdfast-accept", daemon=True).start()

    def close(self) -> None:
        """Take no more requests. Those under way are answered, for which they have a moment; then their threads hang up."""
        self._closed.set()
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes a thread that blocks in accept or recv; close alone does not
            listener.close()
        for sock in tuple(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RD)
        deadline = time.monotonic() + CLOSING_S
        while self._open and time.monotonic() < deadline:
            time.sleep(0.002)

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), name="holdfast-serve", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                if sock.family == socket.AF_INET:
                    # An answer is a header, then its bytes: with Nagle's rule each would wait 40 ms for an acknowledgement.
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    keep_alive(sock)
                header, _ = receive_frame(sock, limits=(STRANGER_LIMIT, 0))
                if header.get("verb") != "auth" or not _same(str(header.get("token", "")), self._token):
                    send_frame(sock, {"error": "ClusterError", "message": "wrong token: this keeper belongs to another run"})
                    return
                send_frame(sock, {})
                while not self._closed.is_set():
                    self._answer(sock, *receive_frame(sock))
        except (OSError, EOFError):
            pass
        except ClusterError as error:
            logger.warning("closed a connection: %s", error)
        finally:
            self._open.discard(sock)
            if self._on_close is not None:
                self._on_close(id(sock))

    def _answer(self, sock: socket.socket, header: Header, payload: memoryview) -> None:
        verb = str(header.pop("verb", ""))
        header["connection"] = id(sock)
        try:
            reply = self._handler(verb, header, payload)
        except HoldfastError as error:
            reply = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:  # whatever went wrong here, the peer is told, and can still ask for other things
            logger.exception("request %r could not be answered", verb)
            reply = {"error": "ClusterError", "message": f"the keeper could not answer {verb!r}: {error!r}"}
        fields, body = reply if isinstance(reply, tuple) else (reply or {}, b"")
        try:
            send_frame(sock, fields, body)
        finally:
            if isinstance(body, FileRange):
                body.close()


def _same(token: str, expected: str) -> bool:
    return hmac.compare_digest(token.encode(errors="replace"), expected.encode())
