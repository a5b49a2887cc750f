"""Mesa's scheme (Pan et al., arXiv:2111.11124): unsigned 8-bit codes between running minima and maxima, one pair per head.

The published kernel clamps codes at 0 but not at 255 and stores them in 8 bits, so a value above the running maximum wraps
around to a small one. `clamp=True` repairs that; `clamp=False` is kept to show the difference. Ranges travel with the packed
tensor, because by the time backward runs another forward may have moved the running ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from holdfast.errors import ConfigError
from holdfast.kernels.quant.philox import uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningSpec:
    """`heads` groups of the last dimension share one range each; `decay` is the weight of the past (Mesa: 0.9)."""

    heads: int = 1
    decay: float = 0.9
    clamp: bool = True
    stochastic: bool = True

    def __post_init__(self) -> None:
        if self.heads < 1 or not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"need heads >= 1 and 0 <= decay < 1; got {self.heads} and {self.decay}")


@dataclass(frozen=True, slots=True)
class RunningPacked:
    """uint8 codes of the tensor's own shape and the (heads,) minima and steps they were made with."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: torch.Tensor
    minima: torch.Tensor
    steps: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.minima.nbytes + self.steps.nbytes


class RunningRange:
    """The running range of one saved tensor of one layer. Not thread-safe; one per place that saves."""

    def __init__(self, spec: RunningSpec) -> None:
        self.spec = spec
        self.low: torch.Tensor | None = None
        self.high: torch.Tensor | None = None

    def quantize(self, x: torch.Tensor, *, seed: int = 0, stream: int = 0) -> RunningPacked:
        """Moves the range towards `x` (..., heads * channels), then packs `x` by it. ConfigError if heads do not divide."""
        heads = self.spec.heads
        if x.ndim == 0 or x.shape[-1] % heads:
            raise ConfigError(f"{heads} heads do not divide a tensor of shape {tuple(x.shape)}")
        grouped = x.detach().to(torch.float32).reshape(-1, heads, x.shape[-1] // heads)
        low, high = self._update(grouped)
        step = ((high - low) / 255.0).clamp(min=2.0**-100)
        codes = (grouped - low[:, None]) / step[:, None]
        if self.spec.stochastic:
            codes = torch.floor(codes + uniform(codes.numel(), seed, stream, x.device).reshape(codes.shape))
        else:
            codes = torch.round(codes)
        codes = codes.clamp(0, 255) if self.spec.clamp else codes.clamp(min=0).remainder(256)  # the wrap of a uint8 store
        return RunningPacked(tuple(x.shape), x.dtype, codes.to(torch.uint8).reshape(x.shape), low, step)

    def _update(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = grouped.amin(dim=(0, 2)), grouped.amax(dim=(0, 2))
        if self.low is not None and self.high is not None:
            keep = self.spec.decay
            low, high = torch.lerp(low, self.low, keep), torch.lerp(high, self.high, keep)
        self.low, self.high = low, high
        return low, high


def dequantize_running(packed: RunningPacked) -> torch.Tensor:
    """A contiguous tensor of the packed shape and dtype."""
    heads = packed.minima.numel()
    grouped = packed.codes.reshape(-1, heads, packed.shape[-1] // heads).to(torch.float32)
    values = grouped * packed.steps[:, None] + packed.minima[:, None]
    return values.to(packed.dtype).reshape(packed.shape)
