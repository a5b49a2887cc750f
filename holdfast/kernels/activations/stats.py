"""What compression saved, counted honestly: unique regions of memory, not the sum of what operations asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Tally:
    """One module and operation: unique bytes as autograd would have kept them, and as they are kept now."""

    before: int = 0
    after: int = 0
    tensors: int = 0
    errors: list[torch.Tensor] = field(default_factory=list)  # sampled ‖x - x̂‖ / ‖x‖, on the device until asked for
    gradient_errors: list[torch.Tensor] = field(default_factory=list)  # sampled ‖g - ĝ‖ / ‖g‖ of the operation's own gradients


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a report. `error` is the mean sampled relative error of the stored tensors, `gradient_error` that of the
    gradients this operation computed from stored tensors, its own or another's; None if none was sampled."""

    module: str
    op: str
    tensors: int
    bytes_before: int
    bytes_after: int
    error: float | None
    gradient_error: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """Bytes of all forwards since the last reset, weights and buffers left out.

    `bytes_before` counts each region of memory once, `bytes_after` what replaced it (codes, scales, and what stayed exact);
    `on_host` is the part of it that was moved off the device. `peak_live` is the largest number of those bytes held at one
    time, `allocator_peak` the CUDA allocator's own peak since the reset (None without CUDA). `aliases` counts requests
    answered by a region already stored, `weights` those answered by the weight itself.
    """

    rows: tuple[Row, ...]
    bytes_before: int
    bytes_after: int
    on_host: int
    peak_live: int
    allocator_peak: int | None
    aliases: int
    weights: int

    @property
    def ratio(self) -> float:
        """Bytes after by bytes before; 1.0 when nothing was saved."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0

    def __str__(self) -> str:
        lines = [f"{'module':<32} {'op':<28} {'before':>12} {'after':>12} {'error':>9} {'gradient':>9}"]
        for row in self.rows:
            errors = " ".join(f"{'' if e is None else f'{e:.1e}':>9}" for e in (row.error, row.gradient_error))
            lines.append(f"{row.module:<32} {row.op:<28} {row.bytes_before:>12,} {row.bytes_after:>12,} {errors}".rstrip())
        lines.append(f"{'total':<61} {self.bytes_before:>12,} {self.bytes_after:>12,}   {self.ratio:.3f}")
        return "\n".join(lines)


class Stats:
    """Counters of a compressor; `report()` reads them, `reset()` starts again."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.aliases = self.weights = self.live = self.peak_live = self.on_host = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def tally(self, module: str, op: str) -> Tally:
        return self.tallies.setdefault((module, op), Tally())

    def stored(self, module: str, op: str, before: int, after: int) -> Tally:
        tally = self.tally(module, op)
        tally.before += before
        tally.after += after
        tally.tensors += 1
        self.live += after
        self.peak_live = max(self.peak_live, self.live)
        return tally

    def replaced(self, module: str, op: str, before: int) -> None:
        """An operation stored its inputs itself: `before` is what it would have saved."""
        self.tally(module, op).before += before

    def released(self, nbytes: int) -> None:
        self.live -= nbytes

    def report(self) -> Report:
        """The counters as one value. Waits for the device if gradient errors were sampled."""
        rows = tuple(
            Row(module, op, t.tensors, t.before, t.after, _mean(t.errors), _mean(t.gradient_errors))
            for (module, op), t in sorted(self.tallies.items())
        )
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
        return Report(rows, before, after, self.on_host, self.peak_live, peak, self.aliases, self.weights)


def _mean(errors: list[torch.Tensor]) -> float | None:
    return float(torch.stack(errors).mean()) if errors else None
