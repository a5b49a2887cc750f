"""Zarr data types that zarr-python does not have yet: bfloat16 and the two float8 kinds.

Importing this file registers them; with holdfast installed zarr-python does so by itself (`zarr_hook.py`). numpy has no such
numbers, so elements appear as unsigned integers that hold their bits; to see them as what they are:
`torch.from_numpy(array[...]).view(torch.bfloat16)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from zarr.dtype import DataTypeValidationError, UInt8, UInt16, data_type_registry


class _RawBits:
    """Never inferred from a numpy dtype: an array of plain integers stays one."""

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        raise DataTypeValidationError(f"{dtype} is a plain numpy dtype; name {cls.__name__} explicitly")

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"{cls.__name__} exists in Zarr format 3 only")


@dataclass(frozen=True, kw_only=True)
class BFloat16(_RawBits, UInt16):
    """bfloat16 as its 16 bits."""

    _zarr_v3_name: ClassVar[Any] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(_RawBits, UInt8):
    """float8_e4m3fn as its 8 bits."""

    _zarr_v3_name: ClassVar[Any] = "float8_e4m3fn"


@dataclass(frozen=True, kw_only=True)
class Float8E5M2(_RawBits, UInt8):
    """float8_e5m2 as its 8 bits."""

    _zarr_v3_name: ClassVar[Any] = "float8_e5m2"


for _kind in (BFloat16, Float8E4M3FN, Float8E5M2):
    data_type_registry.register(_kind._zarr_v3_name, _kind)
