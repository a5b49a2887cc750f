"""Reading a checkpoint: any box of any array, checked byte by byte, into memory that the caller owns.

Opening reads COMMIT and the documents it vouches for, nothing else. Everything in them is treated as hostile until it has been
derived again: files are named by our own rules from array names that passed the name check, never by what a table says. Nothing
is unpickled, no link is followed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, check_coverage
from holdfast.ckpt.blocks import BLOCK_NBYTES, block_crcs
from holdfast.ckpt.manifest import (
    OBJECTS_SCHEMA,
    RUNS_SCHEMA,
    CommitRecord,
    StoredRun,
    from_parquet,
    placed,
    read_checked,
    read_commit,
    runs_of,
)
from holdfast.ckpt.packing import unpack
from holdfast.ckpt.plan import check_names
from holdfast.ckpt.reads import DirectRead, Read, SieveRead, Want, aligned, plan_reads
from holdfast.ckpt.steps import FRAGMENTS, LAYOUT, OBJECTS
from holdfast.ckpt.storage import REMOTE_THREADS, OpenFile, Place, is_remote, open_data
from holdfast.ckpt.strips import ArrayLayout
from holdfast.ckpt.verify import VerifyReport, verify
from holdfast.ckpt.views import as_bytes, box_view
from holdfast.ckpt.zarrdoc import layout_of
from holdfast.errors import ConfigError, CorruptData, LayoutMismatch, MissingData, StateError, UnsupportedFormat

Request = tuple[str, Box, Any]
"""(array, box, a writable buffer of exactly the box's bytes)"""

Progress = Callable[[int], None]
"""Called with the number of bytes that were just finished."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A committed step. Cheap to open; data is read when asked for, and checked before it is handed out."""

    path: Place
    record: CommitRecord
    layouts: Mapping[str, ArrayLayout]
    layout: Mapping[str, Any]
    objects: Mapping[int, Mapping[str, str]]
    small: Mapping[str, bytes]
    table: pa.Table

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def nbytes(self) -> int:
        return self.record.nbytes

    @property
    def world(self) -> int | None:
        """How many ranks saved, where the layout says so."""
        world = self.layout.get("world")
        return world if type(world) is int else None

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        return {name: layout.spec for name, layout in self.layouts.items()}

    @cached_property
    def _rows_of(self) -> dict[str, tuple[int, int]]:
        """First and last row of every array in the runs table, which is sorted by array."""
        names = np.asarray(self.table.column("array").to_pylist(), object)
        starts = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(names)] if len(names) else [0]
        found = {str(names[a]): (a, b) for a, b in pairwise(starts)}
        if len(found) != len(starts) - 1:
            raise CorruptData(f"{self.path / FRAGMENTS}: rows of one array are not side by side")
        return found

    @cached_property
    def _runs(self) -> dict[str, list[StoredRun]]:
        return {}

    def runs(self, name: str) -> list[StoredRun]:
        """The runs of one array, checked: they tile it, and each lies where the format puts it."""
        if name not in self._runs:
            self._runs[name] = self._checked_runs(name)
        return self._runs[name]

    def _checked_runs(self, name: str) -> list[StoredRun]:
        layout = self.layouts[name]
        start, stop = self._rows_of.get(name, (0, 0))
        where = str(self.path / FRAGMENTS)
        runs = [placed(run, layout, where) for run in runs_of(self.table.slice(start, stop - start))]
        try:
            check_coverage([layout.spec], {name: [run.box for run in runs]})
        except LayoutMismatch as error:
            raise CorruptData(f"{where}: {error}") from error
        return runs

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_box(self, name: str, box: Box | None, out: Any, *, threads: int = 2) -> None:
        """`out` holds the bytes of `box` (None: the whole array), row-major and checked."""
        spec = self._spec(name)
        self.read_boxes([(name, Box.whole(spec.shape) if box is None else box, out)], threads=threads)

    def read_boxes(self, requests: Iterable[Request], *, threads: int = 2, progress: Progress | None = None) -> None:
        """Every request's buffer holds its box, or CorruptData or MissingData names the place where it does not.

        At most `threads` reads of 4 MiB are held besides the callers' buffers. After an error the buffers must not be used.
        """
        wants, outs = self._wants(requests)
        small: list[Want] = []
        large: list[Want] = []
        for want in wants:
            (small if want.array in self.small else large).append(want)
        for want in small:
            spec = self.specs[want.array]
            data = memoryview(self.small[want.array])
            box_view(outs[want.target], want.box, want.box, want.dtype)[...] = box_view(
                data, Box.whole(spec.shape), want.box, want.dtype
            )
            _tell(progress, want)
        self._execute(plan_reads(large, self.runs), outs, threads, progress)

    def plan(self, requests: Iterable[tuple[str, Box]]) -> list[Read]:
        """The reads that `read_boxes` would do for these boxes; nothing is read."""
        wants = [Want(name, self._spec(name).dtype, box, 0) for name, box in requests if name not in self.small]
        return plan_reads(wants, self.runs)

    def _spec(self, name: str) -> ArraySpec:
        try:
            return self.specs[name]
        except KeyError:
            raise ConfigError(f'{self.path}: has no array {name!r}; "holdfast show {self.path}" lists what it has') from None

    def _wants(self, requests: Iterable[Request]) -> tuple[list[Want], list[memoryview]]:
        wants: list[Want] = []
        outs: list[memoryview] = []
        for name, box, out in requests:
            spec = self._spec(name)
            if len(box.shape) != len(spec.shape) or not Box.whole(spec.shape).contains(box):
                raise ConfigError(f"{name}: box {box.offset}+{box.shape} does not lie in shape {spec.shape}")
            view = as_bytes(out)
            if len(view) != box.size * ITEMSIZE[spec.dtype] or view.readonly:
                raise ConfigError(f"{name}: the buffer has to be writable and of {box.size * ITEMSIZE[spec.dtype]} bytes")
            wants.append(Want(name, spec.dtype, box, len(outs)))
            outs.append(view)
        return wants, outs

    def _execute(self, reads: Sequence[Read], outs: Sequence[memoryview], threads: int, progress: Progress | None) -> None:
        """Carry the reads out, a few at a time, a file's reads side by side."""
        threads = max(threads, REMOTE_THREADS) if is_remote(self.path) else threads
        if len(reads) <= 1:
            for read in reads:
                self._do(read, outs)
                _tell(progress, read)
            return
        queue = iter(reads)
        with ThreadPoolExecutor(threads, "holdfast-read") as pool:
            running = {pool.submit(self._do, read, outs): read for read in islice(queue, 2 * threads)}
            try:
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        read = running.pop(future)
                        future.result()
                        _tell(progress, read)
                    running |= {pool.submit(self._do, read, outs): read for read in islice(queue, len(done))}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _do(self, read: Read, outs: Sequence[memoryview]) -> None:
        if isinstance(read, DirectRead):
            self._direct(read, outs[read.target])
        else:
            self._sieve(read, outs)

    def _direct(self, read: DirectRead, out: memoryview) -> None:
        """Bytes land in their destination; only the parts of the outermost blocks that nobody wanted pass through scratch."""
        start, stop = aligned(read)
        head, tail = memoryview(bytearray(read.start - start)), memoryview(bytearray(stop - read.stop))
        body = out[read.at : read.at + read.stop - read.start]
        self._fill(read.run, start, [head, body, tail])
        first, last = start, stop
        if len(head):
            first = min(start + BLOCK_NBYTES, stop)
            self._check(read.run, start, _joined(head, body, tail, first - start))
        if len(tail) and stop > first:
            last = max(first, (stop - 1) // BLOCK_NBYTES * BLOCK_NBYTES)
            self._check(read.run, last, memoryview(bytes(body[last - read.start :]) + bytes(tail)))
        if last > first:
            self._check(read.run, first, body[first - read.start : last - read.start])

    def _sieve(self, read: SieveRead, outs: Sequence[memoryview]) -> None:
        start, stop = aligned(read)
        data = self.read_run(read.run, start, stop)
        if read.run.is_packed:
            data = self._unpacked(read.run, data)
        for want, part in read.cuts:
            source = box_view(data, read.run.run.held, part, want.dtype, start)
            box_view(outs[want.target], want.box, part, want.dtype)[...] = source

    def read_run(self, run: StoredRun, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a run, checked; `start` begins a checksum block and `stop` ends one."""
        data = memoryview(bytearray(stop - start))
        self._fill(run, start, [data])
        self._check(run, start, data)
        return data

    def _unpacked(self, run: StoredRun, data: memoryview) -> memoryview:
        where = f"step {self.step}, {run.array} at {list(run.box.offset)} in {self.path / run.run.file}+{run.run.byte_offset}"
        return unpack(data, run.run.held.size * ITEMSIZE[self.specs[run.array].dtype], where)

    def _fill(self, run: StoredRun, start: int, buffers: Sequence[memoryview]) -> None:
        at, wanted = run.run.byte_offset + start, sum(map(len, buffers))
        with self.open_file(run.run.file) as file:
            rest = [buffer for buffer in buffers if len(buffer)]
            while rest:
                got = file.read_into(rest, at)
                if got == 0:
                    raise MissingData(
                        f"step {self.step}, {run.array} at {self.path / run.run.file}: the file ends at byte {file.size()}, "
                        f"expected data up to {run.run.byte_offset + start + wanted}; {self._next_step}"
                    )
                at += got
                rest = list(_after(rest, got))

    def _check(self, run: StoredRun, start: int, data: memoryview) -> None:
        first = start // BLOCK_NBYTES
        found = block_crcs(data)
        wrong = np.flatnonzero(found != run.blocks[first : first + len(found)])
        if len(wrong):
            block = int(wrong[0])
            raise CorruptData(self._describe(run, first + block, int(found[block])))

    def _describe(self, run: StoredRun, block: int, found: int) -> str:
        at = run.run.byte_offset + block * BLOCK_NBYTES
        rows = self.block_box(run, block)
        return (
            f"step {self.step}, {run.array} at {list(rows.offset)} in {self.path / run.run.file}+{at}: crc32c is {found:08x}, "
            f"expected {int(run.blocks[block]):08x}; {self._next_step}"
        )

    @property
    def _next_step(self) -> str:
        return f'nothing of it was used; take another step ("holdfast ls {self.path.parent}")'

    def block_box(self, run: StoredRun, block: int) -> Box:
        """The rows of the run that a checksum block touches; whole rows, since a block may begin inside one.

        A compressed run can only be had whole.
        """
        if not run.box.shape or run.is_packed:
            return run.box
        row_nbytes = run.nbytes // run.run.held.shape[0]
        start = block * BLOCK_NBYTES
        stop = min(start + BLOCK_NBYTES, run.nbytes)
        return run.box.rows(start // row_nbytes, -(-stop // row_nbytes))

    @contextmanager
    def open_file(self, name: str) -> Iterator[OpenFile]:
        """A data file, opened for reading without following a link anywhere below the checkpoint."""
        path = self.path / name
        try:
            file = open_data(self.path, name)
        except FileNotFoundError as error:
            raise MissingData(f"step {self.step}: {path} is missing; {self._next_step}") from error
        try:
            yield file
        except OSError as error:
            raise MissingData(
                f"step {self.step}: {path} cannot be read ({error.strerror or error}); {self._next_step}"
            ) from error
        finally:
            file.close()

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read and check every byte of every file; damage is listed, never raised."""
        return verify(self, progress)


def _tell(progress: Progress | None, done: Read | Want) -> None:
    if progress is not None:
        progress(done.box.size * ITEMSIZE[done.dtype] if isinstance(done, Want) else done.stop - done.start)


def _joined(head: memoryview, body: memoryview, tail: memoryview, nbytes: int) -> memoryview:
    return memoryview((bytes(head) + bytes(body[:nbytes]) + bytes(tail))[:nbytes])


def _after(buffers: Sequence[memoryview], done: int) -> Iterator[memoryview]:
    """What is left of `buffers` once the first `done` bytes are filled."""
    for buffer in buffers:
        if done < len(buffer):
            yield buffer[done:]
        done = max(0, done - len(buffer))


# -- opening -----------------------------------------------------------------------------------------------------------


def open_directory(directory: Place) -> Checkpoint:
    """The checkpoint in one step directory, its documents checked against COMMIT."""
    record = read_commit(directory)
    root = _json(directory, record, "zarr.json")
    layout = _json(directory, record, LAYOUT)
    if not isinstance(layout, dict):
        raise CorruptData(f"{directory / LAYOUT}: not a JSON object")
    layouts = _layouts(directory, record, root)
    table = from_parquet(read_checked(directory, record, FRAGMENTS), RUNS_SCHEMA, str(directory / FRAGMENTS))
    if table.num_rows != record.runs or set(table.column("array").unique().to_pylist()) - set(layouts):
        raise CorruptData(f"{directory / FRAGMENTS}: does not list the runs of this checkpoint's arrays")
    objects, small = _objects(directory, record, layouts)
    return Checkpoint(directory, record, layouts, layout, objects, small, table)


def _json(directory: Place, record: CommitRecord, name: str) -> Any:
    try:
        return json.loads(read_checked(directory, record, name))
    except (ValueError, RecursionError) as error:
        raise CorruptData(f"{directory / name}: not JSON ({error})") from error


def _layouts(directory: Place, record: CommitRecord, root: Any) -> dict[str, ArrayLayout]:
    try:
        attributes = root["attributes"]["holdfast"]
        nodes = root["consolidated_metadata"]["metadata"]
        arrays = {str(name): node for name, node in nodes.items() if node["node_type"] == "array"}
        version, step, block = attributes["format"], attributes["step"], attributes["block_nbytes"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptData(f"{directory / 'zarr.json'}: is not the root of a universal checkpoint ({error!r})") from error
    if (version, step, block) != (1, record.step, BLOCK_NBYTES):
        raise UnsupportedFormat(
            f"{directory / 'zarr.json'}: format {version}, step {step}, checksum blocks of {block} bytes; "
            f"expected 1, {record.step} and {BLOCK_NBYTES}"
        )
    layouts = {name: layout_of(name, node) for name, node in sorted(arrays.items())}
    try:
        check_names(layouts)
    except StateError as error:
        raise UnsupportedFormat(f"{directory / 'zarr.json'}: {error}") from error
    total = sum(layout.spec.nbytes for layout in layouts.values())
    if len(layouts) != record.arrays or total != record.nbytes:
        raise CorruptData(
            f"{directory}: lists {len(layouts)} arrays of {total} bytes, COMMIT says {record.arrays} of {record.nbytes}"
        )
    return layouts


def _objects(
    directory: Place, record: CommitRecord, layouts: Mapping[str, ArrayLayout]
) -> tuple[dict[int, dict[str, str]], dict[str, bytes]]:
    where = str(directory / OBJECTS)
    table = from_parquet(read_checked(directory, record, OBJECTS), OBJECTS_SCHEMA, where)
    objects: dict[int, dict[str, str]] = {}
    small: dict[str, bytes] = {}
    for row in table.to_pylist():
        if row["kind"] == "object" and row["rank"] is not None and row["json"] is not None:
            objects.setdefault(row["rank"], {})[row["name"]] = row["json"]
        elif row["kind"] == "array" and row["name"] in layouts and len(row["data"] or b"") == layouts[row["name"]].spec.nbytes:
            small[row["name"]] = row["data"] or b""
        else:
            raise CorruptData(f"{where}: the row of {row['name']!r} is impossible")
    return objects, small
