"""Slots: files in shared memory that hold one snapshot each, and say truthfully what is in them.

A slot is a raw file: one header page, then the body. The body is the payload (the fragments of a rank, or a node's parity
blocks) followed by its meta (fragment table, objects). The header page has two places for a header; a change is written to the
older one, so a writer that dies at any byte leaves the other, and a reader takes the newest that is whole.

Raw files and not `multiprocessing.shared_memory`, whose tracker unlinks the name when a trainer dies; and not Ray's object
store, whose objects die with their owner.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from holdfast.arrays import FragmentTable
from holdfast.coding import HeaderCodec, crc32c
from holdfast.errors import CorruptData, MissingData, OutOfSharedMemory
from holdfast.snapshot.janitor import words_for

VERSION = 1
HEADER_NBYTES = 4096
ALIGNMENT = 64
_PLACES = (0, HEADER_NBYTES // 2)
_LENGTHS = struct.Struct("<II")
_codec = HeaderCodec(nsym=32)


class SlotState(IntEnum):
    """How far a snapshot has come. It only grows, until the slot is filled anew."""

    EMPTY = 0
    FILLING = 1
    VERIFIED = 2
    ENCODED = 3
    COMMITTED = 4


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What a slot holds. `rank` is -1 for parity. `meta_crc32c` covers the meta, which in turn lists the payload's CRCs."""

    job: str
    node: int
    rank: int
    index: int
    state: SlotState = SlotState.EMPTY
    epoch: int = 0
    step: int = 0
    world: int = 0
    payload_nbytes: int = 0
    meta_nbytes: int = 0
    meta_crc32c: int = 0
    sequence: int = 0
    version: int = VERSION

    @property
    def body_nbytes(self) -> int:
        """Bytes after the header page that belong to the snapshot."""
        return aligned(self.payload_nbytes) + self.meta_nbytes


_FIELDS = tuple(field.name for field in fields(SlotHeader))


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Slot:
    """One slot file, mapped. The keeper creates and owns it; trainers and peers map it by name."""

    def __init__(self, path: Path, header: SlotHeader, mapping: mmap.mmap, fd: int, *, writable: bool) -> None:
        self.path, self.header = path, header
        self._map, self._fd, self._writable = mapping, fd, writable
        self.body = memoryview(mapping)[HEADER_NBYTES:]

    @classmethod
    def create(cls, path: Path, header: SlotHeader, body_nbytes: int) -> Slot:
        """A new slot with all its memory taken and touched; replaces a file of that name. Raises OutOfSharedMemory."""
        nbytes = HEADER_NBYTES + -(-body_nbytes // HEADER_NBYTES) * HEADER_NBYTES
        fresh = path.with_name(f"{path.name}.new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            # Without this a full /dev/shm shows as SIGBUS at some later store, with no message.
            os.posix_fallocate(fd, 0, nbytes)
            mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        except OSError as error:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise _out_of_memory(path, nbytes, error) from error
        slot = cls(path, header, mapping, fd, writable=True)
        slot.write_header(header)
        fresh.rename(path)
        return slot

    @classmethod
    def blank(cls, path: Path, header: SlotHeader, body_nbytes: int) -> Slot:
        """A slot without memory and without its name, for bytes that come by `write`; `publish` makes it one that is found.

        A page that is written through the file is neither cleared nor faulted in first, which costs more than what goes into it.
        Raises OutOfSharedMemory where it cannot fit.
        """
        nbytes = HEADER_NBYTES + -(-body_nbytes // HEADER_NBYTES) * HEADER_NBYTES
        fresh = _unnamed(path)
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            free = os.fstatvfs(fd)
            if free.f_blocks and free.f_bavail * free.f_frsize < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(fd, nbytes)
            mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED)
        except OSError as error:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise _out_of_memory(path, nbytes, error) from error
        return cls(path, header, mapping, fd, writable=True)

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes into a blank slot's body. Raises OutOfSharedMemory, where a store through the mapping would be a SIGBUS."""
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], HEADER_NBYTES + offset + done)
        except OSError as error:
            raise _out_of_memory(self.path, len(data), error) from error

    def publish(self, written: int, **changes: Any) -> None:
        """The blank slot, `written` bytes of which were given, takes all its memory, then its header, and then its name."""
        try:
            os.posix_fallocate(self._fd, 0, HEADER_NBYTES)
            if written < self.capacity:
                os.posix_fallocate(self._fd, HEADER_NBYTES + written, self.capacity - written)
        except OSError as error:
            raise _out_of_memory(self.path, self.capacity, error) from error
        self.update(**changes)
        _unnamed(self.path).rename(self.path)

    def discard_blank(self) -> None:
        """Nothing came of it."""
        _unnamed(self.path).unlink(missing_ok=True)
        self.close()

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Slot:
        """Map an existing slot and read its header. Raises MissingData or CorruptData."""
        try:
            fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            raise MissingData(f"slot {path} is gone ({error.strerror})") from error
        try:
            nbytes = os.fstat(fd).st_size
            if nbytes <= HEADER_NBYTES:
                raise CorruptData(f"slot {path} has {nbytes} bytes; a slot has more than its {HEADER_NBYTES}-byte header page")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, access)
            header = _newest_header(path, memoryview(mapping)[:HEADER_NBYTES])
        except BaseException:
            os.close(fd)
            raise
        slot = cls(path, header, mapping, fd, writable=writable)
        if slot.header.body_nbytes > len(slot.body):
            claimed, held = slot.header.body_nbytes, len(slot.body)
            slot.close()
            raise CorruptData(f"slot {path}: header claims {claimed} bytes, the file holds {held}")
        return slot

    @property
    def capacity(self) -> int:
        return len(self.body)

    def reread(self) -> bool:
        """Take over the header as it is now; False when another file has the slot's name since it was mapped."""
        try:
            here = os.stat(self.path)
        except OSError:
            return False
        mapped = os.fstat(self._fd)
        if (here.st_dev, here.st_ino) != (mapped.st_dev, mapped.st_ino):
            return False
        self.header = _newest_header(self.path, memoryview(self._map)[:HEADER_NBYTES])
        return True

    def file_range(self, offset: int, nbytes: int) -> tuple[int, int, int]:
        """A descriptor of the caller's own, and where bytes of the body lie in the file: for sendfile."""
        return os.dup(self._fd), HEADER_NBYTES + offset, nbytes

    def update(self, **changes: Any) -> SlotHeader:
        """Change the header; from then on that is what a reader finds, whoever dies."""
        self.write_header(self.header, **changes)
        return self.header

    def write_header(self, header: SlotHeader, **changes: Any) -> None:
        header = replace(header, **changes, sequence=self.header.sequence + 1)
        place = _PLACES[header.sequence % 2]
        known = {name: getattr(header, name) for name in _FIELDS}  # a fifth of the time of asdict, ten times a snapshot
        block = _codec.encode(json.dumps(known, separators=(",", ":")).encode())
        if len(block) > _PLACES[1]:
            raise CorruptData(f"slot header of {len(block)} bytes does not fit its half page")
        page = memoryview(self._map)[place : place + len(block)]
        page[:] = block
        page.release()
        self.header = header

    def rewrite_header(self) -> None:
        """Write the header that we know to both its places: what is on the page has been damaged."""
        for _ in _PLACES:
            self.write_header(self.header)

    def meta(self) -> Meta:
        """The checked meta of the snapshot inside. Raises CorruptData when its CRC differs from the header's."""
        start = aligned(self.header.payload_nbytes)
        data = self.body[start : start + self.header.meta_nbytes]
        found = crc32c(data)
        if found != self.header.meta_crc32c:
            raise CorruptData(
                f"slot {self.path.name} (step {self.header.step}, rank {self.header.rank}): meta has crc32c {found:08x}, "
                f"expected {self.header.meta_crc32c:08x}"
            )
        return Meta.from_bytes(bytes(data))

    def close(self) -> None:
        """Unmap, unless somebody still holds a view; then the mapping goes when the last view does."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        try:
            self.body.release()
            self._map.close()
        except BufferError:
            pass


@dataclass(frozen=True)
class Meta:
    """What lies behind a payload: the fragment table with CRCs, and the typed objects of the rank, JSON text by name."""

    table: FragmentTable
    objects: dict[str, str]

    def to_bytes(self) -> bytes:
        table, objects = self.table.to_bytes(), json.dumps(self.objects, separators=(",", ":")).encode()
        return _LENGTHS.pack(len(table), len(objects)) + table + objects

    @classmethod
    def from_bytes(cls, data: bytes) -> Meta:
        try:
            table_nbytes, objects_nbytes = _LENGTHS.unpack_from(data)
            start, stop = _LENGTHS.size, _LENGTHS.size + table_nbytes
            objects = json.loads(data[stop : stop + objects_nbytes])
        except (struct.error, ValueError) as error:
            raise CorruptData(f"slot meta: {error}") from error
        return cls(FragmentTable.from_bytes(data[start:stop]), objects)


def _unnamed(path: Path) -> Path:
    """Where a blank slot is written; a keeper that starts takes what it finds under such a name away."""
    return path.with_name(f"{path.name}.blank.new")


def _newest_header(path: Path, page: memoryview) -> SlotHeader:
    found: list[SlotHeader] = []
    problems: list[str] = []
    for place, end in zip(_PLACES, (*_PLACES[1:], HEADER_NBYTES), strict=True):
        try:
            payload, _ = _codec.decode(bytes(page[place:end]))
            fields = json.loads(payload)
            found.append(_possible(SlotHeader(**fields | {"state": SlotState(fields["state"])})))
        except (CorruptData, ValueError, TypeError, KeyError) as error:
            problems.append(str(error))
    page.release()
    if not found:
        raise CorruptData(f"slot {path}: neither header is whole ({'; '.join(problems)})")
    return max(found, key=lambda header: header.sequence)


def _possible(header: SlotHeader) -> SlotHeader:
    if header.version != VERSION:
        raise CorruptData(f"version {header.version} is not the {VERSION} that this release reads")
    if min(header.payload_nbytes, header.meta_nbytes) < 0:
        raise CorruptData(f"lengths {header.payload_nbytes} and {header.meta_nbytes} are impossible")
    return header


def _out_of_memory(path: Path, nbytes: int, error: OSError) -> OutOfSharedMemory:
    stat = os.statvfs(path.parent)
    free = stat.f_bavail * stat.f_frsize
    return OutOfSharedMemory(
        f"cannot take {nbytes / 2**20:.1f} MiB for {path.name} in {path.parent}: {error.strerror}, {free / 2**20:.1f} MiB are "
        "free. In a container start it with --ipc=host or a larger --shm-size; or give protect(memory_dir=…) a directory with "
        f"room for two snapshots of every rank of the node{words_for(path.parent.parent.parent)}"
    )
