"""What a rehearsal came to, for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from holdfast.elastic.faults.verdict import Outcome, Verdict


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many of each; silent errors are named even when there are none, because that is the question."""
    found = Counter(outcome.verdict for outcome in outcomes)
    named = {verdict.value.lower().replace(" ", "_"): number for verdict, number in found.items()}
    return {"recovered": 0, "loud_error": 0, "silent_error": 0, **named}


def report_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One line for each schedule, the reason beneath it where there is one, and the counts."""
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    for outcome in outcomes:
        yield f"{outcome.name:<{width}}  {outcome.verdict.value:<12}  {outcome.seconds:5.1f} s  {_restores(outcome)}".rstrip()
        if outcome.detail:
            yield f"    {outcome.detail}"
    yield ""
    number = counts(outcomes)
    named = {key.replace("_", " "): count for key, count in number.items()}
    yield f"{len(outcomes)} schedule{'' if len(outcomes) == 1 else 's'}: " + ", ".join(
        f"{count} {key}{_s(key, count)}" for key, count in named.items()
    )


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    rows = [
        {
            "name": outcome.name,
            "faults": list(outcome.faults),
            "verdict": outcome.verdict.value.lower(),
            "detail": outcome.detail,
            "restores": [{"step": step, "rung": rung} for step, rung in outcome.restores],
            "seconds": round(outcome.seconds, 2),
        }
        for outcome in outcomes
    ]
    return {"schedules": rows, "counts": counts(outcomes), "ok": is_good(outcomes)}


def is_good(outcomes: Sequence[Outcome]) -> bool:
    return bool(outcomes) and not any(outcome.verdict.is_failure for outcome in outcomes)


def _restores(outcome: Outcome) -> str:
    if outcome.verdict is Verdict.SKIPPED:
        return ""
    return ", ".join(f"step {step} from {rung}" for step, rung in outcome.restores) or "nothing to restore"


def _s(key: str, count: int) -> str:
    return "s" if key.endswith("error") and count != 1 else ""
