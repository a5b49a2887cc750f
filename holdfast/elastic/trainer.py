"""What the launcher starts: the user's script, on a communicator that can be replaced.

As a trainer it runs the script at once. As a spare it imports torch, in the "ready" role also runs the script up to `protect`, and
waits there for the death of the trainer whose place it would take.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from holdfast.elastic import post
from holdfast.environment import Berth, die_with
from holdfast.errors import ConfigError


def main(arguments: list[str]) -> None:
    berth = Berth.read()
    if berth is None:
        raise ConfigError("this is started by holdfast.elastic.run; run `torchrun … -m holdfast.elastic.run train.py`")
    die_with(berth.launcher)  # a trainer without its launcher would be seen by nobody
    post.active = line = post.Post(berth)

    from holdfast.elastic import communicator
    from holdfast.elastic.transcript import Transcript

    _warm_up()
    if berth.role == "import":
        line.await_call()
    rank = int(os.environ["RANK"])
    alone = berth.role != "trainer"
    try:
        transcript = Transcript.of(line.kept()) if alone else Transcript()
        communicator.install(communicator.Communicator(berth.board, berth.token, rank, transcript, alone=alone))
        _run(arguments)
    except post.RestartNeeded as reason:
        print(f"rank {rank}: recovery in place is not possible: {reason}; a fault restarts all processes", file=sys.stderr)
        sys.exit(post.RESTART)


def _run(arguments: list[str]) -> None:
    """The script as torchrun would have run it."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


def _warm_up() -> None:
    """Start what torch starts lazily: its thread pools and the autograd engine."""
    import torch

    weight = torch.ones(64, 64, requires_grad=True)
    (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(sys.argv[1:])
