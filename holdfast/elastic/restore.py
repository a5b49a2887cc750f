"""The recovery ladder, climbed: from which source a starting run gets its state back, and what to do when that source fails.

`ladder.py` decides the order; here it is carried out by all ranks alike. A source that turns out damaged is distrusted and the next
one is taken; nothing that failed a check is ever left in the state that training goes on from.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from holdfast.arrays import FragmentTable
from holdfast.elastic.incidents import is_incident, read_incidents
from holdfast.elastic.interval import FailureRate
from holdfast.elastic.journal import pace, taken_s, words_of_last_attempt
from holdfast.elastic.ladder import Offer, Prices, Rung, measured_prices, plan_ladder
from holdfast.elastic.substitution import Remains, substitute
from holdfast.elastic.team import SHORT_NBYTES, Outcome, Team
from holdfast.errors import ClusterError, ConfigError, HoldfastError, SnapshotLost
from holdfast.redundancy import Stage
from holdfast.snapshot import client
from holdfast.snapshot.plan import Distrusted, RestorePlan, Survey, plan_remains, plan_restore, was_ever_safe
from holdfast.snapshot.recovery import DamagedSlot, SlotSource, stored_name
from holdfast.snapshot.state import Held, TrackedState

if TYPE_CHECKING:
    from holdfast.ckpt.storage import Place

logger = logging.getLogger(__name__)

Lap = Callable[[str], None]

CHECKPOINTS_TRIED = 3
"""How many checkpoints are looked at before a start gives up; more damaged ones in a row mean that storage itself is ill."""

_LENGTHS = struct.Struct("!QQ")

_DAMAGED = ("CorruptData", "MissingData", "UnsupportedFormat", "NotACheckpoint")


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was restored: from which `rung`, to which `step`, in how many seconds, and where they went (`phases`).

    `kind` says what had been lost: a "trainer", the memory of a "node", all memory ("checkpoint"), or a "stage" of a pipeline.
    """

    kind: str
    rung: str
    step: int
    seconds: float = 0.0
    phases: Mapping[str, float] | None = None
    notes: tuple[str, ...] = ()
    choice: tuple[str, ...] = ()
    """The rungs there were to choose from, best first, with their prices."""

    def timed(self, seconds: float, phases: Mapping[str, float]) -> Recovery:
        return replace(self, seconds=seconds, phases=dict(phases))

    def __str__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        return f"restored step {self.step} from {self.rung} in {self.seconds:.2f} s{notes}"


@dataclass(frozen=True, slots=True)
class Restored:
    """Where the run goes on from: `step`, and the `plan` by which it was found in memory, if it was. `checkpoint` is the newest
    step that is a checkpoint, or 0. `rate` is how often this run is believed to fail."""

    step: int = 0
    plan: RestorePlan | None = None
    recovery: Recovery | None = None
    checkpoint: int = 0
    rate: FailureRate = field(default_factory=FailureRate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """What a rank that restores has around it.

    sources: the nodes for which this rank asks, by the place of their memory; host: this host's identity; known: what rank 0 knows;
    elsewhere: what all ranks answer for; stages: of every rank, where one may be substituted. `attach` is called on every rank as
    soon as its own state is there from memory (`Restored.plan`), and again where that of another rank was not to be had.
    """

    sources: Mapping[int, Path]
    host: str
    checkpoints: str | None
    known: Known
    elsewhere: Collection[str]
    stages: Sequence[Stage]
    lap: Lap
    attach: Callable[[], None]


def newest(state: TrackedState, team: Team, around: Around, surveys: list[Survey]) -> Restored:
    """Restore the newest step that any source still has, on all ranks alike; `surveys` are what all keepers have just said.

    Raises SnapshotLost when snapshots exist, none of them can be restored and no checkpoint is left.
    """
    known = around.known
    notes, failed = list(known.problems), set[int]()
    distrusted: Distrusted = frozenset()
    best: int | None = None
    hopeless = not around.stages
    while True:
        plans, reasons = _plans(surveys, distrusted)
        notes += [reason for reason in reasons if reason not in notes]
        best = max((plan.step for plan in plans), default=0) if best is None else best
        offers = {_offer(plan, best): plan for plan in plans}
        stored = [Offer(Rung.CHECKPOINT, step) for step in known.stored if step not in failed][:1]
        remains = None if hopeless or not was_ever_safe(surveys) else plan_remains(surveys, distrusted)
        if remains is not None and remains.missing:
            offers[Offer(Rung.SUBSTITUTE, remains.step, is_lossy=True)] = remains
        choices = plan_ladder([*offers, *stored], known.prices)
        if not choices:
            break
        chosen, why = choices[0].offer, tuple(choice.why for choice in choices)
        if chosen.rung is Rung.CHECKPOINT:
            problem = _try_checkpoint(state, team, around, chosen.step)
            around.lap("checkpoint")
            if not problem:
                recovery = Recovery("checkpoint", chosen.rung, chosen.step, notes=tuple(notes), choice=why)
                return Restored(step=chosen.step, recovery=recovery, checkpoint=chosen.step, rate=known.rate)
            notes.append(problem)
            failed.add(chosen.step)
            continue
        plan = offers[chosen]
        outcomes = _from_memory(state, team, plan, surveys, around)
        damaged = {outcome.node for outcome in outcomes if outcome.node is not None}
        if damaged:
            notes += [f"{outcome.message}" for outcome in outcomes if outcome.node is not None]
            logger.warning("step %d: the memory of node(s) %s is damaged and distrusted", plan.step, sorted(damaged))
            distrusted |= {(node, plan.step) for node in damaged}
            surveys = _survey(team, around.sources)
        elif chosen.rung is Rung.SUBSTITUTE:
            problem = next((f"{outcome.error}: {outcome.message}" for outcome in outcomes if outcome.error), "")
            if not problem:
                recovery = Recovery("stage", chosen.rung, plan.step, notes=(*notes, outcomes[0].value), choice=why)
                return Restored(step=plan.step, recovery=recovery, rate=known.rate)
            notes.append(f"step {plan.step} cannot be completed by substitution ({problem})")
            hopeless = True
        else:
            _raise_first(outcomes)
            restored = _restored_from(plan, chosen.rung, notes, why)
            return replace(restored, checkpoint=max(known.stored, default=0), rate=known.rate)
    if notes and not (known.problems or failed or distrusted or was_ever_safe(surveys)):
        if team.rank == 0:
            logger.warning("no step had been committed yet, so the run begins anew (%s)", "; ".join(notes))
    elif notes:
        raise SnapshotLost(
            f"snapshots exist and none can be restored: {'; '.join(notes)}. There is no checkpoint to fall back to. Bring a lost "
            "node back with its memory, or start anew under another name (protect(name=…)) or after `holdfast down`"
        )
    return Restored(rate=known.rate)


def _plans(surveys: list[Survey], distrusted: Distrusted) -> tuple[list[RestorePlan], list[str]]:
    """The newest step that memory can give back, and the one below it; and why newer ones cannot."""
    plan, reasons = plan_restore(surveys, distrusted)
    if plan is None:
        return [], reasons
    older, _ = plan_restore(surveys, distrusted | {(survey.member.node, plan.step) for survey in surveys})
    return [plan, *([older] if older is not None and older.step < plan.step else [])], reasons


def _offer(plan: RestorePlan, best: int) -> Offer:
    if plan.step < best:
        return Offer(Rung.OLDER, plan.step)
    return Offer(Rung.PARITY if plan.rebuilds else Rung.OWN, plan.step)


# -- looking -------------------------------------------------------------------------------------------------------------


def _survey(team: Team, sources: Mapping[int, Path]) -> list[Survey]:
    def ask() -> list[Any]:
        return [ask_once(memory, "survey") for memory in sources.values()]

    return [Survey.from_json(found) for told in team.all(ask) for found in told]


def ask_once(memory: Path, verb: str, **fields: Any) -> Any:
    """One question to the keeper that serves `memory`; a long answer is waited for."""
    return client.ask_once(memory, verb, timeout_s=3600, **fields)


@dataclass(frozen=True, slots=True)
class Known:
    """What rank 0 knows for all: sound checkpoints (newest first), what is wrong with newer ones, what recoveries cost, and how
    often one is needed."""

    stored: tuple[int, ...]
    problems: tuple[str, ...]
    prices: Prices
    rate: FailureRate

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Known:
        stored, problems = tuple(fields["stored"]), tuple(fields["problems"])
        return cls(stored, problems, Prices(**fields["prices"]), FailureRate(**fields["rate"]))


def look(checkpoints: str | None, records: Path | None) -> Known:
    """What rank 0 finds in storage; `records` is where earlier recoveries of this run wrote down what they cost."""
    stored, problems = ([], []) if checkpoints is None else _stored(checkpoints)
    return Known(tuple(stored), tuple(problems), *_learned(records))


def _stored(checkpoints: str) -> tuple[list[int], list[str]]:
    """The newest sound checkpoints, and what is wrong with newer ones."""
    # Here, and not for every rank that starts again: importing it is a quarter of what importing this package takes.
    from holdfast import ckpt

    stored: list[int] = []
    problems: list[str] = []
    where = _directory(checkpoints)
    # A store has no prefix before the first save.
    for info in reversed(ckpt.list_steps(where)) if where.is_dir() else ():
        if ckpt.is_sound(info):
            stored.append(info.step)
        elif not stored:
            problems.append(f"checkpoint {info.path} is passed over: {info.problem or 'its documents are damaged'}")
        if len(stored) == CHECKPOINTS_TRIED:
            break
    return stored, problems


def _learned(records: Path | None) -> tuple[Prices, FailureRate]:
    """From the journals and incidents of this run; they are advice, so damaged ones cost the advice and nothing else."""
    if records is None:
        return Prices(), FailureRate()
    try:
        incidents = read_incidents(records)
        words = words_of_last_attempt(records)
        reached = max((word.step for word in words), default=0)
        prices = measured_prices(incidents, step_s=pace(records), reached_step=reached)
        failures = len(incidents) + is_incident(words)  # its record is written when it is over
        return prices, FailureRate.learned(failures, taken_s(records) / 3600)
    except (HoldfastError, OSError) as error:
        logger.warning("what earlier failures cost cannot be read (%s); assumed prices and rates are used", error)
        return Prices(), FailureRate()


def _directory(checkpoints: str) -> Place:
    """The place for checkpoints, made if need be. Raises ConfigError where there can be none."""
    from holdfast.ckpt.storage import place

    where = place(checkpoints)
    if isinstance(where, Path):
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"checkpoints={checkpoints!r} cannot be a directory: {error.strerror}") from error
    return where


# -- from memory ---------------------------------------------------------------------------------------------------------


def _from_memory(state: TrackedState, team: Team, plan: RestorePlan, surveys: list[Survey], around: Around) -> list[Outcome]:
    """Rebuild what is lost, then fill every rank's tensors and attach it; how each rank fared."""
    members = {survey.member.node: survey.member for survey in surveys}

    def rebuild() -> None:
        for item in plan.rebuilds:
            if item.host in around.sources:
                answer = ask_once(around.sources[item.host], "rebuild", **item.to_json(members))
                for node, names in answer.get("damaged", {}).items():
                    raise DamagedSlot(
                        int(node), f"step {plan.step}: {', '.join(names)} of node {node} no longer have their crc32c"
                    )

    rebuilt = team.attempt(rebuild) if plan.rebuilds else []
    around.lap("rebuild")
    if any(outcome.error for outcome in rebuilt):
        return rebuilt
    table, texts = _tables(team, plan, surveys, around.sources)

    def load() -> str:
        source = SlotSource(plan, members.values(), table, host=around.host)
        try:
            if plan.missing:
                return substitute(state, team.rank, around.stages, around.elsewhere, Remains(plan, source, table, texts))
            for item in state.prepare(source.specs, around.elsewhere):
                source.load(item, team.rank)
        finally:
            source.close()
        state.load_texts(texts[team.rank if team.rank in texts else team.rank % plan.world], texts.values())
        if plan.world == team.world:
            around.attach()
        return ""

    outcomes = team.attempt(load)
    if plan.world != team.world and not any(outcome.error for outcome in outcomes):
        # Ranks read each other's slots, and one that is attached may get a larger one in the place of what it held.
        outcomes = team.attempt(around.attach)
    around.lap("load")
    return outcomes


def _tables(
    team: Team, plan: RestorePlan, surveys: list[Survey], sources: Mapping[int, Path]
) -> tuple[FragmentTable, dict[int, dict[str, str]]]:
    """The fragment tables and objects of all ranks at the plan's step, told by the keepers that hold them."""
    ranks_on = {node: ranks for node in sources if (ranks := plan.ranks_on(node))}

    def ask() -> bytes:
        at = {"step": plan.step, "index": plan.index}
        return b"".join(_packed(*ask_once(sources[node], "tables", ranks=ranks, **at)) for node, ranks in ranks_on.items())

    objects: dict[int, dict[str, str]] = {}
    tables: list[FragmentTable] = []
    for told in team.all(ask, room_nbytes=_room_of(plan, surveys)):
        for header, table in _unpacked(told):
            tables.append(FragmentTable.from_bytes(table))
            objects |= {int(rank): texts for rank, texts in header["objects"].items()}
    return FragmentTable.concat(tables), objects


def _room_of(plan: RestorePlan, surveys: list[Survey]) -> int:
    """What the tables and objects of one node should fit into; all ranks compute the same."""
    nbytes: dict[int, int] = {}
    for survey in surveys:
        for slot in survey.slots:
            if (slot.step, slot.epoch, slot.index) == (plan.step, plan.epoch, plan.index) and slot.rank >= 0:
                nbytes[survey.member.node] = nbytes.get(survey.member.node, SHORT_NBYTES) + slot.meta_nbytes
    return max(nbytes.values(), default=SHORT_NBYTES)


def _packed(header: dict[str, Any], table: bytes | memoryview) -> bytes:
    head = json.dumps(header).encode()
    return _LENGTHS.pack(len(head), len(table)) + head + bytes(table)


def _unpacked(data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    place = 0
    while place < len(data):
        head, table = _LENGTHS.unpack_from(data, place)
        start = place + _LENGTHS.size
        place = start + head + table
        yield json.loads(data[start : start + head]), data[start + head : place]


def _restored_from(plan: RestorePlan, rung: Rung, notes: list[str], choice: tuple[str, ...]) -> Restored:
    kind = "node" if plan.rebuilds else "trainer"
    recovery = Recovery(kind, rung, plan.step, notes=tuple(notes), choice=choice)
    return Restored(plan.step, plan, recovery)


def _raise_first(outcomes: list[Outcome]) -> None:
    """Raise for the first rank whose part failed, on all ranks alike."""
    for rank, outcome in enumerate(outcomes):
        if outcome.error:
            raise ClusterError(f"rank {rank} could not restore: {outcome.error}: {outcome.message}")


# -- from a checkpoint -----------------------------------------------------------------------------------------------------


def _try_checkpoint(state: TrackedState, team: Team, around: Around, step: int) -> str:
    """Load it on all ranks; what was wrong with it, or nothing. Errors that another checkpoint would not cure are raised."""
    checkpoints = around.checkpoints
    assert checkpoints is not None
    outcomes = team.attempt(lambda: _from_checkpoint(state, team.rank, checkpoints, step, around.elsewhere))
    damaged = [outcome.message for outcome in outcomes if outcome.error in _DAMAGED]
    if damaged:
        logger.warning("the checkpoint of step %d cannot be used: %s", step, damaged[0])
        return f"the checkpoint of step {step} cannot be used: {damaged[0]}"
    team.settle(outcomes)
    return ""


def _from_checkpoint(state: TrackedState, rank: int, checkpoints: str, step: int, elsewhere: Collection[str]) -> None:
    """Fill this rank's tensors from a universal checkpoint of any layout."""
    from holdfast import ckpt

    found = ckpt.open_checkpoint(checkpoints, step)
    held = state.prepare(found.specs, elsewhere)
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
    state.load_texts(known[rank if rank in known else rank % max(1, len(known))], known.values())
