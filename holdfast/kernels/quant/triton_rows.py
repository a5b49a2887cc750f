# mypy: disable-error-code="untyped-decorator"
"""Triton kernels for what `triton_kernels` leaves out: one scale for a whole row (a token, a head), and 1-bit masks.

A row is read twice, once for its range and once for its codes, by one program. Bytes are those of the torch reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from holdfast.kernels.quant.packed import Packed, blocking, join
from holdfast.kernels.quant.triton_kernels import (
    ABS,
    ELEMENT,
    INF_BITS,
    NO_FUSION,
    SCALE,
    TINY,
    as_int64,
    bits16,
    load_float,
    round_codes,
    source_of,
    to_bf16_bits,
)

if TYPE_CHECKING:
    from holdfast.kernels.quant.spec import QuantSpec

ELEMENTS_PER_STEP = 2048  # of a row at a time; interpreter tests raise it
_WHOLE = 3  # elements of a mask that is not a float: bool, as bytes


def quantize(x: torch.Tensor, spec: QuantSpec, *, seed: int = 0, stream: int = 0) -> Packed:
    """As `reference.quantize`, for `mask1` and for specs without a block."""
    plan = blocking(tuple(x.shape), spec)
    source, _ = source_of(x.view(torch.uint8) if x.dtype == torch.bool else x, plan)
    codes = torch.empty(plan.n_blocks * plan.block * spec.bits // 8, dtype=torch.uint8, device=x.device)
    if x.dtype == torch.bool:
        scales = None
    else:
        scales = torch.empty(plan.n_blocks, dtype=torch.float32 if spec.scale == "fp32" else torch.bfloat16, device=x.device)
    minima = None if spec.symmetric else torch.empty_like(scales)  # type: ignore[arg-type]  # bool masks are symmetric
    spare = codes if scales is None else bits16(scales)
    if plan.n_blocks:
        step = min(ELEMENTS_PER_STEP, triton.next_power_of_2(max(plan.block, 8)))
        kernel = _quantize_masks if spec.kind == "mask1" else _quantize_rows
        extra = {} if spec.kind == "mask1" else {
            "SYMMETRIC": spec.symmetric, "SCALE": SCALE[spec.scale], "STOCHASTIC": spec.rounding == "stochastic",
            "TOP": spec.code_max, "PER_BYTE": 8 // spec.bits,
        }  # fmt: skip
        kernel[(plan.n_blocks,)](
            bits16(source), codes, spare, spare if minima is None else bits16(minima),
            plan.row_len, plan.blocks_per_row, plan.block, as_int64(seed), stream,
            STEP=step, ELEMENT=ELEMENT.get(x.dtype, _WHOLE), **extra, num_warps=4, **NO_FUSION,
        )  # fmt: skip
    return Packed(spec, tuple(x.shape), x.dtype, codes, scales, minima)


def dequantize(packed: Packed) -> torch.Tensor:
    """As `reference.dequantize`, for the same."""
    spec, plan = packed.spec, blocking(packed.shape, packed.spec)
    dtype = torch.uint8 if packed.dtype == torch.bool else packed.dtype
    out = torch.empty(plan.n_blocks * plan.block, dtype=dtype, device=packed.device)
    spare = packed.codes if packed.scales is None else bits16(packed.scales)
    if plan.n_blocks:
        step = min(ELEMENTS_PER_STEP, triton.next_power_of_2(out.numel()))
        _dequantize_rows[(triton.cdiv(out.numel(), step),)](
            packed.codes, spare, spare if packed.minima is None else bits16(packed.minima), bits16(out),
            out.numel(), plan.block,
            STEP=step, ELEMENT=ELEMENT.get(packed.dtype, _WHOLE), SCALE=SCALE[spec.scale], BITS=spec.bits,
            SIGNED=spec.symmetric and spec.kind != "mask1", SYMMETRIC=spec.symmetric, num_warps=4, **NO_FUSION,
        )  # fmt: skip
    if packed.dtype == torch.bool:
        out = out.view(torch.bool)
    return join(out.view(plan.n_blocks, plan.block), plan, packed.shape)


@triton.jit
def _quantize_rows(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, minima_ptr, row_len, blocks_per_row, block, seed, stream,
    STEP: tl.constexpr, ELEMENT: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr, TOP: tl.constexpr, PER_BYTE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    amax_bits = tl.full((1,), 0, tl.int32)
    smallest = tl.full((1,), float("inf"), tl.float32)
    largest = tl.full((1,), float("-inf"), tl.float32)
    for start in range(0, row_len, STEP):
        column = start + tl.arange(0, STEP)
        valid = column < row_len
        x = load_float(x_ptr + row * row_len, column, valid, ELEMENT)
        amax_bits = tl.maximum(amax_bits, tl.max(x.to(tl.int32, bitcast=True) & ABS, axis=0))
        smallest = tl.minimum(smallest, tl.min(tl.where(valid, x, float("inf")), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(valid, x, float("-inf")), axis=0))
    bad = amax_bits >= INF_BITS
    one = tl.arange(0, 1)
    if SYMMETRIC:
        smallest = tl.full((1,), 0.0, tl.float32)
        spread = tl.where(bad, 0.0, amax_bits.to(tl.float32, bitcast=True))
        low = -TOP + 0.0
    else:
        smallest = tl.where(bad, 0.0, smallest)
        small_bits = smallest.to(tl.int32, bitcast=True)
        magnitude = small_bits & ABS
        if SCALE == 1:
            small_bits = tl.where(small_bits < 0, (magnitude + 0xFFFF) | -0x80000000, magnitude) & -0x10000
        small_bits = tl.where(magnitude == 0, 0, small_bits)
        smallest = small_bits.to(tl.float32, bitcast=True)
        spread = tl.where(bad, 0.0, largest - smallest)
        low = 0.0
        if SCALE == 1:
            tl.store(minima_ptr + row + one, (small_bits >> 16).to(tl.int16))
        else:
            tl.store(minima_ptr + row + one, smallest)
    scale = tl.maximum(spread * (1.0 / TOP), TINY)
    if SCALE == 1:
        scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    bad = bad | (scale.to(tl.int32, bitcast=True) >= INF_BITS)
    scale = tl.where(bad, TINY, scale)
    inverse = tl.div_rn(tl.full((1,), 1.0, tl.float32), scale)
    scale_bits = tl.where(bad, 0x7FC00000, scale.to(tl.int32, bitcast=True))
    if SCALE == 1:
        tl.store(scales_ptr + row + one, (scale_bits >> 16).to(tl.int16))
    else:
        tl.store(scales_ptr + row + one, scale_bits.to(tl.float32, bitcast=True))
    for start in range(0, block, STEP):
        column = start + tl.arange(0, STEP)
        valid = column < row_len
        x = load_float(x_ptr + row * row_len, column, valid, ELEMENT)
        x = tl.where(bad, 0.0, x) - smallest
        codes = round_codes(x * inverse, low, TOP + 0.0, row * block + column, seed, stream, STOCHASTIC)
        codes = tl.where(bad | (valid == 0), 0, codes)
        WIDTH: tl.constexpr = STEP // PER_BYTE
        if PER_BYTE == 1:
            byte = codes & 0xFF
        elif PER_BYTE == 2:
            even, odd = tl.split(tl.reshape(codes & 15, (WIDTH, 2)))
            byte = even | (odd << 4)
        else:
            even, odd = tl.split(tl.reshape(codes & 3, (WIDTH * 2, 2)))
            first, second = tl.split(tl.reshape(even | (odd << 2), (WIDTH, 2)))
            byte = first | (second << 4)
        place = start // PER_BYTE + tl.arange(0, WIDTH)
        width = block // PER_BYTE
        tl.store(codes_ptr + row * width + place, byte.to(tl.uint8), mask=place < width)


@triton.jit
def _quantize_masks(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, minima_ptr, row_len, blocks_per_row, block, seed, stream,
    STEP: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    first = (number % blocks_per_row) * block
    base = (number // blocks_per_row) * row_len
    amax_bits = tl.full((1,), 0, tl.int32)
    negative = tl.full((1,), 0, tl.int32)
    for start in range(0, block, STEP):
        column = start + tl.arange(0, STEP)
        valid = (column < block) & (first + column < row_len)
        if ELEMENT == 3:
            is_set = (tl.load(x_ptr + base + first + column, mask=valid, other=0) != 0).to(tl.int32)
        else:
            bits = load_float(x_ptr + base + first, column, valid, ELEMENT).to(tl.int32, bitcast=True)
            is_set = ((bits & ABS) != 0).to(tl.int32)
            amax_bits = tl.maximum(amax_bits, tl.max(bits & ABS, axis=0))
            negative = tl.maximum(negative, tl.max(((bits < 0) & ((bits & ABS) != 0)).to(tl.int32), axis=0))
        lanes = tl.reshape(is_set, (STEP // 8, 8)) << tl.arange(0, 8)[None, :]
        place = start // 8 + tl.arange(0, STEP // 8)
        tl.store(codes_ptr + number * (block // 8) + place, tl.sum(lanes, axis=1).to(tl.uint8), mask=place < block // 8)
    if ELEMENT != 3:
        bits = tl.where(amax_bits >= INF_BITS, 0x7FC00000, tl.where(negative != 0, amax_bits | -0x80000000, amax_bits))
        tl.store(scales_ptr + number + tl.arange(0, 1), bits.to(tl.float32, bitcast=True))


@triton.jit
def _dequantize_rows(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, minima_ptr, out_ptr, n_out, block,
    STEP: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr, BITS: tl.constexpr,
    SIGNED: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    valid = flat < n_out
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = tl.load(codes_ptr + flat // PER_BYTE, mask=valid, other=0).to(tl.int32)
    code = (byte >> ((flat % PER_BYTE) * BITS).to(tl.int32)) & ((1 << BITS) - 1)
    if ELEMENT == 3:
        tl.store(out_ptr + flat, code.to(tl.uint8), mask=valid)
    else:
        if SIGNED:
            half: tl.constexpr = 1 << (BITS - 1)
            code = (code ^ half) - half
        row = flat // block
        values = code.to(tl.float32) * load_float(scales_ptr, row, valid, SCALE)
        if not SYMMETRIC:
            values = values + load_float(minima_ptr, row, valid, SCALE)
        if ELEMENT == 1:
            tl.store(out_ptr + flat, to_bf16_bits(values), mask=valid)
        elif ELEMENT == 2:
            tl.store(out_ptr + flat, values.to(tl.float16), mask=valid)
        else:
            tl.store(out_ptr + flat, values, mask=valid)
