"""A tensor in few bits, and the way its elements are cut into blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.kernels.quant.spec import QuantSpec

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes and scales of one tensor; everything `dequantize` needs and nothing that points back to the original.

    `codes` is uint8, 1-D, `n_blocks * block * bits / 8` bytes, block after block; codes narrower than a byte fill it from the
    low bits up. `scales` has one entry per block: float32, bfloat16, or uint8 exponents biased by 127. `minima` is there for
    asymmetric specs, in the scales' dtype. A bool tensor packed as `mask1` has no scales.
    """

    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: torch.Tensor
    scales: torch.Tensor | None
    minima: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by codes, scales and minima together, padding of the last block included."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors of this value in the order of the wire format."""
        return tuple(part for part in (self.codes, self.scales, self.minima) if part is not None)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Packed:
        """The same value on `device`."""

        return self.with_parts(tuple(part.to(device, non_blocking=non_blocking) for part in self.parts))

    def with_parts(self, parts: tuple[torch.Tensor, ...]) -> Packed:
        """The same value from copies of its `parts`."""
        codes, scales, minima = (*parts, None, None)[:3]
        assert codes is not None
        return Packed(self.spec, self.shape, self.dtype, codes, scales, minima)


@dataclass(frozen=True, slots=True)
class Blocking:
    """Where the elements of a shape go: `rows` runs of `row_len` elements, each cut into blocks of `block`, the last padded."""

    rows: int
    row_len: int
    block: int
    order: tuple[int, ...] | None  # dimensions in the order the blocks see them; None: memory order as it is

    @property
    def blocks_per_row(self) -> int:
        return -(-self.row_len // self.block)

    @property
    def n_blocks(self) -> int:
        return self.rows * self.blocks_per_row


def blocking(shape: tuple[int, ...], spec: QuantSpec) -> Blocking:
    """The blocks of a tensor of `shape`. Pure. Raises ConfigError when the spec names a dimension the shape lacks."""
    if spec.axis is None:
        assert spec.block is not None  # QuantSpec refuses the other
        return Blocking(1, math.prod(shape), spec.block, None)
    ndim = len(shape)
    if any(a < -ndim or a >= ndim for a in spec.axis):
        raise ConfigError(f"axis={spec.axis} does not fit a tensor of shape {shape}")
    inner = sorted({a % ndim for a in spec.axis})
    if len(inner) != len(spec.axis):
        raise ConfigError(f"axis={spec.axis} names a dimension of shape {shape} twice")
    outer = [d for d in range(ndim) if d not in inner]
    row_len = math.prod(shape[d] for d in inner)
    rows = math.prod(shape[d] for d in outer)
    whole_bytes = row_len + -row_len % (8 // spec.bits)
    # A row shorter than a block gets the next power of two: 16 channels in a block of 64 would be three quarters padding.
    block = max(8, min(spec.block, 1 << max(row_len - 1, 0).bit_length())) if spec.block else max(1, whole_bytes)
    order = (*outer, *inner)
    return Blocking(rows, row_len, block, None if order == tuple(range(ndim)) else order)


def cut(x: torch.Tensor, plan: Blocking) -> torch.Tensor:
    """The elements of `x` as (n_blocks, block). Padding repeats each row's last element: it changes no minimum or maximum."""
    rows = (x if plan.order is None else x.permute(plan.order)).reshape(plan.rows, plan.row_len)
    pad = plan.blocks_per_row * plan.block - plan.row_len
    if pad and rows.numel():
        rows = torch.cat([rows, rows[:, -1:].expand(plan.rows, pad)], dim=1)
    return rows.reshape(plan.n_blocks, plan.block)


def join(blocks: torch.Tensor, plan: Blocking, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `cut`: a contiguous tensor of `shape`."""
    rows = blocks.reshape(plan.rows, plan.blocks_per_row * plan.block)[:, : plan.row_len]
    if plan.order is None:
        return rows.reshape(shape).contiguous()
    permuted = rows.reshape([shape[d] for d in plan.order])
    back = sorted(range(len(shape)), key=lambda d: plan.order[d])  # type: ignore[index]  # narrowed above
    return permuted.permute(back).contiguous()


def valid_mask(plan: Blocking, device: torch.device) -> torch.Tensor | None:
    """True where a block element is real, or None when there is no padding."""
    if plan.blocks_per_row * plan.block == plan.row_len:
        return None
    columns = torch.arange(plan.blocks_per_row * plan.block, device=device) < plan.row_len
    return columns.expand(plan.rows, -1).reshape(plan.n_blocks, plan.block)


def check_packable(x: torch.Tensor, spec: QuantSpec) -> None:
    """Refuses what no back end can pack, before any kernel runs."""
    accepted = (*FLOAT_DTYPES, torch.bool) if spec.kind == "mask1" else FLOAT_DTYPES
    if x.dtype not in accepted:
        names = ", ".join(str(d).removeprefix("torch.") for d in accepted)
        raise ConfigError(f"{spec.kind} packs {names}; got {x.dtype} of shape {tuple(x.shape)}")
    if x.layout != torch.strided:
        raise ConfigError(f"only dense tensors can be packed; got {x.layout}")
