"""Start the local Ray that keepers live in, or find the one that runs.

Not needed before a run: protect() does it by itself. Useful to have the seconds it takes behind you.
"""

from __future__ import annotations

import argparse
import time

from holdfast.cli.talk import add_json, print_json, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from holdfast.snapshot.cluster import up

    if not arguments.json:
        say("looking for a local Ray, or starting one …")
    started = time.perf_counter()
    found = up()
    seconds = time.perf_counter() - started
    if arguments.json:
        print_json({"address": found.address, "pid": found.pid, "seconds": seconds})
    else:
        print(f"Ray at {found.address} (pid {found.pid}) is up, {seconds:.1f} s")
    return 0
