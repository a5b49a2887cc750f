"""The wire format: what was written comes back, and nothing damaged is believed."""

from __future__ import annotations

import json
import struct
import zlib

import pytest
import torch

from holdfast.errors import CorruptData, HoldfastError, MissingData, UnsupportedFormat
from holdfast.kernels.quant import (
    INT2,
    INT4,
    INT8,
    KIVI_KEY4,
    MASK1,
    MXFP8,
    MXINT8,
    QuantSpec,
    dequantize,
    from_bytes,
    quantize,
    to_bytes,
)

SPECS = [INT8, INT4, INT2, MXINT8, MXFP8, KIVI_KEY4, MASK1, QuantSpec(symmetric=False, scale="fp32")]


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 33, 16), (1, 1, 1, 1), (2, 0, 4, 4)])
def test_a_packed_tensor_survives_its_bytes(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    packed = quantize(sample(*shape), spec)
    back = from_bytes(to_bytes(packed))
    assert (back.spec, back.shape, back.dtype) == (packed.spec, packed.shape, packed.dtype)
    assert all(torch.equal(a, b) for a, b in zip(back.parts, packed.parts, strict=True))
    assert torch.equal(dequantize(back), dequantize(packed))
    assert to_bytes(back) == to_bytes(packed)


def test_a_bool_mask_survives_its_bytes() -> None:
    mask = sample(3, 50) > 0
    assert torch.equal(dequantize(from_bytes(to_bytes(quantize(mask, MASK1)))), mask)


def test_version_1_bytes_stay_readable() -> None:
    """Kept bytes of format version 1: the values -16 … 15 at int8, block 32. Never regenerate them: add a version instead."""
    kept = bytes.fromhex(
        "4846504b01000000b80000002200000000000000c788741e871f7072fa758a5d7b226474797065223a22666c6f6174333222"
        "2c227061727473223a7b22636f646573223a33322c227363616c6573223a327d2c227368617065223a5b33325d2c22737065"
        "63223a7b2261786973223a6e756c6c2c22626c6f636b223a33322c226b696e64223a22696e7438222c226e6f6e66696e6974"
        "65223a22706f69736f6e222c22726f756e64696e67223a226e656172657374222c227363616c65223a2262663136222c2273"
        "796d6d6574726963223a747275657d7d828a929aa1a9b1b9c1c9d1d9e0e8f0f80008101820272f373f474f575f666e76023e"
    )
    x = torch.arange(-16.0, 16.0)
    packed = from_bytes(kept)
    assert packed.scales is not None
    assert packed.scales.item() == 0.126953125  # 16 / 127 rounded up to bfloat16
    assert torch.equal(dequantize(packed), packed.codes.view(torch.int8) * packed.scales.float())
    assert float((dequantize(packed) - x).abs().max()) <= 0.126953125 / 2
    assert to_bytes(quantize(x, QuantSpec(block=32))) == kept


def test_every_single_bit_flip_is_noticed() -> None:
    good = to_bytes(quantize(sample(4, 32), INT4))
    for position in range(len(good) * 8):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        with pytest.raises(HoldfastError):
            from_bytes(bytes(bad))


def test_every_truncation_is_noticed() -> None:
    good = to_bytes(quantize(sample(4, 32), INT8))
    for length in range(len(good)):
        with pytest.raises(MissingData):
            from_bytes(good[:length])
    with pytest.raises(CorruptData, match="promises"):
        from_bytes(good + b"\0")


def forged(description: dict, payload: bytes, version: int = 1) -> bytes:
    """Bytes with correct checksums and a description of the attacker's choice."""
    text = json.dumps(description).encode()
    head = struct.pack("<4sHHIQII", b"HFPK", version, 0, len(text), len(payload), zlib.crc32(text), zlib.crc32(payload))
    return head + struct.pack("<I", zlib.crc32(head)) + text + payload


def test_descriptions_that_contradict_their_payload_are_refused() -> None:
    good = to_bytes(quantize(sample(4, 32), INT8))
    n_text = struct.unpack_from("<I", good, 8)[0]
    honest, payload = json.loads(good[32 : 32 + n_text]), good[32 + n_text :]
    assert from_bytes(forged(honest, payload)).shape == (4, 32)
    lies = [
        {**honest, "shape": [1 << 40, 32]},
        {**honest, "shape": [4, -32]},
        {**honest, "dtype": "int64"},
        {**honest, "spec": {**honest["spec"], "kind": "int4"}},
        {**honest, "spec": {**honest["spec"], "block": 0}},
        {**honest, "spec": {**honest["spec"], "extra": 1}},
        {**honest, "parts": {"codes": 128}},
        {key: value for key, value in honest.items() if key != "spec"},
    ]
    for lie in lies:
        with pytest.raises(CorruptData):
            from_bytes(forged(lie, payload))
    with pytest.raises(UnsupportedFormat, match="version 2"):
        from_bytes(forged(honest, payload, version=2))
    with pytest.raises(UnsupportedFormat, match="not a packed tensor"):
        from_bytes(b"PK\3\4" + good[4:])
