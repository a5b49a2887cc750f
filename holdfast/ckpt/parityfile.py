"""The parity file of a step: what it says about itself, and the stream of bytes that it protects. docs/format.md has every field.

All files of a step, in order of their names, are one stream of bytes. It is cut into `data` equal segments, and the parity over
these is as many segments more as there are parity files: lose the bytes of up to that many segments at any place, and they are
computed from the others. A CRC32C for each block of every segment says which bytes are lost.
"""

from __future__ import annotations

import json
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.ckpt.blocks import Crcs
from holdfast.ckpt.steps import INTERNAL
from holdfast.coding import crc32c
from holdfast.errors import ConfigError, CorruptData, UnsupportedFormat

PLACE = f"{INTERNAL}/parity"

MAGIC = b"HFPARITY"
VERSION = 1
PAGE = 4096
LEAST_BLOCK_NBYTES, MOST_BLOCK_NBYTES = 32 << 10, 64 << 20
MOST_BLOCKS = 1 << 18
"""Blocks grow with the checkpoint, so that the table of their checksums stays at 1 MiB."""
MAX_HEADER_NBYTES = 256 << 20

_HEAD = struct.Struct("<8sIIII")
"""Magic, version, bytes of the JSON header, bytes of the checksum table, CRC32C of both."""
_PART = re.compile(r"[^/\\\x00-\x1f\x7f]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How much of a step can be lost: any `parity` of `data + parity` segments, at the cost of parity / data of its size."""

    data: int = 16
    parity: int = 1

    def __post_init__(self) -> None:
        whole = type(self.data) is int and type(self.parity) is int
        if not whole or self.data < 1 or self.parity < 1 or self.data + self.parity > 255:
            raise ConfigError(f"need data >= 1, parity >= 1, sum <= 255; got {self.data} + {self.parity}")


@dataclass(frozen=True, slots=True)
class Stream:
    """The files of a step end to end, cut into segments of whole blocks. Past the last file everything is zero."""

    files: tuple[tuple[str, int], ...]
    data: int
    parity: int
    block_nbytes: int

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.files)

    @property
    def columns(self) -> int:
        """Blocks in a segment: together the blocks of one column are a codeword."""
        return -(-self.nbytes // (self.block_nbytes * self.data))

    @property
    def segment_nbytes(self) -> int:
        return self.columns * self.block_nbytes

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """(file, offset in it, bytes) of stream bytes [start, stop), in order."""
        begins = [0, *accumulate(size for _, size in self.files)]
        place = max(0, bisect_right(begins, start) - 1)
        while start < min(stop, begins[-1]):
            name, size = self.files[place]
            count = min(stop, begins[place] + size) - start
            if count > 0:
                yield name, start - begins[place], count
                start += count
            place += 1

    def files_of(self, blocks: Iterable[int]) -> list[str]:
        """The files that blocks of the stream belong to."""
        return sorted(
            {name for block in blocks for name, _, _ in self.pieces(block * self.block_nbytes, (block + 1) * self.block_nbytes)}
        )


@dataclass(frozen=True, slots=True)
class ParityHeader:
    """What every parity file of a step says: the stream, which segment the file is, and checksums of all blocks.

    `crcs` are those of the data segments (data × columns) and then of this file's own segment.
    """

    step: int
    index: int
    stream: Stream
    crcs: Crcs

    def to_bytes(self) -> bytes:
        stream = self.stream
        body = {
            "step": self.step,
            "index": self.index,
            "data": stream.data,
            "parity": stream.parity,
            "block_nbytes": stream.block_nbytes,
            "files": [list(file) for file in stream.files],
        }
        text, table = json.dumps(body, sort_keys=True).encode(), self.crcs.astype("<u4").tobytes()
        head = _HEAD.pack(MAGIC, VERSION, len(text), len(table), crc32c(text + table)) + text + table
        return head + bytes(-len(head) % PAGE)

    @property
    def data_crcs(self) -> Crcs:
        return self.crcs[: self.stream.data * self.stream.columns]

    @property
    def own_crcs(self) -> Crcs:
        return self.crcs[self.stream.data * self.stream.columns :]


def read_header(path: Path) -> tuple[ParityHeader, int]:
    """A parity file's header and where its segment begins. Raises a StorageError for a file that cannot be trusted."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(_HEAD.size)
        if len(prefix) < _HEAD.size or not prefix.startswith(MAGIC):
            raise CorruptData(f"{path}: not a parity file")
        _, version, text_nbytes, table_nbytes, expected = _HEAD.unpack(prefix)
        if version != VERSION:
            raise UnsupportedFormat(f"{path}: parity of version {version}; this release reads version {VERSION}")
        if text_nbytes + table_nbytes > min(MAX_HEADER_NBYTES, size):
            raise CorruptData(f"{path}: its header would be {text_nbytes + table_nbytes} bytes of {size}")
        body = file.read(text_nbytes + table_nbytes)
    if crc32c(body) != expected:
        raise CorruptData(f"{path}: the header's crc32c is not {expected:08x}")
    header = _header(path, body[:text_nbytes], body[text_nbytes:])
    begins = _HEAD.size + len(body)
    return header, begins + -begins % PAGE


def _header(path: Path, text: bytes, table: bytes) -> ParityHeader:
    try:
        body: dict[str, Any] = json.loads(text)
        files = tuple((str(name), int(size)) for name, size in body["files"])
        shape = Parity(data=body["data"], parity=body["parity"])
        stream = Stream(files, shape.data, shape.parity, int(body["block_nbytes"]))
        step, index = int(body["step"]), int(body["index"])
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise CorruptData(f"{path}: the parity header is broken ({error!r})") from error
    for name, size in files:
        if size < 0 or not is_safe_name(name):
            raise UnsupportedFormat(f"{path}: protects {name!r} of {size} bytes, which is no file of a checkpoint")
    crcs = np.frombuffer(table, "<u4").astype(np.uint32)
    believable = 0 < stream.block_nbytes <= MOST_BLOCK_NBYTES
    blocks = stream.columns * (stream.data + 1) if believable else -1
    if not 0 <= index < stream.parity or len(crcs) != blocks or len({name for name, _ in files}) != len(files):
        raise CorruptData(f"{path}: the parity header contradicts itself")
    return ParityHeader(step, index, stream, crcs)


def is_safe_name(name: str) -> bool:
    """A relative path that stays inside the step's directory, and not in the parity itself."""
    parts = name.split("/")
    return all(_PART.fullmatch(part) and part not in (".", "..") for part in parts) and not name.startswith(f"{PLACE}/")


def stream_of(directory: Path, parity: Parity) -> Stream:
    """The stream of the files that are in a step's directory now. Raises UnsupportedFormat for a link among them."""
    files = []
    for place, _, names in os.walk(directory):
        for name in names:
            path = Path(place) / name
            relative = path.relative_to(directory).as_posix()
            if relative.startswith(f"{PLACE}"):
                continue
            if path.is_symlink():
                raise UnsupportedFormat(f"{path}: is a symbolic link; a checkpoint holds only files of its own")
            files.append((relative, path.stat().st_size))
    return Stream(tuple(sorted(files)), parity.data, parity.parity, _block_nbytes(sum(size for _, size in files)))


def _block_nbytes(total: int) -> int:
    block = LEAST_BLOCK_NBYTES
    while total > block * MOST_BLOCKS and block < MOST_BLOCK_NBYTES:
        block *= 2
    return block


def parity_files(directory: Path) -> list[Path]:
    """The parity files beside a step, sound or not."""
    place = directory / PLACE
    if place.is_symlink() or not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.suffix == ".parity" and not path.is_symlink())


def parity_name(index: int) -> str:
    return f"{index:03d}.parity"


def total_nbytes(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
