"""Quantizers: one spec, one wire format, three back ends with the same bytes."""

from holdfast.kernels.quant.backends import Backend, dequantize, quantize, triton_is_installed
from holdfast.kernels.quant.packed import Packed
from holdfast.kernels.quant.running import RunningPacked, RunningRange, RunningSpec, dequantize_running
from holdfast.kernels.quant.spec import INT2, INT4, INT8, KIVI_KEY4, KIVI_VALUE4, MASK1, MXFP8, MXINT8, QuantSpec
from holdfast.kernels.quant.wire import from_bytes, to_bytes

__all__ = [
    "INT2",
    "INT4",
    "INT8",
    "KIVI_KEY4",
    "KIVI_VALUE4",
    "MASK1",
    "MXFP8",
    "MXINT8",
    "Backend",
    "Packed",
    "QuantSpec",
    "RunningPacked",
    "RunningRange",
    "RunningSpec",
    "dequantize",
    "dequantize_running",
    "from_bytes",
    "quantize",
    "to_bytes",
    "triton_is_installed",
]
