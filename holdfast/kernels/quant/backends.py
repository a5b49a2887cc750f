"""Choosing who packs: the torch reference, the same code compiled by Inductor, or Triton kernels.

All three return the same bytes, so the choice is one of speed alone and may differ between the machine that packs and the one
that unpacks.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal, get_args

import torch

from holdfast.errors import ConfigError
from holdfast.kernels.quant import reference
from holdfast.kernels.quant.packed import Packed, check_packable
from holdfast.kernels.quant.spec import INT8, QuantSpec

if TYPE_CHECKING:
    from types import ModuleType

Backend = Literal["auto", "reference", "inductor", "triton"]


def quantize(x: torch.Tensor, spec: QuantSpec = INT8, *, seed: int = 0, stream: int = 0, backend: Backend = "auto") -> Packed:
    """`x` (float32, bfloat16, float16; bool for `mask1`) packed by `spec`. Never writes to `x` and keeps no reference to it.

    `seed` (64 bits) and `stream` (32 bits, one per tensor) feed stochastic rounding and are ignored otherwise. With
    `spec.nonfinite="error"` the device is synchronised and a tensor that holds NaN or an infinity raises ConfigError; so do
    dtypes, layouts and axes that cannot be packed, and a back end that is not there.
    """
    check_packable(x, spec)
    x = x.detach()
    if not 0 <= seed < 1 << 64 or not 0 <= stream < 1 << 32:
        raise ConfigError(f"seed takes 64 bits and stream 32, both unsigned; got {seed} and {stream}")
    if spec.nonfinite == "error" and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ConfigError(f'{bad} of {x.numel()} values are NaN or infinite; nonfinite="poison" would carry them as NaN')
    return _engine(backend, x.device, spec).quantize(x, spec, seed=seed, stream=stream)  # type: ignore[no-any-return]


def dequantize(packed: Packed, *, backend: Backend = "auto") -> torch.Tensor:
    """A new contiguous tensor of the packed shape and dtype. Blocks packed with NaN or infinity are NaN throughout."""
    return _engine(backend, packed.device, packed.spec).dequantize(packed)  # type: ignore[no-any-return]


def triton_is_installed() -> bool:
    """True if the Triton back end can be imported; it still needs a GPU, or TRITON_INTERPRET=1 set before the first import."""
    return importlib.util.find_spec("triton") is not None


def _engine(backend: Backend, device: torch.device, spec: QuantSpec) -> ModuleType:
    if backend not in get_args(Backend):
        raise ConfigError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    if backend == "inductor":
        from holdfast.kernels.quant import inductor

        return inductor
    if backend == "triton" and not triton_is_installed():
        raise ConfigError('backend="triton" needs the package triton: pip install "holdfast[kernels]"')
    if backend == "triton" or (backend == "auto" and device.type == "cuda" and triton_is_installed()):
        from holdfast.kernels.quant import triton_kernels, triton_rows

        return triton_rows if spec.kind == "mask1" or spec.block is None else triton_kernels
    return reference
