"""Which source a recovery takes, and why: every rung has a price in seconds, and the cheapest that loses nothing needlessly wins.

Pure. Whoever looked around hands in what was found, as offers; the plan is the order in which to try them, so that a rung that
fails falls to the next. The price of an offer is the time to restore from it and the work to be done again; both are measured where
this run has been through it before, and assumed otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from holdfast.elastic.incidents import Incident


class Rung(StrEnum):
    """The sources, in the order in which they are tried when prices are equal."""

    RETRY = "retry"
    REPLICA = "DP replica"
    OWN = "own keeper"
    PARITY = "parity"
    OLDER = "older slot"
    CHECKPOINT = "universal checkpoint"
    SUBSTITUTE = "stage substitution"


_ORDER = {rung: place for place, rung in enumerate(Rung)}

ASSUMED_S: Mapping[Rung, float] = {
    Rung.RETRY: 0.05,
    Rung.REPLICA: 0.2,
    Rung.OWN: 0.5,
    Rung.PARITY: 2.0,
    Rung.OLDER: 0.5,
    Rung.CHECKPOINT: 30.0,
    Rung.SUBSTITUTE: 1.0,
}
"""Until a run has measured its own. Only their order matters much: they are small beside a step done again."""

WORTH_S = 30.0
"""A committed step is not given up for less. Below, the difference of two estimates is no reason to lose work that was safe."""

RESTORING = ("rebuild", "load", "checkpoint")
"""The phases of an incident that belong to its rung, and not to finding out which."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds to restore by rung, of a step, and how far the run had come; what is not known is not in `restore_s`, or zero."""

    restore_s: Mapping[str, float] = field(default_factory=dict)
    step_s: float = 0.0
    reached_step: int = 0

    def of(self, rung: Rung) -> tuple[float, str]:
        return (self.restore_s[rung], "measured") if rung in self.restore_s else (ASSUMED_S[rung], "assumed")


@dataclass(frozen=True, slots=True)
class Offer:
    """A source that could be used: back to `step`. `is_lossy` where the state will not be what it was."""

    rung: Rung
    step: int
    is_lossy: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """An offer with its price, and a line saying how it came about."""

    offer: Offer
    seconds: float
    why: str


def measured_prices(incidents: Iterable[Incident], *, step_s: float = 0.0, reached_step: int = 0) -> Prices:
    """What this run's earlier recoveries cost: the median of each rung."""
    seen: dict[str, list[float]] = {}
    for incident in incidents:
        if incident.rung:
            seen.setdefault(incident.rung, []).append(sum(incident.phases.get(name, 0.0) for name in RESTORING))
    return Prices({rung: median(seconds) for rung, seconds in seen.items()}, step_s, reached_step)


def plan_ladder(offers: Sequence[Offer], prices: Prices, *, worth_s: float = WORTH_S) -> list[Choice]:
    """The offers in the order in which to try them, each with its reason. The first is the choice.

    What is exact comes before what is lossy. Among the exact ones the newest step wins, unless an older one is cheaper by more than
    `worth_s`; of the same step, the cheaper source.
    """
    newest = max((offer.step for offer in offers if not offer.is_lossy), default=0)
    reached = max(prices.reached_step, newest)
    priced = [(offer, *_price(offer, prices, reached)) for offer in offers]
    priced.sort(
        key=lambda item: (item[0].is_lossy, item[1] + worth_s * (item[0].step < newest), _ORDER[item[0].rung], -item[0].step)
    )
    return [Choice(offer, seconds, f"{offer.rung}, step {offer.step}: {text}") for offer, seconds, text in priced]


def _price(offer: Offer, prices: Prices, reached: int) -> tuple[float, str]:
    restore_s, source = prices.of(offer.rung)
    again = max(0, reached - offer.step)
    seconds = restore_s + again * prices.step_s
    text = f"{restore_s:.2f} s to restore ({source})"
    if again:
        text += f" and {again} step(s) to do again" + (f", {again * prices.step_s:.1f} s" if prices.step_s else "")
    return seconds, text + (", not what it was" if offer.is_lossy else "")
