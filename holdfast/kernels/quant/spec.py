"""How a tensor is stored in few bits.

A `QuantSpec` says everything a back end needs and nothing about where it runs, so two machines that hold the same spec and
the same tensor make the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from holdfast.errors import ConfigError

Kind = Literal["int8", "int4", "int2", "mxint8", "mxfp8", "mask1"]
ScaleFormat = Literal["fp32", "bf16", "e8m0"]
Rounding = Literal["nearest", "stochastic"]

BITS: dict[Kind, int] = {"int8": 8, "int4": 4, "int2": 2, "mxint8": 8, "mxfp8": 8, "mask1": 1}
SCALE_BYTES: dict[ScaleFormat, int] = {"fp32": 4, "bf16": 2, "e8m0": 1}
MX_BLOCK = 32  # OCP Microscaling Formats 1.0 fixes it


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
    """Element format, how many elements share a scale, and how values between two codes are rounded.

    `kind` is the element: `int8`, `int4`, `int2` (2 bits are for studies: training with them drifted in our measurements),
    `mxint8` and `mxfp8` (OCP Microscaling 1.0: blocks of 32, power-of-two scales), or `mask1` (one bit for tensors that hold
    only 0 and one other value per block, lossless for those).

    `block` elements share a scale. With `axis=None` blocks run through the tensor in memory order. With `axis=(a, …)` they
    run along those dimensions and never cross the others: for keys shaped (batch, head, token, channel), `axis=(-2,)` is one
    scale per channel and 64 tokens (the key layout of KIVI, arXiv:2402.02750), `axis=(-1,)` with `block=None` one per token,
    `axis=(-2, -1)` with `block=None` one per head.

    Asymmetric specs store the block's minimum too and spend the whole code range between minimum and maximum.

    A block that holds NaN or an infinity comes back as NaN throughout (`nonfinite="poison"`, no device synchronisation), or
    is refused when it is packed (`"error"`).
    """

    kind: Kind = "int8"
    symmetric: bool = True
    block: int | None = 64
    axis: tuple[int, ...] | None = None
    scale: ScaleFormat = "bf16"
    rounding: Rounding = "nearest"
    nonfinite: Literal["poison", "error"] = "poison"

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, BITS)
        _one_of("scale", self.scale, SCALE_BYTES)
        _one_of("rounding", self.rounding, ("nearest", "stochastic"))
        _one_of("nonfinite", self.nonfinite, ("poison", "error"))
        if self.block is None and self.axis is None:
            raise ConfigError("block=None needs axis=(…): one scale for a whole tensor lets one outlier erase the rest")
        if self.block is not None and (self.block < 32 or self.block > 256 or self.block & (self.block - 1)):
            raise ConfigError(f"block must be 32, 64, 128, 256, or None together with axis; got {self.block}")
        if self.axis is not None and (not self.axis or len(set(self.axis)) != len(self.axis)):
            raise ConfigError(f"axis must name at least one dimension, each once; got {self.axis}")
        if self.kind in ("mxint8", "mxfp8") and (self.block != MX_BLOCK or self.scale != "e8m0" or not self.symmetric):
            raise ConfigError(f'{self.kind} is defined for block=32, scale="e8m0", symmetric=True; got {self}')
        if self.kind not in ("mxint8", "mxfp8") and self.scale == "e8m0":
            raise ConfigError(f'scale="e8m0" belongs to mxint8 and mxfp8; {self.kind} takes "fp32" or "bf16"')
        if self.kind == "mask1" and (not self.symmetric or self.scale != "fp32" or self.rounding != "nearest"):
            raise ConfigError('mask1 is exact: it takes symmetric=True, scale="fp32", rounding="nearest"')
        if self.kind == "mxfp8" and self.rounding == "stochastic":
            raise ConfigError("mxfp8 rounds to nearest only; take mxint8 for stochastic rounding")

    @property
    def bits(self) -> int:
        """Bits of one code, without its share of the scale."""
        return BITS[self.kind]

    @property
    def code_max(self) -> int:
        """Largest code: 127, 7, 1 symmetric (never -128, which biases gradients: arXiv:2510.25602), 255, 15, 3 asymmetric."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


def _one_of(name: str, value: object, accepted: object) -> None:
    names = tuple(accepted)  # type: ignore[var-annotated, arg-type]  # a dict or a tuple of strings
    if value not in names:
        raise ConfigError(f"{name} must be one of {', '.join(names)}; got {value!r}")


INT8 = QuantSpec(kind="int8")
INT4 = QuantSpec(kind="int4", symmetric=False)
INT2 = QuantSpec(kind="int2", symmetric=False, block=32)
MXINT8 = QuantSpec(kind="mxint8", block=MX_BLOCK, scale="e8m0")
MXFP8 = QuantSpec(kind="mxfp8", block=MX_BLOCK, scale="e8m0")
MASK1 = QuantSpec(kind="mask1", scale="fp32")
KIVI_KEY4 = QuantSpec(kind="int4", symmetric=False, axis=(-2,))
KIVI_VALUE4 = QuantSpec(kind="int4", symmetric=False, axis=(-1,))
