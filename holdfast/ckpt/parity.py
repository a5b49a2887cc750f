"""Parity beside a step: made after its COMMIT, and used to put damaged bytes right without any other copy.

It protects files, whatever is in them: data, documents and COMMIT alike. What is rebuilt has to have the checksum that was taken
when the parity was made, and replaces a file whole. Parity that is itself damaged protects as far as it is sound.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from holdfast.ckpt.durable import check_room, disk_errors, sync_files, sync_path
from holdfast.ckpt.manifest import read_commit
from holdfast.ckpt.parityfile import (
    PLACE,
    Parity,
    ParityHeader,
    Stream,
    is_safe_name,
    parity_files,
    parity_name,
    read_header,
    stream_of,
    total_nbytes,
)
from holdfast.ckpt.reader import open_directory
from holdfast.ckpt.reading import Progress
from holdfast.coding import ErasureCode, crc32c_blocks
from holdfast.errors import ConfigError, CorruptData, HoldfastError
from holdfast.events import crash_point

PIECE_NBYTES = 2 << 20
"""Of every segment, what is held at a time."""


@dataclass(frozen=True, slots=True)
class ParityAdded:
    """What was written beside a step, or would be."""

    path: str
    step: int
    data: int
    parity: int
    files: int
    protected_nbytes: int
    nbytes: int
    dry_run: bool


def add_parity(
    directory: Path, parity: Parity, *, dry_run: bool = False, progress: Progress | None = None, threads: int = 2
) -> ParityAdded:
    """`parity.parity` files beside the step protect all of its files; older parity of the step is replaced.

    The step is verified first, for parity over damage would preserve it: CorruptData when a byte is not the one that was saved.
    """
    step = read_commit(directory).step
    stream = stream_of(directory, parity)
    size = stream.segment_nbytes * parity.parity
    if not dry_run:
        damages = open_directory(directory).verify().damages
        if damages:
            raise CorruptData(f"{damages[0]}; repair the step before parity is made over it")
        check_room(directory, size)
        with disk_errors("writing parity to", directory, size):
            size = _write(directory, step, stream, progress, threads)
    return ParityAdded(str(directory), step, parity.data, parity.parity, len(stream.files), stream.nbytes, size, dry_run)


def _write(directory: Path, step: int, stream: Stream, progress: Progress | None, threads: int) -> int:
    place, fresh = directory / PLACE, directory / f"{PLACE}.tmp-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    paths = [fresh / parity_name(index) for index in range(stream.parity)]
    try:
        # The header's length does not depend on the checksums in it, so the segments can be written first.
        empty = ParityHeader(step, 0, stream, np.zeros(stream.columns * (stream.data + 1), np.uint32))
        begins = len(empty.to_bytes())
        data, own = _encode(directory, stream, paths, begins, progress, threads)
        for index, path in enumerate(paths):
            head = ParityHeader(step, index, stream, np.concatenate([data.reshape(-1), own[index]])).to_bytes()
            with open(path, "r+b") as file:
                file.write(head)
        sync_files([*paths, fresh])
        crash_point("ckpt.parity_encoded")
        shutil.rmtree(place, ignore_errors=True)
        os.rename(fresh, place)
        sync_path(place.parent)
        crash_point("ckpt.parity_written")
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return total_nbytes(parity_files(directory))


def _encode(
    directory: Path, stream: Stream, paths: Sequence[Path], begins: int, progress: Progress | None, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Write the parity segments; returns the checksums of all blocks, of data and of parity."""
    code = ErasureCode(stream.data, stream.parity)
    data_crcs = np.zeros((stream.data, stream.columns), np.uint32)
    own_crcs = np.zeros((stream.parity, stream.columns), np.uint32)
    with ExitStack() as stack:
        outs = [stack.enter_context(open(path, "wb")) for path in paths]
        for first, last in _column_ranges(stream):
            data = [_read_stream(directory, stream, segment, first, last) for segment in range(stream.data)]
            made = [bytearray(len(data[0])) for _ in range(stream.parity)]
            code.encode(data, made, threads=threads)
            for segment, piece in enumerate(data):
                data_crcs[segment, first:last] = crc32c_blocks(piece, stream.block_nbytes)
            for index, piece in enumerate(made):
                own_crcs[index, first:last] = crc32c_blocks(piece, stream.block_nbytes)
                outs[index].seek(begins + first * stream.block_nbytes)
                outs[index].write(piece)
            if progress is not None:
                progress(len(data[0]) * stream.data)
    return data_crcs, own_crcs


def _column_ranges(stream: Stream) -> Iterator[tuple[int, int]]:
    count = max(1, PIECE_NBYTES // stream.block_nbytes)
    return ((first, min(first + count, stream.columns)) for first in range(0, stream.columns, count))


def _read_stream(directory: Path, stream: Stream, segment: int, first: int, last: int) -> bytearray:
    """Columns [first, last) of a data segment as the files have it now; what is not there reads as zero."""
    start = (segment * stream.columns + first) * stream.block_nbytes
    out = bytearray((last - first) * stream.block_nbytes)
    at = 0
    for name, offset, count in stream.pieces(start, start + len(out)):
        _read_file(directory / name, offset, memoryview(out)[at : at + count])
        at += count
    return out


def _read_file(path: Path, offset: int, out: memoryview) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        done = 0
        while done < len(out) and (got := os.preadv(fd, [out[done:]], offset + done)):
            done += got
    except OSError:
        return  # an unreadable sector is damage like any other: its checksum will not fit
    finally:
        os.close(fd)


# -- using it ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParityCheck:
    """What parity says about a step: damaged blocks that it can rebuild, and those that it cannot.

    Blocks are numbered through the stream. `wrong_files` have a size that is not theirs, `broken` parity files are damaged.
    """

    stream: Stream
    repairable: tuple[int, ...]
    lost: tuple[int, ...]
    wrong_files: tuple[str, ...]
    broken: tuple[str, ...] = ()
    headers: Mapping[int, tuple[Path, ParityHeader, int]] = field(default_factory=dict, repr=False)

    @property
    def is_whole(self) -> bool:
        return not (self.repairable or self.lost or self.wrong_files or self.broken)

    @property
    def is_repairable(self) -> bool:
        return not self.lost


def check_parity(directory: Path, progress: Progress | None = None) -> ParityCheck | None:
    """Every block of the step and of its parity against its checksum; None where no parity can be used."""
    headers, broken = _headers(directory)
    if not headers:
        return None
    stream = next(iter(headers.values()))[1].stream
    repairable: list[int] = []
    lost: list[int] = []
    rotten: set[int] = set()
    for first, last in _column_ranges(stream):
        data = [_read_stream(directory, stream, segment, first, last) for segment in range(stream.data)]
        wrong = _wrong(data, headers, stream, first, last)
        sound = _sound_parity(headers, stream, first, last)
        rotten |= {index for index in headers for column in range(last - first) if index not in sound[column]}
        for column in np.flatnonzero(wrong.any(axis=0)):
            segments = np.flatnonzero(wrong[:, column])
            blocks = [int(segment) * stream.columns + first + int(column) for segment in segments]
            (repairable if len(blocks) <= len(sound[column]) else lost).extend(blocks)
        if progress is not None:
            progress(sum(map(len, data)))
    broken += [headers[index][0].name for index in sorted(rotten)]
    sizes = tuple(name for name, size in stream.files if _size(directory / name) != size)
    return ParityCheck(stream, tuple(sorted(repairable)), tuple(sorted(lost)), sizes, tuple(broken), headers)


def _headers(directory: Path) -> tuple[dict[int, tuple[Path, ParityHeader, int]], list[str]]:
    """Every sound parity header by its index, all about one stream; and the names of files that are not sound."""
    found: dict[int, tuple[Path, ParityHeader, int]] = {}
    broken = []
    for path in parity_files(directory):
        try:
            header, begins = read_header(path)
            if found and next(iter(found.values()))[1].stream != header.stream:
                raise CorruptData(f"{path}: protects another set of files than its neighbours")
            found[header.index] = path, header, begins
        except (HoldfastError, OSError):
            broken.append(path.name)
    return found, broken


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else None


def _wrong(
    data: Sequence[bytearray],
    headers: Mapping[int, tuple[Path, ParityHeader, int]],
    stream: Stream,
    first: int,
    last: int,
) -> np.ndarray:
    """Which blocks (segment, column) are not what they were."""
    expected = next(iter(headers.values()))[1].data_crcs.reshape(stream.data, stream.columns)[:, first:last]
    found = np.stack([crc32c_blocks(piece, stream.block_nbytes) for piece in data])
    return np.asarray(found != expected)


def _sound_parity(
    headers: Mapping[int, tuple[Path, ParityHeader, int]], stream: Stream, first: int, last: int
) -> list[dict[int, memoryview]]:
    """For each column the parity blocks that are what they were, by their number."""
    sound: list[dict[int, memoryview]] = [{} for _ in range(first, last)]
    for index, (path, header, begins) in headers.items():
        piece = bytearray((last - first) * stream.block_nbytes)
        _read_file(path, begins + first * stream.block_nbytes, memoryview(piece))
        good = crc32c_blocks(piece, stream.block_nbytes) == header.own_crcs[first:last]
        for column in np.flatnonzero(good):
            sound[column][index] = memoryview(piece)[column * stream.block_nbytes :][: stream.block_nbytes]
    return sound


def repair_from_parity(directory: Path, check: ParityCheck, *, dry_run: bool = False) -> list[str]:
    """Every repairable block is right again, each damaged file replaced whole; returns the files."""
    copies: dict[str, Path] = {}
    changed = set(check.wrong_files)
    with disk_errors("repairing", directory):
        for name, offset, data in _patches(directory, check):
            changed.add(name)
            if not dry_run:
                with open(_copy(directory, name, copies), "r+b") as file:
                    file.seek(offset)
                    file.write(data)
        unsound = set(check.stream.files_of(check.lost))
        if not dry_run:
            for name in set(check.wrong_files) - unsound:
                _copy(directory, name, copies)
            _put_in_place(directory, dict(check.stream.files), copies)
    return sorted(changed)


def _patches(directory: Path, check: ParityCheck) -> Iterator[tuple[str, int, memoryview]]:
    """(file, offset, bytes) wherever rebuilt blocks differ from what the files hold; a block may touch files that are sound."""
    stream = check.stream
    for first, last in _column_ranges(stream):
        mine = {block for block in check.repairable if first <= block % stream.columns < last}
        for block, data in _rebuilt(directory, check, first, last, mine) if mine else ():
            at, start = 0, block * stream.block_nbytes
            for name, offset, count in stream.pieces(start, start + stream.block_nbytes):
                held = bytearray(count)
                _read_file(directory / name, offset, memoryview(held))
                if held != data[at : at + count]:
                    yield name, offset, data[at : at + count]
                at += count


def _put_in_place(directory: Path, sizes: Mapping[str, int], copies: Mapping[str, Path]) -> None:
    for name, copy in copies.items():
        os.truncate(copy, sizes[name])
        sync_path(copy)
        os.replace(copy, directory / name)
        sync_path((directory / name).parent)


def _rebuilt(directory: Path, check: ParityCheck, first: int, last: int, blocks: set[int]) -> Iterator[tuple[int, memoryview]]:
    stream = check.stream
    code = ErasureCode(stream.data, stream.parity)
    data = [_read_stream(directory, stream, segment, first, last) for segment in range(stream.data)]
    sound = _sound_parity(check.headers, stream, first, last)
    expected = next(iter(check.headers.values()))[1].data_crcs
    for column in sorted({block % stream.columns for block in blocks}):
        at = (column - first) * stream.block_nbytes
        gone = [segment for segment in range(stream.data) if segment * stream.columns + column in blocks]
        have = {
            segment: memoryview(piece)[at : at + stream.block_nbytes]
            for segment, piece in enumerate(data)
            if segment not in gone
        }
        have |= {stream.data + index: block for index, block in sound[column - first].items()}
        out = {segment: bytearray(stream.block_nbytes) for segment in gone}
        code.reconstruct(have, out)
        for segment, block in out.items():
            number = segment * stream.columns + column
            if int(crc32c_blocks(block, stream.block_nbytes)[0]) != int(expected[number]):
                raise CorruptData(f"{directory}: block {number} rebuilt from parity has not its checksum; nothing was replaced")
            yield number, memoryview(block)


def _copy(directory: Path, name: str, copies: dict[str, Path]) -> Path:
    """A copy of a damaged file, to be put right and then into its place."""
    if name not in copies:
        path = directory / name
        _refuse_links(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        copy = path.with_name(f".{path.name}.repair")
        if path.is_file():
            shutil.copyfile(path, copy)
        else:
            copy.write_bytes(b"")
        copies[name] = copy
    return copies[name]


def _refuse_links(directory: Path, name: str) -> None:
    place = directory
    for part in Path(name).parts:
        place = place / part
        if place.is_symlink() or not is_safe_name(name):
            raise ConfigError(f"{place}: is a symbolic link; a repair does not write through it. Remove it first")
