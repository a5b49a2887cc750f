"""From the command line to one verb: a table of verbs, and the one place that turns errors into exit codes.

A verb's module is imported when the verb is called, so that `holdfast ls` never pays for torch. It has `add_arguments(parser)`
and `run(arguments) -> int`, and its docstring is its help: first line, then what follows.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

from holdfast.cli.talk import complain
from holdfast.errors import HoldfastError

VERBS = {
    "demo": "train, kill, recover, compare: the whole product in four minutes",
    "up": "start the keepers of this machine",
    "down": "stop the keepers; leave nothing behind",
    "status": "what the keepers hold, and how many losses it survives",
    "ls": "list the checkpoints of a run",
    "show": "what is in a checkpoint: a tree with sizes",
    "verify": "read and check every byte of a checkpoint",
    "diff": "which arrays and rows differ between two checkpoints",
    "restore": "cut a checkpoint for a mesh, as files to load",
    "convert": "to and from safetensors, DCP, DeepSpeed, Megatron and torch files",
    "repair": "put damaged bytes right, from parity or a replica",
    "parity": "write parity beside a step, to repair it from",
    "prune": "remove old checkpoints, by a rule",
    "report": "what happened to a run, incident by incident",
    "audit": "was every sample used exactly once?",
    "doctor": "look at this machine the way holdfast does",
}
"""Every verb and its one line; a verb whose module `holdfast.cli.<verb>` is not there is not offered."""

INTERRUPTED = 130
USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0 ok, 1 failed, 2 usage, 3 nothing to restore, 4 damaged but repairable, 5 lost, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        from holdfast import __version__

        print(f"holdfast {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else USAGE
    verb = words[0]
    if verb not in offered():
        complain(f'there is no verb {verb!r}{_near(verb)}; "holdfast --help" lists all')
        return USAGE
    try:
        return _run(verb, words[1:])
    except HoldfastError as error:
        complain(str(error), type(error).__name__)
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `holdfast ls | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 1
    except MemoryError:
        complain("out of memory; try a smaller --max-memory")
        return 1


def _run(verb: str, words: Sequence[str]) -> int:
    module = _module(verb)
    about, _, more = (module.__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"holdfast {verb}",
        description=about,
        epilog=more.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        arguments = parser.parse_args(list(words))
    except SystemExit as stop:  # argparse has said why, on stderr
        return int(stop.code or 0)
    code: int = module.run(arguments)
    sys.stdout.flush()
    return code


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"holdfast.cli.{verb}")


def offered() -> list[str]:
    return [verb for verb in VERBS if find_spec(f"holdfast.cli.{verb}") is not None]


def _near(verb: str) -> str:
    import difflib

    close = difflib.get_close_matches(verb, offered(), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _overview() -> str:
    lines = [
        "holdfast keeps a distributed PyTorch training job alive and loses none of its work.",
        "",
        "usage: holdfast VERB …        holdfast VERB --help says more",
        "",
    ]
    lines += [f"  {verb:<9} {VERBS[verb]}" for verb in offered()]
    lines += ["", "Data goes to stdout, talk to stderr; --json prints one object. A checkpoint is PATH, or PATH@STEP in a run."]
    return "\n".join(lines)
