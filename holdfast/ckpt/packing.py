"""Chunks compressed with zstd, and back, never into more memory than a chunk has."""

from __future__ import annotations

import pyarrow as pa

from holdfast.errors import CorruptData

MAX_LEVEL = 19
"""Beyond it zstd needs far more memory to read as well."""


def pack(data: memoryview, level: int) -> bytes:
    """One zstd frame, which names its own content size, as Zarr's codec writes it."""
    return pa.Codec("zstd", compression_level=level).compress(data, asbytes=True)  # type: ignore[no-any-return]


def unpack(data: memoryview, nbytes: int, where: str) -> memoryview:
    """The `nbytes` that were packed; CorruptData when the frame holds anything else. Nothing larger is ever allocated."""
    try:
        found = memoryview(pa.decompress(data, decompressed_size=nbytes, codec="zstd"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptData(f"{where}: is no zstd frame of {nbytes} bytes ({error})") from error
    if len(found) != nbytes:
        raise CorruptData(f"{where}: unpacks to {len(found)} bytes, expected {nbytes}")
    return found


def packed_bound(nbytes: int) -> int:
    """What zstd's worst case stays below."""
    return nbytes + nbytes // 128 + 1024
