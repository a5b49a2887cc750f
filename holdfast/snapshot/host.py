"""A keeper in a process of its own, without Ray: `python -m holdfast.snapshot.host JOB NODE MEMORY`.

For machines without Ray and for tests. When it dies, a trainer of its node starts it again, or the next start of the job does.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from holdfast.environment import watch_every_s
from holdfast.errors import HoldfastError
from holdfast.events import arm_from_text
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.priority import priority

DOMAIN = "HOLDFAST_DOMAIN"
"""Which nodes fail together with this one: the same words on each of them, such as the name of a rack."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def arm_faults(node: int) -> None:
    """Rehearsals and tests break keepers at named points; nothing happens unless the environment says so."""
    schedule = os.environ.get("HOLDFAST_FAULTS")
    if schedule:
        arm_from_text(schedule, role="keeper", place=node)


def on_sigterm(action: Callable[[], None]) -> None:
    """Have `action` called, on a thread of its own, whenever SIGTERM comes. For the main thread to ask for.

    A handler in Python runs when the main thread comes back to the interpreter, and one that waits in a lock may never: the kernel
    is free to deliver the signal to another thread, or just before the wait. The wake-up socket is written whichever it is.
    """
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def listen(mouth: socket.socket) -> None:  # holds on to it: closed, the socket would hear no more
        while heard := ears.recv(16):
            if signal.SIGTERM in heard:
                action()

    threading.Thread(target=listen, args=(mouth,), name="holdfast-sigterm", daemon=True).start()


def main(arguments: list[str]) -> int:
    job, node, memory = arguments[0], int(arguments[1]), Path(arguments[2])
    bind = arguments[3] if len(arguments) > 3 else "127.0.0.1"
    mapped = os.environ.get("HOLDFAST_TRANSPORT") != "tcp"
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    priority.lower()  # only now that everything is imported: somebody waits for the keeper
    priority.hurry()
    arm_faults(node)
    built: list[Keeper] = []
    told = threading.Event()

    def end() -> None:
        told.set()
        for each in built:
            each.preempt.told_to_end()

    on_sigterm(end)
    try:
        domain = os.environ.get(DOMAIN, "")
        keeper = Keeper(job, node, memory, bind=bind, mapped=mapped, domain=domain, watch_every_s=watch_every_s())
    except HoldfastError as error:
        logging.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    built.append(keeper)
    if told.is_set():  # before it was built
        keeper.preempt.told_to_end()
    keeper.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
