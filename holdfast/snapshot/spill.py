"""Committed slots written as a universal checkpoint by the keepers, without the trainers.

The coordinator's keeper gathers the fragment tables, every keeper writes its own part, the coordinator commits. The slot is not
refilled meanwhile, and nothing is visible to a reader before COMMIT.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from holdfast import ckpt
from holdfast.arrays import Fragment, FragmentTable, check_coverage, distinct_fragments
from holdfast.ckpt.storage import Place, is_remote, place
from holdfast.errors import StaleEpoch
from holdfast.events import crash_point
from holdfast.snapshot.peers import reach
from holdfast.snapshot.view import View
from holdfast.snapshot.wire import Connection


def write_checkpoint(
    view: View, step: int, index: int, is_current: Callable[[], bool] = lambda: True, *, fenced: bool = True
) -> tuple[Place, int]:
    """Write and commit `step` from every node's slots; returns the checkpoint's directory and its payload bytes.

    The members are asked as of `view.epoch` where `fenced`, so that those which have gone on to another epoch refuse. Raises
    StaleEpoch when `is_current` turns false before the commit: the slots may be refilled by then. What was written of a
    checkpoint that fails is removed.
    """
    if view.checkpoints is None:
        raise ValueError("this run has no place for checkpoints")
    there = _already_written(view.checkpoints, step)
    if there is not None:
        return there
    sender = {"epoch_of_sender": view.epoch} if fenced else {}
    with ExitStack() as stack:
        connections = {}
        for member in view.members:
            connections[member.node] = reach(member, timeout_s=3600)
            stack.callback(connections[member.node].close)
        table, objects, holders = gather(view, step, index, **sender)
        check_table(table)
        layout = {"world": view.world, "nodes": len(view.members)}
        plan = _plan(table, step, layout, view.checkpoints)
        directory = ckpt.begin(view.checkpoints, plan, secrets.token_hex(4))
        crash_point("spill.begun")
        try:
            where: dict[str, Any] = {"directory": str(directory), "step": step, "index": index, "layout": layout}
            where["holders"] = {str(rank): node for rank, node in holders.items()}
            _everywhere(connections, "spill", table.to_bytes(), **where, **sender)
            crash_point("spill.written")
            if not is_current():
                raise StaleEpoch(f"epoch {view.epoch} ended while step {step} was written")
            path = ckpt.commit(view.checkpoints, directory, plan, nodes=sorted(connections), objects=objects)
        except BaseException:
            # Room may be what it failed for. A reader never saw it, and the next attempt has a directory of its own.
            ckpt.discard(directory)
            raise
        return path, table.nbytes


def _already_written(checkpoints: str, step: int) -> tuple[Place, int] | None:
    """The checkpoint of this step from before a recovery that trained it again: it is as good, and is never overwritten."""
    if not place(checkpoints).is_dir():
        return None
    found = [info for info in ckpt.list_steps(checkpoints) if info.step == step and ckpt.is_sound(info)]
    return (found[0].path, found[0].nbytes) if found else None


def gather(view: View, step: int, index: int, **sender: Any) -> tuple[FragmentTable, dict[int, dict[str, str]], dict[int, int]]:
    """All distinct fragments of a committed step, every rank's objects, and the node that has them, told by the keepers.

    A rank that was rebuilt elsewhere while its node was away is there twice: then its own node has it.
    """
    tables: dict[int, FragmentTable] = {}
    objects: dict[int, dict[str, str]] = {}
    holders: dict[int, int] = {}
    for member in view.members:
        connection = reach(member, timeout_s=3600)
        try:
            header, data = connection.ask("tables", step=step, index=index, **sender)
        finally:
            connection.close()
        tables[member.node] = FragmentTable.from_bytes(data)
        for rank, named in ((int(text), named) for text, named in header["objects"].items()):
            if rank not in holders or rank in member.ranks:
                holders[rank], objects[rank] = member.node, named
    rows = [row for node, table in tables.items() for row in table if holders[row.rank] == node]
    return distinct_fragments(FragmentTable.from_rows(rows)), objects, holders


def _plan(table: FragmentTable, step: int, layout: dict[str, Any], where: str | Place) -> ckpt.WritePlan:
    return ckpt.plan_write(table, step=step, layout=layout, whole_files=is_remote(where))


def write_part(
    directory: Place,
    table: FragmentTable,
    step: int,
    layout: dict[str, Any],
    node: int,
    ranks: frozenset[int],
    read: Callable[[Fragment], memoryview],
) -> int:
    """Write the fragments that this node's ranks hold; returns the bytes written."""
    plan = _plan(table, step, layout, directory)
    rows = [row for row in table if row.rank in ranks]
    return ckpt.write_fragments(directory, plan, node, rows, read)


def check_table(table: FragmentTable) -> None:
    """Every array is whole; raises LayoutMismatch when ranks disagree or a part is held by nobody."""
    specs = table.specs()
    pieces: dict[str, list[Any]] = {name: [] for name in specs}
    for row in table:
        pieces[row.array].append(row.box)
    check_coverage(specs.values(), pieces)


def _everywhere(connections: dict[int, Connection], verb: str, payload: bytes, **fields: Any) -> None:
    with ThreadPoolExecutor(len(connections)) as pool:
        list(pool.map(lambda connection: connection.ask(verb, payload, **fields), connections.values()))
