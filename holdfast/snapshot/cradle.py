"""A process that has imported what a keeper needs, and waits: a keeper that is asked of it serves within milliseconds.

The launcher of a host's first rank holds one where keepers are plain processes. Asked, it forks: the child becomes the keeper, in a
session of its own, and outlives it; the process itself stays for the next one. It ends with its launcher and leaves nothing behind,
its address is a name in the kernel. Where none answers, a keeper is started as any other process is.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import random
import socket
import sys
from typing import Any

from holdfast.environment import die_with
from holdfast.snapshot import host
from holdfast.snapshot.birth import CRADLE_PATIENCE_S, user_of

logger = logging.getLogger(__name__)

_PR_SET_NAME = 15


def main(arguments: list[str]) -> int:
    """Serve at the address until the launcher, whose process number follows it, has ended. Returns in a child: as a keeper."""
    address, launcher = arguments[0], int(arguments[1])
    die_with(launcher)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{address}")
    gc.collect()
    gc.freeze()  # a child's collector would otherwise touch, and so copy, every page of it
    listener.listen(16)
    while True:
        connection, _ = listener.accept()
        with connection:
            wanted = _hear(connection)
            if wanted is not None and _fork(connection):
                listener.close()
                connection.close()
                _become(wanted)
                return host.main(wanted["arguments"])


def _hear(connection: socket.socket) -> dict[str, Any] | None:
    try:
        connection.settimeout(CRADLE_PATIENCE_S)
        if user_of(connection) != os.getuid():
            return None
        with connection.makefile() as lines:
            wanted: dict[str, Any] = json.loads(lines.readline() or "{}")
    except (OSError, ValueError) as error:
        logger.warning("a request for a keeper was not understood: %s", error)
        return None
    return wanted if isinstance(wanted, dict) and wanted.keys() == {"arguments", "log", "environ", "cwd"} else None


def _fork(connection: socket.socket) -> bool:
    """True in the keeper. It is a child's child, so that nobody here has to wait for its end; the child tells who it is."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return False
    keeper = os.fork()
    if not keeper:
        return True
    try:
        connection.sendall(f"{keeper}\n".encode())
    finally:
        os._exit(0)


def _become(wanted: dict[str, Any]) -> None:
    """What a process that is started anew would have: a session, a log, and an environment of its own."""
    os.setsid()
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["environ"])
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, stream in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, stream)
    os.close(log)
    os.close(nothing)
    random.seed()
    name = f"hf-keeper-{wanted['arguments'][1]}".encode()
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)  # what `ps -o comm` shows; the command line stays the cradle's


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
