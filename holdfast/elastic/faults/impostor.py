"""A process at a keeper's address that is no keeper: `python -m holdfast.elastic.faults.impostor SOCKET HOST PORT`.

It answers everything with noise, framed well enough to be read as a frame half of the time.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path

FRAMES = struct.Struct("!II")


def noise(source: random.Random) -> bytes:
    """Bytes that are no answer: no frame at all, a frame of no JSON, JSON of the wrong shape, or lengths beyond reason."""
    junk = source.randbytes(source.randrange(1, 300))
    wrong = b'{"committed": -1, "crc32c": "x", "slots": 7, "epoch": 18446744073709551616}'
    return source.choice(
        [junk, FRAMES.pack(len(junk), 0) + junk, FRAMES.pack(len(wrong), 5) + wrong + b"12345", FRAMES.pack(2**31, 2**31)]
    )


def serve(listener: socket.socket, source: random.Random) -> None:
    while True:
        peer, _ = listener.accept()
        threading.Thread(target=_answer, args=(peer, source), daemon=True).start()


def _answer(peer: socket.socket, source: random.Random) -> None:
    with suppress(OSError), peer:
        while peer.recv(1 << 16):
            peer.sendall(noise(source))


def main(path: str, host: str, port: str) -> None:
    source = random.Random(7)
    network = socket.create_server((host, int(port)), backlog=16)
    Path(path).unlink(missing_ok=True)
    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    local.bind(path)
    local.listen(16)
    print("in place", flush=True)
    threading.Thread(target=serve, args=(local, source), daemon=True).start()
    serve(network, source)


if __name__ == "__main__":
    main(*sys.argv[1:])
