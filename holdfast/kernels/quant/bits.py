"""Encodings by integer arithmetic on float32 bit patterns.

Hardware casts are no oracle: Triton's interpreter truncates to bfloat16 where torch rounds to even, and fp8 casts differ in
ties and saturation. Integers agree everywhere, so every back end spells these functions with the same integer steps.
"""

from __future__ import annotations

import torch

ABS_MASK = 0x7FFFFFFF
INF_BITS = 0x7F800000
NAN_BITS = 0x7FC00000
TINY = 2.0**-100  # smallest scale: below it blocks are zeros, and no step meets a subnormal that a GPU might flush
TINY_EXPONENT = -100
FP8_MAX_BITS = 0x43E00000  # 448.0, the largest float8_e4m3fn
FP8_MIN_NORMAL_BITS = 0x3C800000  # 2**-6


def float_bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


def bits_float(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def ceil_to_bf16(positive: torch.Tensor) -> torch.Tensor:
    """The smallest bfloat16 that is not below each positive float32, as float32."""
    return bits_float((float_bits(positive) + 0xFFFF) & -0x10000)


def floor_to_bf16(x: torch.Tensor) -> torch.Tensor:
    """The largest bfloat16 that is not above each finite float32, as float32; zero comes back as +0."""
    bits = float_bits(x)
    magnitude = bits & ABS_MASK
    rounded = torch.where(bits < 0, (magnitude + 0xFFFF) | -0x80000000, magnitude) & -0x10000
    return bits_float(torch.where(magnitude == 0, 0, rounded))


def fp8_e4m3_encode(x: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn codes (as int32) of finite float32, round to nearest even, saturating at ±448."""
    bits = float_bits(x)
    sign = (bits >> 24) & 0x80
    magnitude = (bits & ABS_MASK).clamp(max=FP8_MAX_BITS)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = torch.round(bits_float(magnitude) * 512.0).to(torch.int32)  # units of 2**-9; 8 is the first normal code
    return sign | torch.where(magnitude < FP8_MIN_NORMAL_BITS, subnormal, normal)


def fp8_e4m3_decode(code: torch.Tensor) -> torch.Tensor:
    """float32 values of finite float8_e4m3fn codes given as int32."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = bits_float(((exponent + 120) << 23) | (mantissa << 20))
    magnitude = torch.where(exponent == 0, mantissa.to(torch.float32) * 2.0**-9, normal)
    return torch.where((code & 0x80) != 0, -magnitude, magnitude)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, block) int32 codes as (n, block * bits / 8) uint8, low bits first."""
    per_byte = 8 // bits
    if per_byte == 1:
        return (codes & 0xFF).to(torch.uint8)
    lanes = (codes & ((1 << bits) - 1)).reshape(codes.shape[0], codes.shape[1] // per_byte, per_byte)
    out = lanes[..., 0]
    for lane in range(1, per_byte):
        out = out | (lanes[..., lane] << (bits * lane))
    return out.to(torch.uint8)


def unpack_codes(packed: torch.Tensor, bits: int, *, signed: bool) -> torch.Tensor:
    """The inverse of `pack_codes` as (n, block) int32, sign-extended when `signed`."""
    wide = packed.to(torch.int32)
    per_byte = 8 // bits
    lanes = torch.stack([(wide >> (bits * lane)) & ((1 << bits) - 1) for lane in range(per_byte)], dim=-1)
    codes = lanes.reshape(packed.shape[0], packed.shape[1] * per_byte)
    if not signed:
        return codes
    half = 1 << (bits - 1)
    return (codes ^ half) - half
