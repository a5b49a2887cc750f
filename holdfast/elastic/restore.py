"""The recovery ladder: from which source a starting run gets its newest state back, tried from the newest to the last.

Own keeper → parity → older slot → universal checkpoint. A source that turns out damaged is distrusted and the next one is
taken; nothing that failed a check is ever left in the state that training goes on from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast import ckpt
from holdfast.arrays import FragmentTable
from holdfast.elastic.team import Outcome, Team
from holdfast.errors import ClusterError, ConfigError, SnapshotLost
from holdfast.snapshot.client import connect
from holdfast.snapshot.plan import Distrusted, RestorePlan, Survey, plan_restore
from holdfast.snapshot.recovery import DamagedSlot, SlotSource, stored_name
from holdfast.snapshot.state import Held, TrackedState

logger = logging.getLogger(__name__)

Lap = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was restored: from which `rung`, to which `step`, in how many seconds, and where they went (`phases`).

    `kind` says what had been lost: a "trainer", the memory of a "node", or all memory ("checkpoint").
    """

    kind: str
    rung: str
    step: int
    seconds: float = 0.0
    phases: Mapping[str, float] | None = None
    notes: tuple[str, ...] = ()

    def timed(self, seconds: float, phases: Mapping[str, float]) -> Recovery:
        return replace(self, seconds=seconds, phases=dict(phases))

    def __str__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        return f"restored step {self.step} from {self.rung} in {self.seconds:.2f} s{notes}"


@dataclass(frozen=True, slots=True)
class Restored:
    """Where the run goes on from: `step`, the slot that holds it, and whether every node has it with parity. `checkpoint` is the
    newest step that is a checkpoint, or 0."""

    step: int = 0
    index: int = 1
    protected: bool = True
    in_memory: bool = False
    recovery: Recovery | None = None
    checkpoint: int = 0


def newest(
    state: TrackedState, team: Team, sources: Mapping[int, Path], host: str, checkpoints: str | None, lap: Lap
) -> Restored:
    """Restore the newest step that any source still has, on all ranks alike.

    `sources` are the nodes for which this rank asks, by the place of their memory; `host` is this host's identity. Raises
    SnapshotLost when snapshots exist, none of them can be restored and no checkpoint is left.
    """
    surveys = _survey(team, sources)
    looked = team.all(lambda: _newest_checkpoint(checkpoints) if team.rank == 0 else None)[0]
    stored, notes = looked["step"], list(looked["problems"])
    lap("survey")
    distrusted: Distrusted = frozenset()
    while True:
        plan, reasons = plan_restore(surveys, distrusted)
        notes += [reason for reason in reasons if reason not in notes]
        if plan is None or (stored is not None and stored > plan.step):
            break
        outcomes = _from_memory(state, team, plan, surveys, sources, host, lap)
        damaged = {outcome.node for outcome in outcomes if outcome.node is not None}
        if not damaged:
            raise_first(outcomes)
            return replace(_restored_from(plan, surveys, team, notes), checkpoint=stored or 0)
        notes += [f"{outcome.message}" for outcome in outcomes if outcome.node is not None]
        logger.warning("step %d: the memory of node(s) %s is damaged and distrusted", plan.step, sorted(damaged))
        distrusted |= {(node, plan.step) for node in damaged}
        surveys = _survey(team, sources)
    if stored is not None:
        assert checkpoints is not None
        team.all(lambda: _from_checkpoint(state, team.rank, checkpoints, stored))
        lap("load")
        recovery = Recovery("checkpoint", "universal checkpoint", stored, notes=tuple(notes))
        return Restored(step=stored, recovery=recovery, checkpoint=stored)
    if notes:
        raise SnapshotLost(
            f"snapshots exist and none can be restored: {'; '.join(notes)}. There is no checkpoint to fall back to. Bring a lost "
            "node back with its memory, or start anew under another name (protect(name=…)) or after `holdfast down`"
        )
    return Restored()


# -- looking -------------------------------------------------------------------------------------------------------------


def _survey(team: Team, sources: Mapping[int, Path]) -> list[Survey]:
    def ask() -> list[Any]:
        return [ask_once(memory, "survey") for memory in sources.values()]

    return [Survey.from_json(found) for told in team.all(ask) for found in told]


def ask_once(memory: Path, verb: str, **fields: Any) -> Any:
    """One question to the keeper that serves `memory`; a long answer is waited for."""
    connection = connect(memory, timeout_s=3600)
    try:
        return connection.ask(verb, **fields)
    finally:
        connection.close()


def _newest_checkpoint(checkpoints: str | None) -> dict[str, Any]:
    """The newest sound step, and a line for every newer one that is not."""
    problems: list[str] = []
    if checkpoints is not None:
        for info in reversed(ckpt.list_steps(_directory(checkpoints))):
            if ckpt.is_sound(info):
                return {"step": info.step, "problems": problems}
            problems.append(f"checkpoint {info.path} is passed over: {info.problem or 'its documents are damaged'}")
    return {"step": None, "problems": problems}


def _directory(checkpoints: str) -> Path:
    """The place for checkpoints, made if need be. Raises ConfigError where there can be none."""
    if "://" in checkpoints:
        raise ConfigError(f"checkpoints={checkpoints!r}: this release writes to directories; mount the bucket, or give a path")
    try:
        Path(checkpoints).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"checkpoints={checkpoints!r} cannot be a directory: {error.strerror}") from error
    return Path(checkpoints)


# -- from memory ---------------------------------------------------------------------------------------------------------


def _from_memory(
    state: TrackedState, team: Team, plan: RestorePlan, surveys: list[Survey], sources: Mapping[int, Path], host: str, lap: Lap
) -> list[Outcome]:
    """Rebuild what is lost, then fill every rank's tensors; how each rank fared."""
    members = {survey.member.node: survey.member for survey in surveys}

    def rebuild() -> None:
        for item in plan.rebuilds:
            if item.host in sources:
                survivors = [members[node].to_json() for node in sorted({*item.survivors, *item.with_parity})]
                fields = {"group": item.group.to_json(), "lost": item.lost}
                whole = {"with_data": list(item.survivors), "with_parity": list(item.with_parity)}
                answer = ask_once(sources[item.host], "rebuild", survivors=survivors, **fields, **whole)
                for node, names in answer.get("damaged", {}).items():
                    raise DamagedSlot(
                        int(node), f"step {plan.step}: {', '.join(names)} of node {node} no longer have their crc32c"
                    )

    rebuilt = team.attempt(rebuild)
    lap("rebuild")
    if any(outcome.error for outcome in rebuilt):
        return rebuilt
    tables, objects = _tables(team, plan, sources)

    def load() -> None:
        source = SlotSource(plan, members.values(), tables, host=host)
        try:
            for item in state.prepare(source.specs):
                source.load(item, team.rank)
        finally:
            source.close()
        state.load_texts(objects[str(team.rank if str(team.rank) in objects else team.rank % plan.world)])

    outcomes = team.attempt(load)
    lap("load")
    return outcomes


def _tables(team: Team, plan: RestorePlan, sources: Mapping[int, Path]) -> tuple[FragmentTable, dict[str, dict[str, str]]]:
    """The fragment tables and objects of all ranks at the plan's step, told by the keepers that hold them."""
    holders = set(plan.holders.values())
    mine: list[FragmentTable] = []

    def ask() -> dict[str, Any]:
        objects: dict[str, Any] = {}
        for node, memory in sources.items():
            if node in holders:
                header, table = ask_once(memory, "tables", step=plan.step, index=plan.index)
                mine.append(FragmentTable.from_bytes(bytes(table)))
                objects |= header["objects"]
        return objects

    objects: dict[str, dict[str, str]] = {}
    for told in team.all(ask):
        objects |= told
    tables = [FragmentTable.from_bytes(data) for data in team.gather(FragmentTable.concat(mine).to_bytes())]
    return FragmentTable.concat(tables), objects


def _restored_from(plan: RestorePlan, surveys: list[Survey], team: Team, notes: list[str]) -> Restored:
    rebuilt = [item for item in plan.rebuilds if item.host == item.lost]
    moved = len(plan.rebuilds) > len(rebuilt)
    same_world = plan.world == team.world
    kind = "node" if plan.rebuilds else "trainer"
    rung = "parity" if plan.rebuilds else "own keeper"
    recovery = Recovery(kind, rung, plan.step, notes=tuple(notes))
    # A step that is whole and has no parity yet gets it before the next snapshot; after a change of layout the next one does.
    protected = plan.protected or moved or not same_world
    return Restored(plan.step, plan.index, protected, in_memory=True, recovery=recovery)


def raise_first(outcomes: list[Outcome]) -> None:
    """Raise for the first rank whose part failed, on all ranks alike."""
    for rank, outcome in enumerate(outcomes):
        if outcome.error:
            raise ClusterError(f"rank {rank} could not restore: {outcome.error}: {outcome.message}")


# -- from a checkpoint -----------------------------------------------------------------------------------------------------


def _from_checkpoint(state: TrackedState, rank: int, checkpoints: str, step: int) -> None:
    """Fill this rank's tensors from a universal checkpoint of any layout."""
    found = ckpt.open_checkpoint(checkpoints, step)
    held = state.prepare(found.specs)
    staged: list[tuple[Held, Any, np.ndarray[Any, Any]]] = []
    requests = []
    for item in held:
        for box in item.placement.boxes:
            if box.size:
                buffer = np.empty(box.size * item.local.element_size(), np.uint8)
                requests.append((stored_name(item.name, rank, found.specs), box, buffer.data))
                staged.append((item, box, buffer))
    found.read_boxes(requests)
    with torch.no_grad():
        for item, box, buffer in staged:
            local = item.local
            local.copy_(torch.from_numpy(buffer).view(local.dtype).view(box.shape))
    known = found.objects
    state.load_texts(known[rank if rank in known else rank % max(1, len(known))])
