"""How often this job fails, and what share of its time is work. Pure arithmetic; seconds in, seconds out.

How often the job fails is learned while it runs: failures are counted as a Poisson process whose rate has a gamma distribution,
which begins at what was published and moves to what is seen. What follows for saves is in `holdfast.snapshot.interval`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from holdfast.errors import ConfigError
from holdfast.snapshot.interval import PUBLISHED_GPU_HOURS_PER_FAILURE, check_costs


def efficiency(interval_s: float, cost_s: float, mtbf_s: float, restart_s: float = 0.0) -> float:
    """The share of time that is work, with saves every `interval_s` of work (Daly 2006, eq. 20, of exponential failures)."""
    check_costs(cost_s, mtbf_s)
    if interval_s <= 0:
        raise ConfigError(f"an interval of {interval_s} s is none")
    exponent = (interval_s + cost_s) / mtbf_s
    if exponent > 700 or restart_s / mtbf_s > 700:
        return 0.0
    return interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(exponent))


KINDS = 7
"""Of jobs, by how often they fail: as published, ten times as often, … a million times, which is every three minutes of one GPU."""


@dataclass(frozen=True, slots=True)
class FailureRate:
    """What is believed of the failures per GPU-hour: a gamma distribution of shape `failures` and rate `gpu_hours`.

    It begins as one failure seen in 50,700 GPU-hours.
    """

    failures: float = 1.0
    gpu_hours: float = PUBLISHED_GPU_HOURS_PER_FAILURE

    @classmethod
    def learned(cls, failures: int, gpu_hours: float) -> FailureRate:
        """What a job believes that has seen so many failures in so many GPU-hours.

        A small job would need years to outweigh 50,700 GPU-hours. So it may also be of a kind that fails ten, a hundred, … times
        as often as was published, each a tenth as likely as the one before; what it has seen is weighed under each, and the
        likeliest is believed.
        """
        kinds = [cls(gpu_hours=PUBLISHED_GPU_HOURS_PER_FAILURE / 10**tens) for tens in range(KINDS)]
        odds = [kind._log_evidence(failures, gpu_hours) - tens * math.log(10) for tens, kind in enumerate(kinds)]
        return kinds[odds.index(max(odds))].observe(failures, gpu_hours)

    def _log_evidence(self, failures: int, gpu_hours: float) -> float:
        """Logarithm of the probability of what was seen, less what all rates have in common (gamma-Poisson)."""
        seen = math.lgamma(self.failures + failures) - math.lgamma(self.failures)
        longer = self.gpu_hours + gpu_hours
        return seen + self.failures * math.log(self.gpu_hours) - (self.failures + failures) * math.log(longer)

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

    def text(self, gpus: int) -> str:
        """For the log: "one failure is expected every 12.3 h (90 % range 5.1 to 60 h)"."""
        low, high = (f"{seconds / 3600:.2g}" for seconds in self.mtbf_range_s(gpus))
        return f"one failure is expected every {self.mtbf_s(gpus) / 3600:.3g} h (90 % range {low} to {high} h)"

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
