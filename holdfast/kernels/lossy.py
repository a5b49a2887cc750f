"""Snapshots in few bits with a bound on every value: for replicas of last resort, never what training resumes from by default.

Adam's second moment spans many orders of magnitude within a block and is used as a divisor: rounded linearly, its small entries
become zero and the first step after a restore is enormous (300 times the loss error in our test). Its square root is rounded
instead. A block that misses its bound is stored as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from holdfast.errors import ConfigError, CorruptData
from holdfast.kernels.quant import Packed, QuantSpec, dequantize, from_bytes, quantize, to_bytes
from holdfast.kernels.quant.packed import FLOAT_DTYPES
from holdfast.kernels.quant.wire import frame, raw_bytes, unframe

_INT8_EXACT_SCALES = QuantSpec(kind="int8", scale="fp32")
_MAGIC = b"HFLT"
_DTYPES = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}
FORBIDDEN = ("rng", "step", "cursor", "scaler")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossySpec:
    """`bound`: no value is off by more than this fraction of its block's largest magnitude (of its square root's, if `sqrt`).

    int8 reaches 1/254 = 0.0039. `sqrt` is for values that are never negative, such as Adam's `exp_avg_sq`.
    """

    bound: float = 0.005
    sqrt: bool = False
    quant: QuantSpec = _INT8_EXACT_SCALES

    def __post_init__(self) -> None:
        if not 0.0 < self.bound < 1.0:
            raise ConfigError(f"bound is a fraction of the block's largest value, in (0, 1); got {self.bound}")
        if self.quant.axis is not None or self.quant.rounding != "nearest":
            raise ConfigError("snapshots are packed in memory order and rounded to nearest")


@dataclass(frozen=True, slots=True)
class LossyTensor:
    """Packed blocks, and the blocks that missed the bound as they were: (n,) numbers and (n, block) values."""

    spec: LossySpec
    packed: Packed
    raw_blocks: torch.Tensor
    raw_values: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.raw_blocks.nbytes + self.raw_values.nbytes


def spec_for_state(name: str) -> LossySpec:
    """The spec for an array of that name. Raises ConfigError for state that must never be lossy: RNG, step, cursor, scaler."""
    last = name.rsplit("/", 1)[-1]
    if any(word in last for word in FORBIDDEN):
        raise ConfigError(f"{name} must be stored exactly: a wrong bit in it changes the run")
    return LossySpec(sqrt=last in ("exp_avg_sq", "max_exp_avg_sq", "v"))


def encode_lossy(x: torch.Tensor, spec: LossySpec) -> LossyTensor:
    """`x` within the bound of `spec`, checked block by block. Values that are not finite make their block raw."""
    if spec.sqrt and bool((x < 0).any()):
        raise ConfigError("sqrt=True is for values that are never negative")
    flat = x.detach().reshape(-1)
    packed = quantize(flat.float().sqrt() if spec.sqrt else flat, spec.quant)
    block = spec.quant.block
    assert block is not None
    exact, found = (_blocks(t, block) for t in (flat, _decode(packed, spec, x.dtype)))

    def root(t: torch.Tensor) -> torch.Tensor:
        return t.float().sqrt() if spec.sqrt else t.float()

    allowed = spec.bound * root(exact).abs().amax(dim=1)
    within = (root(exact) - root(found)).abs().amax(dim=1) <= allowed  # False for NaN
    raw = (~within).nonzero().reshape(-1)
    return LossyTensor(
        spec,
        Packed(packed.spec, tuple(x.shape), packed.dtype, packed.codes, packed.scales, packed.minima),
        raw.to(torch.int32),
        exact[raw],
    )


def decode_lossy(lossy: LossyTensor) -> torch.Tensor:
    """A contiguous tensor of the encoded shape and dtype."""
    dtype = lossy.raw_values.dtype
    flat = _decode(lossy.packed, lossy.spec, dtype).reshape(-1)
    n, block = flat.numel(), lossy.raw_values.shape[1]
    blocks = _blocks(flat, block)
    blocks[lossy.raw_blocks.long()] = lossy.raw_values
    return blocks.reshape(-1)[:n].reshape(lossy.packed.shape)


def lossy_to_bytes(lossy: LossyTensor) -> bytes:
    """The value as a replica stores it: framed and checked like the packed tensors of `quant.wire`, magic "HFLT". The payload is
    the packed tensor in its own frame, then the numbers of raw blocks as little-endian int32, then their values."""
    packed, numbers, values = to_bytes(lossy.packed), raw_bytes(lossy.raw_blocks), raw_bytes(lossy.raw_values)
    description = {
        "bound": lossy.spec.bound,
        "sqrt": lossy.spec.sqrt,
        "dtype": str(lossy.raw_values.dtype).removeprefix("torch."),
        "parts": [len(packed), len(numbers), len(values)],
    }
    return frame(_MAGIC, description, packed + numbers + values)


def lossy_from_bytes(data: bytes | memoryview) -> LossyTensor:
    """The inverse, on the CPU. Raises MissingData, CorruptData and UnsupportedFormat as `quant.from_bytes` does."""
    description, payload = unframe(_MAGIC, data, "lossy tensor")
    try:
        n_packed, n_numbers, n_values = (int(n) for n in description["parts"])
        dtype = _DTYPES[description["dtype"]]
        packed = from_bytes(payload[:n_packed])
        spec = LossySpec(bound=float(description["bound"]), sqrt=bool(description["sqrt"]), quant=packed.spec)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CorruptData(f"lossy tensor: its description makes no sense: {error}") from error
    block = packed.spec.block or 1
    n_raw, n_blocks = n_numbers // 4, -(-math.prod(packed.shape) // block)
    lengths = (n_packed + n_numbers + n_values, n_numbers, n_values)
    if lengths != (len(payload), 4 * n_raw, n_raw * block * dtype.itemsize) or n_raw > n_blocks:
        raise CorruptData(f"lossy tensor: parts {description['parts']} do not fit {n_blocks} blocks of {block}")
    numbers = _from_raw(payload[n_packed : n_packed + n_numbers], torch.int32)
    if bool((numbers < 0).any() or (numbers >= n_blocks).any()):
        raise CorruptData(f"lossy tensor: raw blocks outside of 0 to {n_blocks - 1}; use a replica")
    values = _from_raw(payload[n_packed + n_numbers :], dtype)
    return LossyTensor(spec, packed, numbers, values.view(n_raw, block))


def _from_raw(raw: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype) if len(raw) else torch.empty(0, dtype=dtype)


def _decode(packed: Packed, spec: LossySpec, dtype: torch.dtype) -> torch.Tensor:
    values = dequantize(packed)
    return (values.float().square() if spec.sqrt else values).to(dtype)


def _blocks(flat: torch.Tensor, block: int) -> torch.Tensor:
    """(n, block), the end padded with zeros."""
    flat = flat.reshape(-1)
    padded = flat.new_zeros(-(-flat.numel() // block) * block)
    padded[: flat.numel()] = flat
    return padded.view(-1, block)
