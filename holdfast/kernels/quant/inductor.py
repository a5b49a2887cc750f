"""The reference compiled by Inductor: one fused loop instead of a dozen passes, the same bytes.

The first call for a spec and dtype compiles (seconds); later shapes reuse the code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch

from holdfast.kernels.quant import reference
from holdfast.kernels.quant.packed import Packed, blocking, cut, join, valid_mask
from holdfast.kernels.quant.philox import uniform

if TYPE_CHECKING:
    from holdfast.kernels.quant.spec import QuantSpec


def quantize(x: torch.Tensor, spec: QuantSpec, *, seed: int = 0, stream: int = 0) -> Packed:
    """As `reference.quantize`, compiled."""
    plan = blocking(tuple(x.shape), spec)
    blocks, valid = cut(x, plan), valid_mask(plan, x.device)
    noise = None
    if spec.rounding == "stochastic":
        noise = uniform(blocks.numel(), seed, stream, x.device).reshape(blocks.shape)
    if blocks.numel() == 0:
        return reference.quantize(x, spec, seed=seed, stream=stream)
    codes, scales, minima = _encode(spec)(blocks, valid, noise)
    return Packed(spec, tuple(x.shape), x.dtype, codes.reshape(-1), scales, minima)


def dequantize(packed: Packed) -> torch.Tensor:
    """As `reference.dequantize`, compiled."""
    plan = blocking(packed.shape, packed.spec)
    if plan.n_blocks == 0:
        return reference.dequantize(packed)
    codes = packed.codes.reshape(plan.n_blocks, plan.block * packed.spec.bits // 8)
    return join(_decode(packed.spec, packed.dtype)(codes, packed.scales, packed.minima), plan, packed.shape)


@cache
def _encode(spec: QuantSpec) -> Callable[..., reference.Encoded]:
    def encode(blocks: torch.Tensor, valid: torch.Tensor | None, noise: torch.Tensor | None) -> reference.Encoded:
        return reference.encode_blocks(blocks, valid, noise, spec)

    return torch.compile(encode, dynamic=True, fullgraph=True)


@cache
def _decode(spec: QuantSpec, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def decode(codes: torch.Tensor, scales: torch.Tensor | None, minima: torch.Tensor | None) -> torch.Tensor:
        return reference.decode_blocks(codes, scales, minima, spec, dtype)

    return torch.compile(decode, dynamic=True, fullgraph=True)
