"""The oracle: quantize and dequantize in plain torch.

Every step is either integer arithmetic or one IEEE operation whose result no compiler may change: between a product and the
sum after it there is always a clamp or an exact factor, so fusing the two cannot alter a bit. Other back ends must return
the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from holdfast.kernels.quant import bits as b
from holdfast.kernels.quant.packed import Packed, blocking, cut, join, valid_mask
from holdfast.kernels.quant.philox import uniform

if TYPE_CHECKING:
    from holdfast.kernels.quant.spec import QuantSpec

Encoded = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def quantize(x: torch.Tensor, spec: QuantSpec, *, seed: int = 0, stream: int = 0) -> Packed:
    """`x` packed by `spec`, on the device of `x`."""
    plan = blocking(tuple(x.shape), spec)
    blocks, valid = cut(x, plan), valid_mask(plan, x.device)
    noise = None
    if spec.rounding == "stochastic":
        noise = uniform(blocks.numel(), seed, stream, x.device).reshape(blocks.shape)
    codes, scales, minima = encode_blocks(blocks, valid, noise, spec)
    return Packed(spec, tuple(x.shape), x.dtype, codes.reshape(-1), scales, minima)


def dequantize(packed: Packed) -> torch.Tensor:
    """A contiguous tensor of the packed shape and dtype."""
    plan = blocking(packed.shape, packed.spec)
    codes = packed.codes.reshape(plan.n_blocks, plan.block * packed.spec.bits // 8)
    values = decode_blocks(codes, packed.scales, packed.minima, packed.spec, packed.dtype)
    return join(values, plan, packed.shape)


def encode_blocks(blocks: torch.Tensor, valid: torch.Tensor | None, noise: torch.Tensor | None, spec: QuantSpec) -> Encoded:
    """Packed code bytes (n_blocks, bytes), scales and minima (n_blocks,) of (n_blocks, block) values."""
    if spec.kind == "mask1":
        return _encode_mask(blocks, valid)
    x = blocks.to(torch.float32)
    amax_bits = _amax_bits(x)
    bad = amax_bits >= b.INF_BITS
    x = torch.where(bad[:, None], 0.0, x)
    if spec.kind in ("mxint8", "mxfp8"):
        codes, scales = _encode_mx(x, amax_bits, bad, noise, spec)
        minima = None
    else:
        codes, scales, minima = _encode_int(x, amax_bits, bad, noise, spec)
    if valid is not None:
        codes = torch.where(valid, codes, 0)
    return b.pack_codes(codes, spec.bits), scales, minima


def decode_blocks(
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    minima: torch.Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(n_blocks, block) values of `dtype` from packed code bytes."""
    signed = spec.symmetric and spec.kind not in ("mask1", "mxfp8")
    wide = b.unpack_codes(codes, spec.bits, signed=signed)
    if scales is None:
        return wide.to(torch.bool)
    if spec.scale == "e8m0":
        values = _decode_mx(wide, scales, spec)
    else:
        values = wide.to(torch.float32) * scales.to(torch.float32)[:, None]
        if minima is not None:
            values = values + minima.to(torch.float32)[:, None]
    return values.to(dtype)


def _amax_bits(x: torch.Tensor) -> torch.Tensor:
    """Bit pattern of each block's largest magnitude. As integers, so that NaN is larger than infinity on every device."""
    return (b.float_bits(x) & b.ABS_MASK).amax(dim=1)


def _encode_int(
    x: torch.Tensor, amax_bits: torch.Tensor, bad: torch.Tensor, noise: torch.Tensor | None, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    top = spec.code_max
    low = -top if spec.symmetric else 0
    minima = None
    if spec.symmetric:
        spread = torch.where(bad, 0.0, b.bits_float(amax_bits))
    else:
        minima = _storable_floor(x.amin(dim=1), spec)
        spread = x.amax(dim=1) - minima
        x = x - minima[:, None]
    scale = (spread * (1.0 / top)).clamp(min=b.TINY)
    scale = b.ceil_to_bf16(scale) if spec.scale == "bf16" else scale
    bad = bad | (b.float_bits(scale) >= b.INF_BITS)  # maximum - minimum, or rounding up, can overflow
    scale = torch.where(bad, b.TINY, scale)
    codes = _round((x * (1.0 / scale)[:, None]).clamp(low, top), noise, low, top)
    codes = torch.where(bad[:, None], 0, codes)
    stored = torch.where(bad, b.NAN_BITS, b.float_bits(scale))
    return codes, _store(stored, spec), None if minima is None else _store(b.float_bits(minima), spec)


def _store(bits: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """float32 patterns in the scales' dtype. By integers: a cast to bfloat16 gives NaN a pattern that varies by code path."""
    if spec.scale == "bf16":
        return (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return bits.view(torch.float32)


def _storable_floor(minimum: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    if spec.scale == "bf16":
        return b.floor_to_bf16(minimum)
    return torch.where(minimum == 0, 0.0, minimum)  # -0 and +0 may both win a minimum; store one of them


def _round(y: torch.Tensor, noise: torch.Tensor | None, low: int, top: int) -> torch.Tensor:
    if noise is None:
        return torch.round(y).to(torch.int32)
    # Clamped again: 127 + 0.99999994 is 128 in float32.
    return torch.floor(y + noise).clamp(low, top).to(torch.int32)


def _encode_mx(
    x: torch.Tensor, amax_bits: torch.Tensor, bad: torch.Tensor, noise: torch.Tensor | None, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    element_exponent = 8 if spec.kind == "mxfp8" else 0  # of the largest power of two an element can hold
    exponent = ((amax_bits >> 23) - 127 - element_exponent).clamp(min=b.TINY_EXPONENT)
    exponent = torch.where(bad, 0, exponent)
    fraction = 0 if spec.kind == "mxfp8" else 6  # an MXINT8 element is an integer times 2**-6
    y = x * b.bits_float((127 + fraction - exponent) << 23)[:, None]
    codes = b.fp8_e4m3_encode(y) if spec.kind == "mxfp8" else _round(y.clamp(-127.0, 127.0), noise, -127, 127)
    return codes, torch.where(bad, 0xFF, exponent + 127).to(torch.uint8)  # 0xFF is E8M0's NaN


def _decode_mx(wide: torch.Tensor, scales: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    biased = scales.to(torch.int32)
    scale = torch.where(biased == 0xFF, float("nan"), b.bits_float(biased << 23))[:, None]
    if spec.kind == "mxfp8":
        return b.fp8_e4m3_decode(wide) * scale
    return wide.to(torch.float32) * 2.0**-6 * scale


def _encode_mask(blocks: torch.Tensor, valid: torch.Tensor | None) -> Encoded:
    is_set = blocks != 0
    if valid is not None:
        is_set = is_set & valid
    codes = b.pack_codes(is_set.to(torch.int32), 1)
    if blocks.dtype == torch.bool:
        return codes, None, None
    x = blocks.to(torch.float32)
    amax_bits = _amax_bits(x)
    signed = torch.where((x < 0).any(dim=1), amax_bits | -0x80000000, amax_bits)
    return codes, b.bits_float(torch.where(amax_bits >= b.INF_BITS, b.NAN_BITS, signed)), None
