"""Reading a checkpoint: any box of any array, checked byte by byte, into memory that the caller owns.

Opening reads COMMIT and the documents it vouches for, nothing else. Everything in them is treated as hostile until it has been
derived again: files are named by our own rules from array names that passed the name check, never by what a table says. Nothing
is unpickled, no link is followed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, check_coverage
from holdfast.ckpt.blocks import BLOCK_NBYTES, BlockSums
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
from holdfast.ckpt.plan import check_names
from holdfast.ckpt.reading import Progress, ReadingThread, carry_out
from holdfast.ckpt.reads import Read, Want, plan_reads
from holdfast.ckpt.steps import FRAGMENTS, LAYOUT, OBJECTS
from holdfast.ckpt.storage import OpenFile, Place, open_data
from holdfast.ckpt.strips import ArrayLayout
from holdfast.ckpt.verify import VerifyReport, verify
from holdfast.ckpt.views import as_bytes, box_view
from holdfast.ckpt.zarrdoc import layout_of
from holdfast.errors import ConfigError, CorruptData, LayoutMismatch, MissingData, StateError, UnsupportedFormat

Request = tuple[str, Box, Any]
"""(array, box, a writable buffer of exactly the box's bytes)"""


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

    @cached_property
    def _sums(self) -> dict[tuple[str, int], BlockSums]:
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
            if progress is not None:
                progress(want.box.size * ITEMSIZE[want.dtype])
        carry_out(self, plan_reads(large, self.runs), outs, threads, progress)

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

    def read_run(self, run: StoredRun, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a run, checked; `start` begins a checksum block and `stop` ends one."""
        with ReadingThread(self) as thread:
            return thread.read_run(run, start, stop)

    def sums(self, run: StoredRun) -> BlockSums:
        """What the blocks of a run have to sum to."""
        key = (run.run.file, run.run.byte_offset)
        if key not in self._sums:
            self._sums[key] = BlockSums(run.blocks)
        return self._sums[key]

    @property
    def advice(self) -> str:
        """What to do about a checkpoint that turns out to be damaged; for error messages."""
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
            raise MissingData(f"step {self.step}: {path} is missing; {self.advice}") from error
        try:
            yield file
        except OSError as error:
            raise MissingData(f"step {self.step}: {path} cannot be read ({error.strerror or error}); {self.advice}") from error
        finally:
            file.close()

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read and check every byte of every file; damage is listed, never raised."""
        return verify(self, progress)


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
