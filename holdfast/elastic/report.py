"""What happened to a run: its incidents, where its time went, how often it fails, and what follows for the next saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.elastic.accounting import Account, account
from holdfast.elastic.incidents import Incident, read_incidents
from holdfast.elastic.interval import FailureRate
from holdfast.elastic.journal import histories, read_journals
from holdfast.snapshot.interval import daly, young


@dataclass(frozen=True, slots=True)
class Advice:
    """From this run's own failures and costs: how far apart failures are, and the best distance of saves that cost `cost_s`."""

    failures: int
    gpu_hours: float
    mtbf_s: float
    mtbf_low_s: float
    mtbf_high_s: float
    cost_s: float
    young_s: float
    daly_s: float


@dataclass(frozen=True, slots=True)
class Report:
    run: str
    attempts: int
    worlds: tuple[int, ...]
    last_step: int
    began_s: float
    ended_s: float
    ettr: float
    account: Account
    incidents: tuple[Incident, ...]
    advice: Advice


def make_report(run: str, places: Sequence[Path]) -> Report:
    """Read the journals and incidents of a run and put them together. Raises CorruptData where one is damaged."""
    journals = read_journals(places)
    attempts = histories(journals)
    present = {attempt[0].begin.attempt for attempt in attempts}
    incidents = [item for place in places for item in read_incidents(place) if item.attempt in present]
    found = account(journals)
    worlds = tuple(attempt[0].begin.world for attempt in attempts)
    return Report(
        run=run,
        attempts=len(attempts),
        worlds=worlds,
        last_step=max((journal.last_step for journal in attempts[-1]), default=0) if attempts else 0,
        began_s=min((span.start_s for span in found.spans), default=0.0),
        ended_s=max((span.end_s for span in found.spans), default=0.0),
        ettr=found.ettr,
        account=found,
        incidents=tuple(sorted(incidents, key=lambda item: item.attempt)),
        advice=_advise(len(incidents), found, max(worlds, default=1)),
    )


def _advise(failures: int, found: Account, world: int) -> Advice:
    rate = FailureRate.learned(failures, found.rank_seconds / 3600)
    mtbf_s, cost_s = rate.mtbf_s(world), found.stall_per_step_s
    low, high = rate.mtbf_range_s(world)
    return Advice(failures, found.rank_seconds / 3600, mtbf_s, low, high, cost_s, young(cost_s, mtbf_s), daly(cost_s, mtbf_s))
