# mypy: disable-error-code="untyped-decorator"
"""Triton kernels for the block formats: one pass over the tensor, the bytes of the torch reference.

A program packs `ROWS` blocks. Rounding to even adds and subtracts 1.5 * 2**23; a clamp stands between that sum and the product
before it, so no compiler can fuse the two. bfloat16 is read and written as 16-bit integers, because Triton's interpreter
truncates where the hardware rounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from holdfast.kernels.quant.packed import Blocking, Packed, blocking, join

if TYPE_CHECKING:
    from holdfast.kernels.quant.spec import QuantSpec

ELEMENTS_PER_PROGRAM = 4096  # interpreter tests raise it: there the cost is per program, not per element

INF_BITS = tl.constexpr(0x7F800000)
ABS = tl.constexpr(0x7FFFFFFF)
TINY = tl.constexpr(2.0**-100)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23
ELEMENT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALE = {"fp32": 0, "bf16": 1, "e8m0": 2}


def quantize(x: torch.Tensor, spec: QuantSpec, *, seed: int = 0, stream: int = 0) -> Packed:
    """As `reference.quantize`."""
    plan = blocking(tuple(x.shape), spec)
    source, n_valid = source_of(x, plan)
    codes = torch.empty(plan.n_blocks * plan.block * spec.bits // 8, dtype=torch.uint8, device=x.device)
    scale_dtype = (torch.float32, torch.bfloat16, torch.uint8)[SCALE[spec.scale]]
    scales = torch.empty(plan.n_blocks, dtype=scale_dtype, device=x.device)
    minima = None if spec.symmetric else torch.empty_like(scales)
    if plan.n_blocks:
        rows = max(1, ELEMENTS_PER_PROGRAM // plan.block)
        _quantize_kernel[(triton.cdiv(plan.n_blocks, rows),)](
            bits16(source),
            codes,
            bits16(scales),
            scales if minima is None else bits16(minima),
            n_valid,
            plan.row_len,
            plan.blocks_per_row,
            plan.n_blocks,
            as_int64(seed),
            stream,
            ROWS=rows,
            BLOCK=plan.block,
            KIND=spec.kind,
            SYMMETRIC=spec.symmetric,
            ELEMENT=ELEMENT[x.dtype],
            SCALE=SCALE[spec.scale],
            STOCHASTIC=spec.rounding == "stochastic",
            TOP=spec.code_max,
            PER_BYTE=8 // spec.bits,
            PADDED_ROWS=plan.rows > 1 and plan.row_len % plan.block != 0,
            num_warps=4,
            **NO_FUSION,
        )
    return Packed(spec, tuple(x.shape), x.dtype, codes, scales, minima)


def dequantize(packed: Packed) -> torch.Tensor:
    """As `reference.dequantize`."""
    spec = packed.spec
    plan = blocking(packed.shape, spec)
    whole = plan.order is None and plan.rows * plan.blocks_per_row * plan.block == plan.rows * plan.row_len
    flat = plan.rows == 1 and plan.order is None
    n_out = plan.row_len if flat else plan.n_blocks * plan.block
    out = torch.empty(n_out, dtype=packed.dtype, device=packed.device)
    if plan.n_blocks:
        rows = max(1, ELEMENTS_PER_PROGRAM // plan.block)
        assert packed.scales is not None  # only masks lack them
        _dequantize_kernel[(triton.cdiv(plan.n_blocks, rows),)](
            packed.codes,
            bits16(packed.scales),
            packed.scales if packed.minima is None else bits16(packed.minima),
            bits16(out),
            n_out,
            plan.n_blocks,
            ROWS=rows,
            BLOCK=plan.block,
            KIND=spec.kind,
            SYMMETRIC=spec.symmetric,
            ELEMENT=ELEMENT[packed.dtype],
            SCALE=SCALE[spec.scale],
            BITS=spec.bits,
            PER_BYTE=8 // spec.bits,
            num_warps=4,
            **NO_FUSION,
        )
    if flat or whole:
        return out.view(packed.shape)
    return join(out.view(plan.n_blocks, plan.block), plan, packed.shape)


# Contracting x * scale + minimum into one rounding would give other bytes than the reference when scales are float32.
NO_FUSION: dict[str, Any] = {"enable_fp_fusion": False}


def source_of(x: torch.Tensor, plan: Blocking) -> tuple[torch.Tensor, int]:
    """Contiguous elements in block order, and how many; padding inside rows is left to the kernel's masks."""
    ordered = x if plan.order is None else x.permute(plan.order)
    return ordered.contiguous(), plan.rows * plan.row_len


def bits16(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int16) if t.dtype == torch.bfloat16 else t


def as_int64(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


@triton.jit
def load_float(pointer, offsets, mask, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's own types
    raw = tl.load(pointer + offsets, mask=mask, other=0)
    if ELEMENT == 1:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def to_bf16_bits(x):  # type: ignore[no-untyped-def]
    """Round to nearest even by integers; NaN stays a (quiet) NaN."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & ABS) > INF_BITS
    return tl.where(is_nan, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def _uniform(flat, seed, stream):  # type: ignore[no-untyped-def]
    quad = flat >> 2
    low = (quad & 0xFFFFFFFF).to(tl.uint32)
    high = (quad >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero)
    lane = flat & 3
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


@triton.jit
def round_codes(y, low, top, flat, seed, stream, STOCHASTIC: tl.constexpr):  # type: ignore[no-untyped-def]
    y = tl.minimum(tl.maximum(y, low), top)
    if STOCHASTIC:
        y = tl.floor(y + _uniform(flat, seed, stream))
        return tl.minimum(tl.maximum(y, low), top).to(tl.int32)
    return ((y + _MAGIC) - _MAGIC).to(tl.int32)


@triton.jit
def _fp8_encode(y):  # type: ignore[no-untyped-def]
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(bits & ABS, 0x43E00000)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    small = tl.minimum(magnitude.to(tl.float32, bitcast=True) * 512.0, 8.0)
    subnormal = ((small + _MAGIC) - _MAGIC).to(tl.int32)
    return sign | tl.where(magnitude < 0x3C800000, subnormal, normal)


@triton.jit
def _fp8_decode(code):  # type: ignore[no-untyped-def]
    exponent = (code >> 3) & 15
    mantissa = code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    return tl.where((code & 0x80) != 0, -magnitude, magnitude)


@triton.jit
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, minima_ptr, n_valid, row_len, blocks_per_row, n_blocks, seed, stream,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, SYMMETRIC: tl.constexpr, ELEMENT: tl.constexpr,
    SCALE: tl.constexpr, STOCHASTIC: tl.constexpr, TOP: tl.constexpr, PER_BYTE: tl.constexpr, PADDED_ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_block = block < n_blocks
    flat = block[:, None] * BLOCK + column[None, :]  # position in the padded grid: what the random stream counts
    if PADDED_ROWS:
        row = block // blocks_per_row
        in_row = (block % blocks_per_row)[:, None] * BLOCK + column[None, :]
        offsets = row[:, None] * row_len + in_row
        valid = is_block[:, None] & (in_row < row_len)
    else:
        offsets = flat
        valid = flat < n_valid
    x = load_float(x_ptr, offsets, valid, ELEMENT)
    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & ABS, axis=1)
    bad = amax_bits >= INF_BITS
    x = tl.where(bad[:, None], 0.0, x)
    if SCALE == 2:
        if KIND == "mxfp8":  # Triton chooses at compile time
            exponent = tl.maximum((amax_bits >> 23) - 135, -100)
        else:
            exponent = tl.maximum((amax_bits >> 23) - 127, -100)
        exponent = tl.where(bad, 0, exponent)
        if KIND == "mxfp8":
            codes = _fp8_encode(x * ((127 - exponent) << 23).to(tl.float32, bitcast=True)[:, None])
        else:
            y = x * ((133 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
            codes = round_codes(y, -127.0, 127.0, flat, seed, stream, STOCHASTIC)
        tl.store(scales_ptr + block, tl.where(bad, 255, exponent + 127).to(tl.uint8), mask=is_block)
    else:
        if SYMMETRIC:
            spread = tl.where(bad, 0.0, amax_bits.to(tl.float32, bitcast=True))
            low = -TOP + 0.0
        else:
            smallest = tl.min(tl.where(valid, x, float("inf")), axis=1)
            largest = tl.max(tl.where(valid, x, float("-inf")), axis=1)
            small_bits = smallest.to(tl.int32, bitcast=True)
            magnitude = small_bits & ABS
            if SCALE == 1:
                small_bits = tl.where(small_bits < 0, (magnitude + 0xFFFF) | -0x80000000, magnitude) & -0x10000
            small_bits = tl.where(magnitude == 0, 0, small_bits)
            smallest = small_bits.to(tl.float32, bitcast=True)
            spread = largest - smallest
            x = x - smallest[:, None]
            low = 0.0
            if SCALE == 1:
                tl.store(minima_ptr + block, (small_bits >> 16).to(tl.int16), mask=is_block)
            else:
                tl.store(minima_ptr + block, smallest, mask=is_block)
        scale = tl.maximum(spread * (1.0 / TOP), TINY)
        if SCALE == 1:
            scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
        bad = bad | (scale.to(tl.int32, bitcast=True) >= INF_BITS)
        scale = tl.where(bad, TINY, scale)
        inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)
        codes = round_codes(x * inverse[:, None], low, TOP + 0.0, flat, seed, stream, STOCHASTIC)
        codes = tl.where(bad[:, None], 0, codes)
        scale_bits = tl.where(bad, 0x7FC00000, scale.to(tl.int32, bitcast=True))
        if SCALE == 1:
            tl.store(scales_ptr + block, (scale_bits >> 16).to(tl.int16), mask=is_block)
        else:
            tl.store(scales_ptr + block, scale_bits.to(tl.float32, bitcast=True), mask=is_block)
    codes = tl.where(valid, codes, 0)
    if PER_BYTE == 1:
        tl.store(codes_ptr + flat, (codes & 0xFF).to(tl.uint8), mask=is_block[:, None])
    else:
        if PER_BYTE == 4:
            pairs = tl.reshape(codes & 3, (ROWS, BLOCK // 2, 2))
            even, odd = tl.split(pairs)
            codes = even | (odd << 2)
            quads = tl.reshape(codes, (ROWS, BLOCK // 4, 2))
            first, second = tl.split(quads)
            byte = first | (second << 4)
        else:
            even, odd = tl.split(tl.reshape(codes & 15, (ROWS, BLOCK // 2, 2)))
            byte = even | (odd << 4)
        width: tl.constexpr = BLOCK // PER_BYTE
        place = block[:, None] * width + tl.arange(0, width)[None, :]
        tl.store(codes_ptr + place, byte.to(tl.uint8), mask=is_block[:, None])


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, minima_ptr, out_ptr, n_out, n_blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, SYMMETRIC: tl.constexpr, ELEMENT: tl.constexpr,
    SCALE: tl.constexpr, BITS: tl.constexpr, PER_BYTE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_block = block < n_blocks
    flat = block[:, None] * BLOCK + column[None, :]
    width: tl.constexpr = BLOCK // PER_BYTE
    place = block[:, None] * width + tl.arange(0, width)[None, :]
    byte = tl.load(codes_ptr + place, mask=is_block[:, None], other=0).to(tl.int32)
    if PER_BYTE == 1:
        code = byte
    elif PER_BYTE == 2:
        code = tl.reshape(tl.join(byte & 15, byte >> 4), (ROWS, BLOCK))
    else:
        pairs = tl.reshape(tl.join(byte & 15, byte >> 4), (ROWS, BLOCK // 2))
        code = tl.reshape(tl.join(pairs & 3, pairs >> 2), (ROWS, BLOCK))
    if SYMMETRIC and KIND != "mxfp8":
        half: tl.constexpr = 1 << (BITS - 1)
        code = (code ^ half) - half
    if SCALE == 2:
        biased = tl.load(scales_ptr + block, mask=is_block, other=127).to(tl.int32)
        scale_bits = tl.where(biased == 255, 0x7FC00000, biased << 23)
        scale = scale_bits.to(tl.float32, bitcast=True)[:, None]
        if KIND == "mxfp8":  # Triton chooses at compile time
            values = _fp8_decode(code) * scale
        else:
            values = code.to(tl.float32) * 0.015625 * scale
    else:
        scale = load_float(scales_ptr, block, is_block, SCALE)
        values = code.to(tl.float32) * scale[:, None]
        if not SYMMETRIC:
            values = values + load_float(minima_ptr, block, is_block, SCALE)[:, None]
    valid = flat < n_out
    if ELEMENT == 1:
        tl.store(out_ptr + flat, to_bf16_bits(values), mask=valid)
    elif ELEMENT == 2:
        tl.store(out_ptr + flat, values.to(tl.float16), mask=valid)
    else:
        tl.store(out_ptr + flat, values, mask=valid)
