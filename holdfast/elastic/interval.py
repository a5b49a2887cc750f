"""How often to save, from what a save costs and how often this job fails. Pure arithmetic; seconds in, seconds out.

Young 1974 (CACM 17(9)) gives the first order, Daly 2006 (FGCS 22(3), eq. 37) the higher one, which stays right when failures are
almost as frequent as saves. How often the job fails is learned while it runs: failures are counted as a Poisson process whose rate
has a gamma distribution, which begins at what was published and moves to what is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from holdfast.errors import ConfigError

PUBLISHED_GPU_HOURS_PER_FAILURE = 50_700.0
"""419 unexpected interruptions in 54 days of 16,384 GPUs (Llama 3, arXiv 2407.21783, §3.3.4)."""


def young(cost_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves that cost `cost_s` each, to first order."""
    _check(cost_s, mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s)


def daly(cost_s: float, mtbf_s: float) -> float:
    """The same to higher order; the mean time between failures itself where a save costs half of that or more."""
    _check(cost_s, mtbf_s)
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return young(cost_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def efficiency(interval_s: float, cost_s: float, mtbf_s: float, restart_s: float = 0.0) -> float:
    """The share of time that is work, with saves every `interval_s` of work (Daly 2006, eq. 20, of exponential failures)."""
    _check(cost_s, mtbf_s)
    if interval_s <= 0:
        raise ConfigError(f"an interval of {interval_s} s is none")
    exponent = (interval_s + cost_s) / mtbf_s
    if exponent > 700 or restart_s / mtbf_s > 700:
        return 0.0
    return interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(exponent))


def steps_between(cost_s: float, mtbf_s: float, step_s: float) -> int:
    """Daly's interval as a whole number of steps, at least one."""
    return max(1, round(daly(cost_s, mtbf_s) / step_s)) if cost_s > 0 else 1


def _check(cost_s: float, mtbf_s: float) -> None:
    if cost_s < 0 or mtbf_s <= 0:
        raise ConfigError(f"a save costs at least 0 s and failures are more than 0 s apart; got {cost_s} and {mtbf_s}")


@dataclass(frozen=True, slots=True)
class FailureRate:
    """What is believed of the failures per GPU-hour: a gamma distribution of shape `failures` and rate `gpu_hours`.

    It begins as one failure seen in 50,700 GPU-hours, so it gives way to a job's own failures after the first few.
    """

    failures: float = 1.0
    gpu_hours: float = PUBLISHED_GPU_HOURS_PER_FAILURE

    def observe(self, failures: int, gpu_hours: float) -> FailureRate:
        """After seeing so many more failures in so many more GPU-hours."""
        if failures < 0 or gpu_hours < 0:
            raise ConfigError(f"{failures} failures in {gpu_hours} GPU-hours cannot be observed")
        return replace(self, failures=self.failures + failures, gpu_hours=self.gpu_hours + gpu_hours)

    @property
    def per_gpu_hour(self) -> float:
        return self.failures / self.gpu_hours

    def mtbf_s(self, gpus: int) -> float:
        """Mean time between failures of a job of so many GPUs, at the mean of the rate."""
        return 3600 / (self.per_gpu_hour * gpus)

    def mtbf_range_s(self, gpus: int, probability: float = 0.9) -> tuple[float, float]:
        """The shortest and longest mean time between failures that are credible, with this probability in between."""
        tail = (1 - probability) / 2
        fastest, slowest = (self._quantile(share) * gpus / self.gpu_hours for share in (1 - tail, tail))
        return 3600 / fastest, 3600 / slowest

    def _quantile(self, share: float) -> float:
        """Of the gamma distribution with rate 1, by bisection."""
        low, high = 0.0, self.failures + 20 * math.sqrt(self.failures) + 20
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _gamma_below(self.failures, middle) < share else (low, middle)
        return high


def _gamma_below(shape: float, x: float) -> float:
    """The regularized lower incomplete gamma function, by its series (Abramowitz and Stegun 6.5.29)."""
    term = total = 1.0
    count = 0
    while term > total * 1e-15:
        count += 1
        term *= x / (shape + count)
        total += term
    return min(1.0, total * math.exp(shape * math.log(x) - x - math.lgamma(shape + 1))) if x > 0 else 0.0
