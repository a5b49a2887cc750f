"""Saves to an object store that die by SIGKILL, one at each crash point, each in a fork that alone has ever spoken to the store.

usage: python dying_in_store.py URI   prints the points as JSON; the save that died at point i was of step i + 2
"""

from __future__ import annotations

import json
import os
import signal
import sys

from holdfast import events
from tests.ckpt.saving import Sample, cut, write

SAMPLES = [Sample.random("model/w", "float32", (600, 60), 2), Sample.random("model/norm", "float32", (60,), 2)]


def points(root: str) -> list[str]:
    """The names of all points that a save passes, in order, told by a child."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        seen: list[str] = []
        events.arm(seen.append)
        write(f"{root}/rehearsal", cut(SAMPLES, ((0, 2),)), step=1)
        os.write(writing, json.dumps(list(dict.fromkeys(seen))).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        return json.load(answer)


def main() -> None:
    root = sys.argv[1]
    names = points(root)
    children = {}
    for number, name in enumerate(names):
        child = os.fork()
        if child == 0:
            events.arm(lambda passed, name=name: os.kill(os.getpid(), signal.SIGKILL) if passed == name else None)
            write(f"{root}/run", cut(SAMPLES, ((0, 2),)), step=number + 2)
            os._exit(0)
        children[child] = name
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the save survived {name}"
    print(json.dumps(names))


if __name__ == "__main__":
    main()
