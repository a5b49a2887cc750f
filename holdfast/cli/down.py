"""End the keepers of this machine and the local Ray; leave no process and no file behind.

Snapshots in memory are gone afterwards. Checkpoints are not touched. While runs are alive their names are printed and nothing
happens without --yes.
"""

from __future__ import annotations

import argparse

from holdfast.cli.talk import add_json, complain, count, print_json, say, size

USAGE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="also while trainers are alive")
    parser.add_argument("--dry-run", action="store_true", help="say what would be ended and removed, and do nothing")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from holdfast.environment import Environment
    from holdfast.snapshot import cluster

    env = Environment.read()
    jobs = cluster.status(memory=env.memory)
    busy = [job.name for job in jobs if cluster.has_trainers(job)]
    nodes = [node for job in jobs for node in job.nodes]
    if arguments.dry_run:
        keepers, nbytes = sum(node.alive for node in nodes), sum(node.nbytes for node in nodes)
        if arguments.json:
            print_json({"runs": [job.name for job in jobs], "keepers": keepers, "busy": busy, "nbytes": nbytes})
        else:
            print(f"would end {count(keepers, 'keeper')} and free {size(nbytes)}")
        return 0
    if busy and not arguments.yes:
        complain(f"{', '.join(busy)}: trainers are alive; their snapshots would be lost. End them first, or add --yes")
        return USAGE
    if not arguments.json:
        say("ending keepers and Ray …")
    cleared = cluster.down(memory=env.memory, ray_address=env.ray_address)
    if arguments.json:
        print_json(cleared)
    else:
        print(
            f"ended {count(cleared.keepers, 'keeper')}{' and the local Ray' if cleared.ray else ''}, freed {size(cleared.nbytes)}"
        )
    return 0
