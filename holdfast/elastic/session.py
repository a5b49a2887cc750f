"""One protected run: entering restores, every step is noted, leaving settles. The object behind `with holdfast.protect(…) as run`.

All agreement between ranks happens while entering, over the user's own process group. While training, a rank talks to its
keeper only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from holdfast.elastic import guards, restore
from holdfast.elastic._torch_private import let_go_of_groups
from holdfast.elastic.alike import compare
from holdfast.elastic.chronicle import Before, Chronicle, process_born_s, words_here, words_of_all
from holdfast.elastic.inplace import InPlace, Step, in_place, reset
from holdfast.elastic.journal import last_attempt, records_of
from holdfast.elastic.ladder import Rung
from holdfast.elastic.places import Place, Seat, places_of
from holdfast.elastic.post import RestartNeeded
from holdfast.elastic.preemption import Preemption
from holdfast.elastic.pulse import Heart
from holdfast.elastic.rehearsal import rehearse
from holdfast.elastic.restore import Recovery, Restored, ask_once
from holdfast.elastic.sensors import announce
from holdfast.elastic.silence import Sentry
from holdfast.elastic.substitution import StageNote, noted
from holdfast.elastic.team import Team
from holdfast.elastic.witness import Witness
from holdfast.environment import Environment, check_job_name, default_job_name
from holdfast.errors import (
    CheckpointFailed,
    ClusterError,
    KeeperUnreachable,
    StaleEpoch,
    StateError,
)
from holdfast.events import arm_from_text, emit
from holdfast.redundancy import Redundancy, Stage
from holdfast.snapshot.capture import Capturer, Stats
from holdfast.snapshot.capture_plan import plan_capture
from holdfast.snapshot.client import Endpoint, Link
from holdfast.snapshot.cluster import ensure_keepers, known_nodes, node_memory, revive_keeper
from holdfast.snapshot.fence import Fence
from holdfast.snapshot.lifeline import Lifeline
from holdfast.snapshot.plan import Survey, lies_as
from holdfast.snapshot.priority import hurry_other
from holdfast.snapshot.state import TrackedState
from holdfast.snapshot.verdicts import Verdict
from holdfast.snapshot.view import View, effective_parity

logger = logging.getLogger(__name__)

JOIN_TRIES = 5

LEAVING_TIMEOUT_S = 1800.0
"""How long leaving waits for the last step to be committed and written before it says so and goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user chose, checked by `protect`."""

    checkpoints: str | None
    redundancy: Redundancy
    snapshot_every: int
    snapshot_adaptive: bool
    checkpoint_every: int
    checkpoint_adaptive: bool
    name: str | None
    memory_dir: str | None
    on_nan: str
    grace_s: float = 20.0
    diagnose_s: float = 30.0


class Run:
    """A protected training loop. Use as a context manager; `steps` yields the numbers of the steps still to do, from 1.

    `step` is the last completed one, `recovery` says what entering had to restore (None for a fresh start), and `stats` counts
    what this rank's snapshots came to.
    """

    def __init__(self, state: Mapping[str, Any], settings: Settings, stage: Stage | None = None) -> None:
        self._settings = settings
        self._note = None if stage is None else StageNote(stage)
        self._tracked = TrackedState(state if self._note is None else noted(state, self._note))
        self.name = check_job_name(settings.name or default_job_name(settings.checkpoints))
        self.step = 0
        self.recovery: Recovery | None = None
        self._capturer: Capturer | None = None
        self._lifeline: Lifeline | None = None
        self._held = ExitStack()
        self._in_place: InPlace | None = None
        self._begun = False
        self._staleness = guards.Staleness(self.name)
        self._witness: Witness | None = None
        self._chronicle: Chronicle | None = None
        self._heart: Heart | None = None
        self._sentry: Sentry | None = None

    @property
    def stats(self) -> Stats:
        return Stats() if self._capturer is None else self._capturer.stats

    @property
    def committed_step(self) -> int:
        """The newest step that every node has committed: what a fault at this moment would return to."""
        return 0 if self._capturer is None else self._capturer.link.committed_step

    # -- entering --

    def __enter__(self) -> Self:
        let_go_of_groups()  # this package may have been what imported them
        self._in_place = in_place()
        self._sentry = Sentry(self._keep_verdict)
        try:
            if self._in_place is None:
                self._enter()
            else:
                self._in_place.enter(self._enter, lambda: rehearse(self._tracked.optimizers.values()))
        except BaseException:
            self._sentry.close()
            raise
        return self

    def _keep_verdict(self, verdict: Verdict) -> None:
        """For the incident that may come of it. On any thread."""
        if self._chronicle is not None:
            self._chronicle.note(verdict)

    def recover_in_place(self, error: BaseException | None) -> bool:
        """After a step that ended with `error`: whether it was undone, and training goes on from an older one in this process."""
        if self._in_place is None or not self._in_place.is_due(error):
            return False
        if self._chronicle is not None:
            self._chronicle.close(self.step, error or InterruptedError("another rank died"))
            self._chronicle = None
        self._in_place.recover(error, self._enter_again)
        return True

    def _enter_again(self) -> None:
        reset(self._tracked.modules.values(), self._tracked.optimizers.values())
        self._enter()

    def _enter(self) -> None:
        self._held.close()  # of an attempt that somebody's death has ended
        try:
            self._enter_together()
        except BaseException:
            self._held.close()
            raise

    def _enter_together(self) -> None:
        """What ranks have to tell each other is gathered up: each time they wait for the slowest, and recovery is made of that."""
        started, entered_s = time.perf_counter(), time.time()
        env = Environment.read()
        if os.environ.get("HOLDFAST_FAULTS"):
            arm_from_text(os.environ["HOLDFAST_FAULTS"], role="trainer", place=env.rank)
        team, clock = Team(env), _Clock()
        memory = Path(self._settings.memory_dir) if self._settings.memory_dir else env.memory
        records = records_of(self._settings.checkpoints, self.name)
        met = self._meet(team, env, memory, records, entered_s)
        place = met.places[team.rank]
        clock.lap("agree")
        nodes = {node: node_memory(memory, self.name, node) for node in (*place.nodes_here, *place.guests)}
        starting: dict[str, Any] = {"kind": env.keepers, "ray_address": env.ray_address, "bind": env.bind}
        if self._in_place is not None:
            starting["cradle"] = self._in_place.line.cradle

        def ask() -> list[Any]:
            return [ask_once(at, "survey") for at in nodes.values()] if place.leads_host else []

        def first_ask() -> dict[str, Any]:
            if place.leads_host:
                ensure_keepers(self.name, list(nodes), memory, **starting)
            clock.lap("keepers")
            return {"surveys": ask(), "words": words_here(records, met.attempt, team.rank, team.world)}

        told = team.all(first_ask)
        clock.lap("survey")
        heard = [[Survey.from_json(found) for found in item["surveys"]] for item in told]
        own = nodes[place.node]
        sources = {node: at for node, at in nodes.items() if node in place.guests or (node == place.node and place.leads_node)}
        host = Endpoint.read(own).member.host
        links: list[Link] = []

        def attach() -> None:
            for link in links:
                link.close()
            links[:] = [Link(own, team.rank, env.launch, self._room_needed(team))]
            self._held.callback(links[0].close)

        surveys = [survey for found in heard for survey in found]
        checkpoints = self._settings.checkpoints
        around = restore.Around(
            sources=sources,
            host=host,
            checkpoints=checkpoints,
            known=met.known,
            elsewhere=met.elsewhere,
            stages=met.stages,
            lap=clock.lap,
            attach=attach,
        )
        restored = restore.newest(self._tracked, team, around, surveys)
        if restored.recovery is None and met.begun:
            raise RestartNeeded("no step has been committed yet, and this process has begun one")
        if restored.plan is None:
            team.all(attach)
        link = links[0]
        if not self._join(team, met.places, own, restored, heard, ask):
            raise ClusterError(
                f"the keepers of {self.name} could not enter an epoch together in {JOIN_TRIES} attempts; start again"
            )
        clock.lap("join")
        revive = partial(revive_keeper, self.name, place.node, memory, **starting)
        self._lifeline = Lifeline(link, revive)
        self._held.callback(self._lifeline.close)
        self._start(link, team.rank, restored)
        self._witness = Witness.summoned(os.environ, team.rank)
        if self._witness is not None:
            rung = restored.recovery.rung if restored.recovery else None
            self._witness.started(self.step, rung, link.page["epoch"], self._tracked)
        if self._note is not None and restored.recovery is not None and restored.recovery.rung is Rung.SUBSTITUTE:
            self._note.guard()
        if restored.recovery is not None:
            self.recovery = restored.recovery.timed(time.perf_counter() - started, clock.laps)
            self._report(team)
        words = words_of_all(item["words"] for item in told)
        self._chronicle = Chronicle.open(
            team,
            job=self.name,
            checkpoints=checkpoints,
            objects=self._tracked.objects,
            step=self.step,
            entered_s=entered_s,
            in_place=self._in_place is not None and restored.recovery is not None,
            recovery=self.recovery,
            phases=clock.laps,
            before=Before(met.attempt, words, met.born_s, met.entered_s),
        )
        self._begin_pulse(link)

    def _begin_pulse(self, link: Link) -> None:
        if not self._settings.diagnose_s:
            return
        after_s, held = self._settings.diagnose_s, self._tracked.held()

        def tell(verdict: Verdict) -> None:
            announce(verdict)
            self._keep_verdict(verdict)

        sums = self._running().take_sums
        self._heart = Heart(link.memory, lambda: link.who, step=self.step, after_s=after_s, held=held, sums=sums, tell=tell)
        self._held.callback(self._heart.stop)

    def _meet(self, team: Team, env: Environment, memory: Path, records: Path, entered_s: float) -> _Met:
        """All that can be told before anything is known of the others. Raises LayoutMismatch where ranks hold what does not fit
        together: every rank holds what the layout says it holds, and nobody has another shape for the same array."""
        structure = self._structure()
        nodes = min(self._settings.redundancy.nodes_per_host, env.local_world)

        def tell() -> dict[str, Any]:
            known = known_nodes(memory, self.name) if env.local_rank == 0 else []
            for node in known:
                with suppress(KeeperUnreachable):
                    hurry_other(Endpoint.read(node_memory(memory, self.name, node)).pid)
            return {
                "structure": hashlib.blake2b(structure, digest_size=16).hexdigest(),
                "seat": asdict(Seat(env.group_rank, env.local_rank, env.local_world, nodes, tuple(known))),
                "known": restore.look(self._settings.checkpoints, records).to_json() if team.rank == 0 else None,
                "attempt": last_attempt(records),
                "born_s": process_born_s(),
                "entered_s": entered_s,
                "begun": self._begun,
                "stage": asdict(self._note.stage) if self._note else None,
            }

        told = team.all(tell)
        elsewhere = compare(team, structure, [item["structure"] for item in told])
        return _Met(
            places=places_of([Seat(**{**item["seat"], "known": tuple(item["seat"]["known"])}) for item in told]),
            known=restore.Known.from_json(told[0]["known"]),
            attempt=max(item["attempt"] for item in told),
            born_s=max(item["born_s"] for item in told),
            entered_s=max(item["entered_s"] for item in told),
            begun=any(item["begun"] for item in told),
            elsewhere=elsewhere,
            stages=[Stage(**item["stage"]) for item in told if item["stage"]],
        )

    def _structure(self) -> bytes:
        arrays = {
            item.name: [item.placement.spec.dtype, list(item.placement.spec.shape), list(item.placement.expected)]
            for item in self._tracked.held()
            # A spare has not made its optimizer's state yet; what it has to be, the snapshot says.
            if self._in_place is None or item.name.split("/")[0] not in self._tracked.optimizers
        }
        mine = {"objects": sorted(self._tracked.objects), "arrays": arrays, "optimized": sorted(self._tracked.optimized())}
        return json.dumps({**mine, "name": self.name, "settings": repr(self._settings)}, sort_keys=True).encode()

    def _room_needed(self, team: Team) -> int:
        """Bytes of one snapshot of this rank; before the first step, optimizer state is expected at twice the parameters."""
        held = self._tracked.held()
        nbytes = plan_capture(held, team.rank).room_nbytes
        if not any(optimizer.state for optimizer in self._tracked.optimizers.values()):
            nbytes += 2 * plan_capture([item for item in held if item.lazy], team.rank).room_nbytes
        return nbytes

    def _join(
        self,
        team: Team,
        places: Sequence[Place],
        memory: Path,
        restored: Restored,
        heard: list[list[Survey]],
        ask: Callable[[], list[Any]],
    ) -> bool:
        """All keepers enter the same new epoch; from here on the dead of the last one are refused.

        What was `heard` of them a moment ago is asked again when keepers were regrouping meanwhile and have gone further than the
        epoch that was to be entered. False when they have each time.
        """
        place = places[team.rank]
        for _ in range(JOIN_TRIES):
            view = self._view(places, restored, heard)
            if self._sentry is not None:
                self._sentry.know(view.members)
            if team.rank == 0:
                self._explain(view, restored, team.world)

            def enter(view: View = view) -> None:
                if place.leads_node:
                    ask_once(memory, "join", view=view.to_json())

            def begin(view: View = view) -> None:
                if place.leads_node and place.node == view.coordinator:
                    ask_once(memory, "begin")

            outcomes = team.attempt(enter)
            if not any(outcome.error == StaleEpoch.__name__ for outcome in outcomes):
                team.settle(outcomes)
                # Only when all have entered: the coordinator's first message would be refused by one that has not.
                team.all(begin)
                return True
            heard = [[Survey.from_json(found) for found in told] for told in team.all(ask)]
        return False

    def _view(self, places: Sequence[Place], restored: Restored, heard: Sequence[Sequence[Survey]]) -> View:
        found = {survey.member.node: survey for place, told in zip(places, heard, strict=True) for survey in told}
        ranks: dict[int, list[int]] = {}
        for rank, place in enumerate(places):
            ranks.setdefault(place.node, []).append(rank)
        plan = restored.plan
        view = View(
            job=self.name,
            epoch=max(found[node].epoch for node in ranks) + 1,
            world=len(places),
            members=tuple(replace(found[node].member, ranks=tuple(ranks[node])) for node in sorted(ranks)),
            parity=self._settings.redundancy.parity,
            group_size=self._settings.redundancy.group_size,
            every=self._settings.snapshot_every,
            adaptive=self._settings.snapshot_adaptive,
            checkpoint_every=self._settings.checkpoint_every,
            checkpoint_adaptive=self._settings.checkpoint_adaptive,
            failures=restored.rate.failures,
            gpu_hours=restored.rate.gpu_hours,
            checkpoints=self._settings.checkpoints,
            committed=restored.step,
            index=1 if plan is None else plan.index,
            protected=True,
            in_memory=plan is not None,
            spilled=restored.checkpoint,
            grace_s=self._settings.grace_s,
            guests=tuple(found[node].member for place in places for node in place.guests),
        )
        if plan is not None and lies_as(plan, view):
            # A step that is whole and has no parity yet gets it before the next snapshot.
            return replace(view, protected=plan.protected)
        return replace(view, cut_anew=restored.step > 0)

    def _explain(self, view: View, restored: Restored, world: int) -> None:
        parity = self._settings.redundancy.parity
        if view.adaptive or view.checkpoint_adaptive:
            logger.info("%s: %s; intervals follow from that and what saves cost", self.name, restored.rate.text(world))
        if effective_parity(parity, len(view.members)) < parity:
            logger.warning(
                "%d node(s) hold this run: snapshots survive a dying trainer, but not %d lost node(s); only checkpoints do",
                len(view.members),
                parity,
            )
        if any(member.domain for member in view.members):
            for group in view.groups():
                if not group.survives_domain:
                    logger.warning(
                        "nodes %s protect each other and up to %d of them share a failure domain; parity covers %d",
                        list(group.nodes),
                        group.crowding,
                        group.layout.m,
                    )

    def _start(self, link: Link, rank: int, restored: Restored) -> None:
        self.step = restored.step
        link.page["completed"] = self.step
        guards.watch_parameters(link, self._tracked, self._settings.on_nan)
        stats = self.stats
        self._capturer = capturer = Capturer(self._tracked, link, rank)
        capturer.stats = stats  # they count over recoveries in place
        self._held.callback(capturer.close)
        self._held.callback(capturer.settle)
        for optimizer in self._tracked.optimizers.values():
            self._held.callback(Fence(optimizer, capturer.fence, lambda: capturer.is_copying).remove)
        if self._settings.checkpoints is not None and self._settings.grace_s > 0:
            self._held.callback(Preemption(partial(link.terminated, self._settings.grace_s), self._settings.grace_s).close)

    def _report(self, team: Team) -> None:
        recovery = self.recovery
        assert recovery is not None
        emit("recovery.done", job=self.name, rank=team.rank, step=recovery.step, rung=recovery.rung, seconds=recovery.seconds)
        if team.rank == 0:
            logger.info("%s", recovery)

    # -- training --

    def steps(self, until: int) -> Iterator[Step]:
        """Yield step+1 … `until`, each noted as done when the loop asks for the next.

        With `with step:` around the body, a step that was undone because another rank died is followed by the one that training
        goes on from.
        """
        while self.step < until:
            self._begun = True
            step = Step(self.step + 1, self)
            yield step
            if not step.is_undone:
                self.step_done()

    def step_done(self) -> None:
        """Note that one more step is complete, and let it be captured. For loops that do not use `steps`."""
        capturer = self._running()
        started = time.perf_counter()
        self._begun = True
        self.step += 1
        if self._witness is not None:
            self._witness.completed(self.step, self._tracked)
        if self._chronicle is not None:
            self._chronicle.step_done(self.step, capturer.stats.stall_s)
        if self._heart is not None:
            self._heart.step_done(self.step)
        # DDP arranges its buckets after the first step; before that, the order of its sums is not the one to come back to.
        capturer.step_done(self.step, ripe=self.step > 1 or not self._tracked.replicated)
        self._staleness.look(capturer.link.page["committed"], self.step, time.monotonic())
        guards.refuse_poison(capturer.link.page, self.step)
        if self._in_place is not None:
            self._in_place.line.completed(self.step)
        capturer.stats.stall_s += time.perf_counter() - started
        guards.tell(capturer.link.page, capturer.stats)

    def note_loss(self, loss: float) -> None:
        """Tell the loss of the step at hand, on every rank or on those that have one; in the step's body.

        A loss that is no number, or far above those of the steps before, is reported as any other trouble is (`detector.verdict`).
        After a stage was substituted, the losses from before say whether training has come back. Costs a microsecond; fetching a
        loss from a GPU is up to the caller.
        """
        if self._heart is not None:
            self._heart.note_loss(self.step + 1, float(loss))
        if self._note is not None:
            self._note.look(float(loss))

    def _running(self) -> Capturer:
        if self._capturer is None:
            raise StateError("this run has not been entered; use it as `with holdfast.protect(…) as run:`")
        return self._capturer

    # -- leaving --

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        capturer = self._running()
        try:
            capturer.settle()
            if kind is None:
                if self._witness is not None:
                    self._witness.ended(self.step)
                self._finish(capturer)
                if self._in_place is not None:
                    self._in_place.leave()
        except KeeperUnreachable as problem:
            logger.error("the last snapshot of %s is not committed, its keeper is gone: %s", self.name, problem)
        finally:
            if self._chronicle is not None:
                self._chronicle.close(self.step, error)
            if self._heart is not None:
                self._heart.close()
            if self._sentry is not None:
                self._sentry.close()
            self._held.close()

    def _finish(self, capturer: Capturer) -> None:
        """Let the last step be captured, committed and written; the keepers then give the memory back.

        Raises CheckpointFailed when the last step was to become a checkpoint and did not; the keepers then hold on to it.
        """
        link = capturer.link
        if self._heart is not None:
            self._heart.close()
        link.finishing(self.step, keep=self._settings.checkpoints is not None)
        deadline = time.monotonic() + LEAVING_TIMEOUT_S
        while not link.is_over():
            capturer.step_done(self.step)
            if self._in_place is not None:
                self._in_place.check_alive()
            time.sleep(0.005)
            if self._lifeline is not None and self._lifeline.is_lost:
                raise KeeperUnreachable(f"its memory {link.memory} is gone with it")
            if self._sentry is not None and self._sentry.lost:
                raise ClusterError(f"while the run was being completed: {'; '.join(map(str, self._sentry.lost))}")
            if time.monotonic() > deadline:
                logger.error("step %d was not committed within %.0f s; leaving without it", self.step, LEAVING_TIMEOUT_S)
                return
        if link.page["unsaved"]:
            problem = link.ask("ending")["problem"]
            raise CheckpointFailed(
                f"{self.name} has ended at step {self.step} and is not saved: {problem}. Its keepers hold on to step "
                f"{self.committed_step} in memory: clear the cause and start the run again, it goes on from there and saves it"
            )


# -- helpers -----------------------------------------------------------------------------------------------------------------


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True, slots=True)
class _Met:
    """What the ranks have told each other first: where each stands, what storage knows, and of the attempt before this one."""

    places: list[Place]
    known: restore.Known
    attempt: int
    born_s: float
    entered_s: float
    begun: bool
    elsewhere: frozenset[str]
    """Names of arrays and optimized parameters that some rank answers for."""
    stages: list[Stage]
