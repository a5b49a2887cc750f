"""Low-rank and outlier correction of a quantized tensor, after GEAR (Kang et al., arXiv:2403.05527).

The largest values are set aside exactly; the rest is quantized; a few singular vectors per head take up most of the error left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from holdfast.errors import ConfigError
from holdfast.kernels.quant import Packed, QuantSpec, dequantize, quantize


@dataclass(frozen=True, kw_only=True, slots=True)
class GearSpec:
    """`rank` singular vectors of the error per (batch, head), and the fraction `outliers` of values kept exact."""

    rank: int = 2
    outliers: float = 0.005

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0.0 <= self.outliers < 0.5:
            raise ConfigError(f"need rank >= 0 and 0 <= outliers < 0.5; got {self.rank} and {self.outliers}")


@dataclass(frozen=True, slots=True)
class GearPacked:
    """A packed tensor (…, rows, columns), outliers by flat position, and factors (…, rows, rank) and (…, columns, rank)."""

    packed: Packed
    positions: torch.Tensor
    values: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + sum(t.nbytes for t in (self.positions, self.values, self.left, self.right))


def quantize_gear(x: torch.Tensor, spec: QuantSpec, gear: GearSpec) -> GearPacked:
    """`x` (…, rows, columns) packed by `spec` with its correction; factors are stored in bfloat16, outliers in x's dtype."""
    count = int(x.numel() * gear.outliers)
    positions = x.abs().reshape(-1).topk(count).indices.to(torch.int32)
    flat = x.reshape(-1)
    values = flat[positions.long()]
    rest = flat.index_fill(0, positions.long(), 0.0).view(x.shape)
    packed = quantize(rest, spec)
    left, right = _factors((rest - dequantize(packed)).float(), gear.rank)
    return GearPacked(packed, positions, values, left.bfloat16(), right.bfloat16())


def dequantize_gear(g: GearPacked) -> torch.Tensor:
    """A contiguous tensor of the packed shape and dtype."""
    x = dequantize(g.packed).float() + g.left.float() @ g.right.float().transpose(-1, -2)
    x = x.to(g.packed.dtype)
    x.view(-1)[g.positions.long()] = g.values  # outliers come back exact
    return x


def _factors(error: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading singular directions by subspace iteration from fixed columns: no random numbers, so a replay packs the same."""
    rank = min(rank, *error.shape[-2:])
    right = error[..., :rank, :].transpose(-1, -2)
    for _ in range(4):
        left = torch.linalg.qr(error @ right).Q
        right = error.transpose(-1, -2) @ left
    return (left, right) if rank else (error[..., :0], error[..., :0, :].transpose(-1, -2))
