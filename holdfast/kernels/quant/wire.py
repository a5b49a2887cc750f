"""Packed tensors as bytes: what a replica, a parity block or a host tier stores.

    offset  bytes  field, little-endian
    0       4      magic "HFPK"
    4       2      version, 1
    6       2      zero
    8       4      length of the description, d
    12      8      length of the payload, p
    20      4      CRC-32 (zlib) of the description
    24      4      CRC-32 of the payload
    28      4      CRC-32 of bytes 0-27
    32      d      description: JSON {"spec": {…}, "shape": […], "dtype": "bfloat16", "parts": {"codes": n, "scales": n, …}}
    32+d    p      codes, scales, minima, each as long as its entry in "parts" says

Equal values have equal bytes, whichever back end packed them, so parity may run over the packed form.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict
from typing import Any

import torch

from holdfast.errors import ConfigError, CorruptData, MissingData, UnsupportedFormat
from holdfast.kernels.quant.packed import FLOAT_DTYPES, Packed, blocking
from holdfast.kernels.quant.spec import QuantSpec

MAGIC = b"HFPK"
VERSION = 1
_HEAD = struct.Struct("<4sHHIQII")
_HEAD_BYTES = _HEAD.size + 4
_DTYPES = {str(d).removeprefix("torch."): d for d in (*FLOAT_DTYPES, torch.bool)}
_SCALE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "e8m0": torch.uint8}


def to_bytes(packed: Packed) -> bytes:
    """The value in the layout above; copies device tensors to the host and waits for them."""
    names = ("codes", "scales", "minima")
    parts = {name: raw_bytes(part) for name in names if (part := getattr(packed, name)) is not None}
    spec = asdict(packed.spec)
    spec["axis"] = None if packed.spec.axis is None else list(packed.spec.axis)
    description = {
        "spec": spec,
        "shape": list(packed.shape),
        "dtype": str(packed.dtype).removeprefix("torch."),
        "parts": {name: len(raw) for name, raw in parts.items()},
    }
    return frame(MAGIC, description, b"".join(parts.values()))


def from_bytes(data: bytes | memoryview) -> Packed:
    """The packed tensor on the CPU.

    Raises MissingData for bytes that end early, CorruptData where a CRC disagrees or a description contradicts its payload,
    UnsupportedFormat for another magic or version. Every length is checked before it is believed.
    """
    return _rebuild(*unframe(MAGIC, data, "packed tensor"))


def frame(magic: bytes, description: dict[str, Any], payload: bytes) -> bytes:
    """A description and a payload behind a checked header."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":")).encode()
    head = _HEAD.pack(magic, VERSION, 0, len(text), len(payload), zlib.crc32(text), zlib.crc32(payload))
    return head + struct.pack("<I", zlib.crc32(head)) + text + payload


def unframe(magic: bytes, data: bytes | memoryview, what: str) -> tuple[dict[str, Any], memoryview]:
    """The inverse of `frame`; `what` names the thing in errors."""
    view = memoryview(data).cast("B")
    if len(view) < _HEAD_BYTES:
        raise MissingData(f"{what}: {len(view)} bytes, its header alone takes {_HEAD_BYTES}; read it again")
    found, version, _, n_text, n_payload, crc_text, crc_payload = _HEAD.unpack_from(view)
    if found != magic:
        raise UnsupportedFormat(f"not a {what}: it starts with {bytes(found)!r}, expected {magic!r}")
    (crc_head,) = struct.unpack_from("<I", view, _HEAD.size)
    _check_crc(what, "header", view[: _HEAD.size], crc_head)
    if version != VERSION:
        raise UnsupportedFormat(f"{what} version {version}; this release reads version {VERSION}")
    end = _HEAD_BYTES + n_text + n_payload
    if len(view) != end:
        kind = MissingData if len(view) < end else CorruptData
        raise kind(f"{what}: {len(view)} bytes where its header promises {end}; read it again or use a replica")
    text, payload = view[_HEAD_BYTES : _HEAD_BYTES + n_text], view[_HEAD_BYTES + n_text :]
    _check_crc(what, "description", text, crc_text)
    _check_crc(what, "payload", payload, crc_payload)
    return json.loads(bytes(text)), payload


def _check_crc(what: str, where: str, data: memoryview, expected: int) -> None:
    found = zlib.crc32(data)
    if found != expected:
        raise CorruptData(f"{what}, {where}: crc32 {found:08x} ≠ {expected:08x}; use a replica or rebuild it from parity")


def _rebuild(description: dict[str, Any], payload: memoryview) -> Packed:
    try:
        axis = description["spec"]["axis"]
        spec = QuantSpec(**{**description["spec"], "axis": None if axis is None else tuple(axis)})
        shape = tuple(int(n) for n in description["shape"])
        dtype = _DTYPES[description["dtype"]]
        plan = blocking(shape, spec)
    except (KeyError, TypeError, ConfigError) as error:
        raise CorruptData(f"packed tensor: its description makes no sense: {error}") from error
    scaled = dtype != torch.bool
    expected = {"codes": plan.n_blocks * plan.block * spec.bits // 8}
    if scaled:
        expected["scales"] = plan.n_blocks * _SCALE_DTYPES[spec.scale].itemsize
        if not spec.symmetric:
            expected["minima"] = expected["scales"]
    if description["parts"] != expected or sum(expected.values()) != len(payload):
        raise CorruptData(f"packed tensor: parts {description['parts']} where {spec} of shape {shape} needs {expected}")
    parts: dict[str, torch.Tensor] = {}
    offset = 0
    for name, size in expected.items():
        raw = torch.frombuffer(bytearray(payload[offset : offset + size]), dtype=torch.uint8) if size else _EMPTY
        parts[name] = raw if name == "codes" else raw.view(_SCALE_DTYPES[spec.scale])
        offset += size
    return Packed(spec, shape, dtype, parts["codes"], parts.get("scales"), parts.get("minima"))


_EMPTY = torch.empty(0, dtype=torch.uint8)


def raw_bytes(part: torch.Tensor) -> bytes:
    """The elements of `part`, row by row."""
    return part.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
