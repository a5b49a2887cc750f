"""State that is not a tensor, as typed JSON: what goes in comes out equal and of the same type, and nothing is executed.

Plain JSON values stay plain. Everything else is an object with one key that starts with "$": {"$tuple": […]}. Dictionaries
whose keys are not all plain strings become {"$dict": [[key, value], …]}.
"""

from __future__ import annotations

import base64
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from holdfast.errors import CorruptData, StateError

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def encode_object(value: Any, where: str = "object") -> str:
    """`value` as JSON text. Raises StateError naming the path of the first part that has no typed form."""
    try:
        return _encode(_pack(value, where))
    except RecursionError as error:
        raise StateError(f"{where} is nested too deeply, or contains itself") from error


def decode_object(text: str | bytes) -> Any:
    """The value that `encode_object` was given. Raises CorruptData for text it never wrote."""
    try:
        return _unpack(json.loads(text, parse_constant=_refuse_constant))
    # What json, base64, numpy and torch raise for values that no encoder wrote (RuntimeError: torch; RecursionError is one).
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        raise CorruptData(f"object: not typed JSON ({error})") from error


# -- packing -----------------------------------------------------------------------------------------------------------


def _pack(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    packer = _PACKERS.get(type(value)) or _packer_by_kind(value)
    if packer is None:
        raise StateError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which has no typed form; its state_dict "
            "should return numbers, strings, bytes, tensors, and lists, tuples or dicts of them"
        )
    return packer(value, where)


def _packer_by_kind(value: Any) -> Callable[[Any, str], Any] | None:
    if isinstance(value, np.generic):
        return _pack_numpy_scalar
    if _is_tensor(value):
        return _pack_tensor
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device", "Size"):
        return _pack_torch_value
    if isinstance(value, dict):  # defaultdict, Counter and friends keep their items, not their class
        return _pack_dict
    return None


def _pack_dict(value: dict[Any, Any], where: str) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _pack(item, f"{where}.{key}") for key, item in value.items()}
    return {"$dict": [[_pack(key, where), _pack(item, f"{where}.{key}")] for key, item in value.items()]}


def _pack_items(value: Any, where: str) -> list[Any]:
    return [_pack(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _pack_array(value: np.ndarray[Any, Any], where: str) -> Any:
    if value.dtype.hasobject:
        raise StateError(f"{where} is a numpy array of Python objects, which has no typed form")
    if value.dtype.names:
        raise StateError(
            f"{where} is a numpy array of records, which has no typed form; keep its fields as arrays of their own"
        )
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"$array": [value.dtype.str, list(value.shape), data]}


def _pack_numpy_scalar(value: np.generic, where: str) -> Any:
    return {"$scalar": _pack_array(np.asarray(value), where)["$array"]}


def _pack_tensor(value: Any, where: str) -> Any:
    import torch

    if hasattr(value, "device_mesh"):
        raise StateError(f"{where} is a DTensor inside a plain object; put it into a module or an optimizer")
    flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    data = base64.b64encode(flat.numpy().tobytes()).decode()
    return {"$tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), data]}


def _pack_torch_value(value: Any, where: str) -> Any:
    kind = type(value).__name__
    return {f"$torch.{kind}": list(value) if kind == "Size" else str(value)}


def _is_tensor(value: Any) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" == "torch.Tensor" for kind in type(value).__mro__)


_PACKERS: dict[type, Callable[[Any, str], Any]] = {
    dict: _pack_dict,
    OrderedDict: lambda value, where: {"$ordered": [[_pack(k, where), _pack(v, f"{where}.{k}")] for k, v in value.items()]},
    list: _pack_items,
    tuple: lambda value, where: {"$tuple": _pack_items(value, where)},
    set: lambda value, where: {"$set": _pack_items(sorted(value, key=repr), where)},
    frozenset: lambda value, where: {"$frozenset": _pack_items(sorted(value, key=repr), where)},
    bytes: lambda value, where: {"$bytes": base64.b64encode(value).decode()},
    bytearray: lambda value, where: {"$bytearray": base64.b64encode(value).decode()},
    complex: lambda value, where: {"$complex": [repr(value.real), repr(value.imag)]},
    np.ndarray: _pack_array,
}


# -- unpacking ---------------------------------------------------------------------------------------------------------


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _unpack(item) for key, item in value.items()}
    if len(value) != 1 or tag not in _UNPACKERS:
        raise ValueError(f"unknown tag {tag!r}")
    return _UNPACKERS[tag](value[tag])


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unpack_array(packed: Any) -> np.ndarray[Any, Any]:
    dtype, shape, data = packed
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ValueError("an array of Python objects")
    return np.frombuffer(base64.b64decode(data, validate=True), kind).reshape(shape).copy()


def _unpack_tensor(packed: Any) -> Any:
    import torch

    name, shape, data = packed
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    raw = bytearray(base64.b64decode(data, validate=True))
    flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


def _unpack_dtype(text: str) -> Any:
    import torch

    dtype = getattr(torch, text.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {text!r}")
    return dtype


def _unpack_device(text: str) -> Any:
    import torch

    return torch.device(text)


def _unpack_size(extents: list[int]) -> Any:
    import torch

    return torch.Size(extents)


_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$dict": lambda items: {_unpack(key): _unpack(item) for key, item in items},
    "$ordered": lambda items: OrderedDict((_unpack(key), _unpack(item)) for key, item in items),
    "$tuple": lambda items: tuple(_unpack(item) for item in items),
    "$set": lambda items: {_unpack(item) for item in items},
    "$frozenset": lambda items: frozenset(_unpack(item) for item in items),
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$bytearray": lambda text: bytearray(base64.b64decode(text, validate=True)),
    "$complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "$array": _unpack_array,
    "$scalar": lambda packed: _unpack_array(packed)[()],
    "$tensor": _unpack_tensor,
    "$torch.dtype": _unpack_dtype,
    "$torch.device": _unpack_device,
    "$torch.Size": _unpack_size,
}
