"""What a checkpoint knows about itself: the table of runs, the objects, and the commit record.

A checkpoint exists exactly when its COMMIT exists and agrees with what it names. COMMIT carries the digests of every other
document, and those carry a CRC32C for every 32 KiB of data, so one small file vouches for every byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from holdfast.arrays import ITEMSIZE, Box
from holdfast.ckpt.blocks import BLOCK_NBYTES, Crcs
from holdfast.ckpt.packing import packed_bound
from holdfast.ckpt.steps import COMMIT, FRAGMENTS, LAYOUT, OBJECTS
from holdfast.ckpt.storage import Place
from holdfast.ckpt.strips import ArrayLayout, Run
from holdfast.errors import CorruptData, MissingData, NotACheckpoint, UnsupportedFormat

FORMAT = "holdfast-checkpoint"
VERSION = 1
DOCUMENTS = ("zarr.json", FRAGMENTS, OBJECTS, LAYOUT)

MAX_COMMIT_NBYTES = 1 << 20
MAX_DOCUMENT_NBYTES = 4 << 30
"""A document that claims to be larger is refused before it is read."""

RUNS_SCHEMA = pa.schema(
    [
        pa.field("array", pa.string(), nullable=False),
        pa.field("offset", pa.list_(pa.int64()), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("byte_offset", pa.int64(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
        pa.field("block_crc32c", pa.list_(pa.uint32()), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("inherited_from", pa.int64()),
    ]
)

OBJECTS_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("rank", pa.int32()),
        pa.field("json", pa.string()),
        pa.field("data", pa.binary()),
    ]
)


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run that has been written: where it is, whose it was, and what its bytes, as they are on the disk, sum to.

    Of a compressed array each chunk is a run, and `is_packed`: its `nbytes` are the compressed ones.
    """

    array: str
    run: Run
    nbytes: int
    crc32c: int
    blocks: Crcs
    rank: int
    inherited_from: int | None = None
    is_packed: bool = False

    @property
    def box(self) -> Box:
        return self.run.box


def runs_table(runs: Iterable[StoredRun]) -> pa.Table:
    runs = sorted(runs, key=lambda run: (run.array, run.run.file, run.run.byte_offset))
    lengths = np.fromiter((len(run.blocks) for run in runs), np.int64, len(runs))
    blocks = np.concatenate([np.empty(0, np.uint32), *(run.blocks for run in runs)])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    columns: dict[str, Any] = {
        "array": [run.array for run in runs],
        "offset": [run.box.offset for run in runs],
        "shape": [run.box.shape for run in runs],
        "file": [run.run.file for run in runs],
        "byte_offset": [run.run.byte_offset for run in runs],
        "nbytes": [run.nbytes for run in runs],
        "crc32c": [run.crc32c for run in runs],
        "rank": [run.rank for run in runs],
        "inherited_from": [run.inherited_from for run in runs],
    }
    arrays = [
        pa.ListArray.from_arrays(offsets, pa.array(blocks, pa.uint32()))
        if field.name == "block_crc32c"
        else pa.array(columns[field.name], field.type)
        for field in RUNS_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=RUNS_SCHEMA)


def runs_of(table: pa.Table) -> list[StoredRun]:
    """The rows of a runs table; raises CorruptData for rows that no writer writes. See `placed` for the rest of the checks."""
    columns = {name: table.column(name).to_pylist() for name in RUNS_SCHEMA.names if name != "block_crc32c"}
    blocks = table.column("block_crc32c").combine_chunks()
    values, bounds = blocks.values.to_numpy(zero_copy_only=False), blocks.offsets.to_numpy()
    runs = [
        StoredRun(
            array,
            _unplaced(offset, shape, file, at),
            nbytes,
            crc,
            values[bounds[row] : bounds[row + 1]],
            rank,
            inherited,
        )
        for row, (array, offset, shape, file, at, nbytes, crc, rank, inherited) in enumerate(
            zip(*columns.values(), strict=True)
        )
    ]
    for run in runs:
        if run.nbytes <= 0 or run.run.byte_offset < 0 or len(run.blocks) != -(-run.nbytes // BLOCK_NBYTES):
            raise CorruptData(f"{FRAGMENTS}: the row of {run.array} at {run.box.offset} is impossible")
    return runs


def _unplaced(offset: list[int], shape: list[int], file: str, byte_offset: int) -> Run:
    box = Box(tuple(offset), tuple(shape))
    return Run(box, file, byte_offset, box)


def placed(stored: StoredRun, layout: ArrayLayout | None, where: str) -> StoredRun:
    """The run as its array's layout has it; CorruptData when a table says that it lies anywhere else.

    A file is thereby opened only under a name that the format itself gives it.
    """
    if layout is None:
        raise CorruptData(f"{where}: {stored.array} is no array of this checkpoint")
    box, shape = stored.box, layout.spec.shape
    inside = len(box.offset) == len(box.shape) == len(shape) and min((*box.offset, *box.shape), default=0) >= 0
    if not inside or not Box.whole(shape).contains(box):
        raise CorruptData(f"{where}: {stored.array}: a run at {box.offset} lies outside the array")
    if layout.is_packed:
        return _placed_chunk(stored, layout, where)
    runs = layout.runs(box)
    found = (stored.run.file, stored.run.byte_offset, stored.nbytes)
    if len(runs) != 1 or found != (runs[0].file, runs[0].byte_offset, runs[0].held.size * ITEMSIZE[layout.spec.dtype]):
        raise CorruptData(
            f"{where}: {stored.array}: the run at {box.offset} is said to be {stored.nbytes} bytes at "
            f"{stored.run.file}+{stored.run.byte_offset}, where the format does not put it"
        )
    return replace(stored, run=runs[0])


def _placed_chunk(stored: StoredRun, layout: ArrayLayout, where: str) -> StoredRun:
    """A compressed chunk: it has to be one of the array's chunks; where in the file it begins only the table knows."""
    held = next(layout.chunks(stored.box), None) if stored.box.size else None
    whole = Box.whole(layout.spec.shape)
    is_chunk = held is not None and (held.intersect(whole) if held.shape else held) == stored.box
    if not is_chunk or held is None or stored.run.file != layout.file(layout.shard_of(stored.box)):
        raise CorruptData(f"{where}: {stored.array}: the run at {stored.box.offset} is no chunk of this array")
    if stored.nbytes > packed_bound(held.size * ITEMSIZE[layout.spec.dtype]):
        raise CorruptData(f"{where}: {stored.array}: the chunk at {stored.box.offset} is larger compressed than it can be")
    return replace(stored, run=replace(stored.run, held=held), is_packed=True)


# -- documents ---------------------------------------------------------------------------------------------------------


def objects_table(objects: Mapping[int, Mapping[str, str]], small: Mapping[str, bytes]) -> pa.Table:
    """Objects of every rank as typed JSON, and the small arrays whole, so that loading them takes one read."""
    rows: list[tuple[Any, ...]] = [
        ("object", name, rank, text, None) for rank in sorted(objects) for name, text in sorted(objects[rank].items())
    ]
    rows += [("array", name, None, None, small[name]) for name in sorted(small)]
    columns = [pa.array([row[index] for row in rows], field.type) for index, field in enumerate(OBJECTS_SCHEMA)]
    return pa.Table.from_arrays(columns, schema=OBJECTS_SCHEMA)


def to_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["array"] if "array" in table.schema.names else False)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def from_parquet(data: bytes, schema: pa.Schema, where: str) -> pa.Table:
    """The table in `data`, if it has exactly this schema and a believable size; CorruptData otherwise."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        footer = file.metadata
        claimed = sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))
        if claimed > MAX_DOCUMENT_NBYTES or footer.num_rows > MAX_DOCUMENT_NBYTES // 16:
            raise CorruptData(f"{where}: claims {footer.num_rows} rows of {claimed} bytes, more than any checkpoint has")
        table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise CorruptData(f"{where}: not a readable Parquet file ({error})") from error
    if table.schema.names != schema.names or [field.type for field in table.schema] != [field.type for field in schema]:
        raise UnsupportedFormat(f"{where}: has columns {table.schema.names}, expected {schema.names}")
    if any(table.column(field.name).null_count for field in schema if not field.nullable):
        raise CorruptData(f"{where}: has empty cells in columns that are never empty")
    return table.cast(schema)


# -- the commit record -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """The last file of a save: digests of the documents, and totals."""

    step: int
    digests: dict[str, str]
    arrays: int
    runs: int
    nbytes: int
    created_s: float

    def to_bytes(self) -> bytes:
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "created_s": self.created_s,
            "totals": {"arrays": self.arrays, "runs": self.runs, "nbytes": self.nbytes},
            "sha256": self.digests,
        }
        return json.dumps({**body, "self_sha256": _self_digest(body)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> CommitRecord:
        """Raises UnsupportedFormat for a version that is not ours, CorruptData for anything that no writer wrote."""
        try:
            body = json.loads(data)
            kind, version = body["format"], body["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptData(f"{where}: not a commit record ({error!r})") from error
        if kind != FORMAT or version != VERSION:
            raise UnsupportedFormat(
                f"{where}: format {kind!r} version {version!r}; this release reads {FORMAT!r} version {VERSION}; "
                "a newer holdfast may read it"
            )
        try:
            expected = body.pop("self_sha256")
            totals, digests = body["totals"], {str(name): str(body["sha256"][name]) for name in DOCUMENTS}
            counts = [int(value) for value in (body["step"], totals["arrays"], totals["runs"], totals["nbytes"])]
            created_s = float(body["created_s"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CorruptData(f"{where}: a part of the commit record is missing or damaged ({error!r})") from error
        if expected != _self_digest(body) or min(counts) < 0:
            raise CorruptData(f"{where}: the commit record was changed after it was written")
        return cls(counts[0], digests, counts[1], counts[2], counts[3], created_s)


def _self_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_commit(directory: Place) -> CommitRecord:
    """The commit record of a step directory; NotACheckpoint when the save was never committed."""
    path = directory / COMMIT
    try:
        return CommitRecord.from_bytes(read_document(directory, COMMIT, MAX_COMMIT_NBYTES), str(path))
    except MissingData:
        known = any((directory / name).exists() for name in DOCUMENTS)
        why = "its save never finished; an older step may be whole" if known else "this is no checkpoint that holdfast wrote"
        raise NotACheckpoint(
            f'{directory}: has no {COMMIT}: {why}; "holdfast ls {directory.parent}" lists what is there'
        ) from None


def read_document(directory: Place, name: str, limit_nbytes: int = MAX_DOCUMENT_NBYTES) -> bytes:
    """The bytes of one of the checkpoint's own documents; a link or an oversized file is refused."""
    path = directory / name
    if path.is_symlink():
        raise UnsupportedFormat(f"{path}: is a symbolic link; a checkpoint holds only files of its own")
    try:
        found = path.stat().st_size
        if found > limit_nbytes:
            raise UnsupportedFormat(
                f"{path}: is {found} bytes, more than the {limit_nbytes} that a checkpoint's document may have"
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingData(f"{path}: is missing") from error
    except OSError as error:
        raise MissingData(f"{path}: cannot be read ({error.strerror})") from error


def read_checked(directory: Place, record: CommitRecord, name: str) -> bytes:
    """A document whose digest is the one in COMMIT."""
    data = read_document(directory, name)
    found = sha256(data)
    if found != record.digests[name]:
        raise CorruptData(
            f"{directory / name}: sha256 is {found[:12]}…, {COMMIT} says {record.digests[name][:12]}…; "
            f'the file changed after the save; use another step ("holdfast ls {directory.parent}")'
        )
    return data
