"""A process that saves step 2 and dies by SIGKILL at one crash point after the other, each time in a fork of its own.

usage: python dying.py ROOT…   one prepared run directory per crash point; prints the points as JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from holdfast import events
from tests.ckpt.saving import Saved, cut, model, write


def points(root: Path, saved: Saved) -> list[str]:
    """The names of all points that a save passes, in order."""
    seen: list[str] = []
    events.arm(seen.append)
    write(root, saved, step=2)
    events.arm(None)
    return list(dict.fromkeys(seen))


def die_at(point: str, root: Path, saved: Saved) -> None:
    events.arm(lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == point else None)
    write(root, saved, step=2)


def main() -> None:
    rehearsal, *roots = map(Path, sys.argv[1:])
    saved = cut(model(seed=2), ((0, 4),))
    names = points(rehearsal, saved)
    for name, root in zip(names, roots, strict=False):
        child = os.fork()
        if child == 0:
            die_at(name, root, saved)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the save survived {name}"
        assert os.WTERMSIG(status) == signal.SIGKILL
    print(json.dumps(names))


if __name__ == "__main__":
    main()
