"""The vocabulary that capture, parity, restore and checkpoints share: arrays, fragments and the fragment table.

An *array* is a logical global tensor. A *fragment* is a box of it that one rank holds. Everything here is a pure function of
plain values, so every rank that asks the same question gets the same answer, and a plan can be printed before it runs.

Importing this file does not import torch; only `placement_of` looks at tensors, and it needs no more than their attributes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import pyarrow as pa

from holdfast.errors import CorruptData, LayoutMismatch, StateError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

ITEMSIZE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element of every dtype that can be captured, by the name torch, numpy and Zarr share."""

SMALL_ARRAY_NBYTES = 64 * 1024
"""Replicated fragments below this size are not cut: one replica copies the whole."""

_NAME_PART = re.compile(r"[^/\\\x00-\x1f\x7f]+")
_RESERVED_PARTS = frozenset({".", "..", "zarr.json", "_holdfast", "COMMIT"})


# -- arrays and boxes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """A logical global tensor: `model/layers.0.wq.weight`, `optim/layers.0.wq.weight/exp_avg`."""

    name: str
    dtype: str
    shape: Shape

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.dtype not in ITEMSIZE:
            raise StateError(f"array {self.name}: dtype {self.dtype} cannot be captured; known: {', '.join(ITEMSIZE)}")
        if any(extent < 0 for extent in self.shape):
            raise StateError(f"array {self.name}: shape {self.shape} has a negative extent")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of an array: `offset` of its first element and `shape`, in elements, one entry per dimension."""

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> Shape:
        return tuple(start + extent for start, extent in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part of two boxes of one array, or None when they share no element."""
        low = tuple(map(max, self.offset, other.offset))
        high = tuple(map(min, self.end, other.end))
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return None
        return Box(low, tuple(b - a for a, b in zip(low, high, strict=True)))

    def contains(self, other: Box) -> bool:
        return all(map(int.__le__, self.offset, other.offset)) and all(map(int.__ge__, self.end, other.end))

    def slices(self, within: Box) -> tuple[slice, ...]:
        """Where this box lies in a buffer that holds `within`, as numpy or torch indices."""
        return tuple(
            slice(start - base, start - base + extent)
            for start, base, extent in zip(self.offset, within.offset, self.shape, strict=True)
        )

    def rows(self, start: int, stop: int) -> Box:
        """Rows [start, stop) of this box, counted from its own first row."""
        return Box((self.offset[0] + start, *self.offset[1:]), (stop - start, *self.shape[1:]))


@lru_cache(maxsize=1 << 16)  # every table of every rank names the same arrays
def check_name(name: str) -> None:
    """Accept a relative path of printable parts; refuse what could leave a checkpoint's directory or clash with its files."""
    parts = name.split("/")
    if all(_NAME_PART.fullmatch(part) and part not in _RESERVED_PARTS for part in parts):
        return
    raise StateError(
        f"array name {name!r} cannot be stored: parts between '/' must be printable, not empty and none of "
        f"{', '.join(sorted(_RESERVED_PARTS))}"
    )


# -- who holds what ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """How one rank holds one array: the boxes, and which of how many equal holders it is.

    `replicas == 1` means that nobody else is known to hold these bytes. `expected` lists the ranks that have to hold a part of
    the array, where the layout says so.
    """

    spec: ArraySpec
    boxes: tuple[Box, ...]
    replica: int = 0
    replicas: int = 1
    expected: tuple[int, ...] = ()


def shard_box(shape: Sequence[int], shards: Iterable[tuple[int, int, int]]) -> Box:
    """The box left after cutting `shape` by each (dim, parts, index) in order, with torch.chunk's ceiling rule.

    An index past the last chunk gets an empty box, as the last ranks of an unevenly sharded DTensor do.
    """
    offset, extent = [0] * len(shape), list(shape)
    for dim, parts, index in shards:
        step = -(-extent[dim] // parts)
        start = min(index * step, extent[dim])
        offset[dim] += start
        extent[dim] = min(step, extent[dim] - start)
    return Box(tuple(offset), tuple(extent))


def flat_range_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut elements [start, stop) of a flattened array into the fewest boxes that list them in order.

    Flat sharding (ZeRO, FSDP1) gives each rank such a range. With d dimensions at most 2d-1 boxes come out.
    """
    shape = tuple(shape)
    if not 0 <= start <= stop <= math.prod(shape):
        raise LayoutMismatch(f"flat range [{start}, {stop}) does not lie in an array of shape {shape}")
    if start == stop:
        return []
    if len(shape) <= 1:
        return [Box((start,), (stop - start,))] if shape else [Box((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # the range begins and ends inside one row
        return _boxes_in_row(shape, last, start - last * row, stop - last * row)
    head = _boxes_in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    body = [Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))] if first < last else []
    tail = _boxes_in_row(shape, last, 0, stop - last * row) if last * row < stop else []
    return head + body + tail


def _boxes_in_row(shape: Shape, row: int, start: int, stop: int) -> list[Box]:
    return [Box((row, *box.offset), (1, *box.shape)) for box in flat_range_boxes(shape[1:], start, stop)]


def owned_boxes(placement: Placement) -> list[Box]:
    """The part of a replicated placement that this replica captures; together the replicas cover each box exactly once.

    The answer depends on the array alone and not on its neighbours, so ranks whose other state differs still agree. Boxes are
    cut by rows, evenly; small ones go whole to a replica chosen by the hash of their place.
    """
    boxes = [box for box in placement.boxes if box.size]
    if placement.replicas == 1:
        return boxes
    itemsize = ITEMSIZE[placement.spec.dtype]
    return [part for box in boxes for part in _share(placement, box, itemsize)]


def _share(placement: Placement, box: Box, itemsize: int) -> list[Box]:
    rows = box.shape[0] if box.shape else 1
    if rows < placement.replicas or box.size * itemsize < SMALL_ARRAY_NBYTES:
        place = f"{placement.spec.name}@{box.offset}".encode()
        owner = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big") % placement.replicas
        return [box] if owner == placement.replica else []
    start, stop = (rows * i // placement.replicas for i in (placement.replica, placement.replica + 1))
    return [box.rows(start, stop)]


def placement_of(name: str, tensor: torch.Tensor, *, replica: int = 0, replicas: int = 1) -> Placement:
    """How this rank holds `tensor`: a DTensor by its mesh and placements, any other tensor whole.

    `replica` and `replicas` describe a plain tensor that is known to be equal on several ranks (DDP). Raises StateError for
    partial sums, whose value no single rank holds, and for tensors that are not one block of numbers in memory.
    """
    problem = _unlike_memory(tensor)
    if problem:
        raise StateError(f"{name} {problem}")
    spec = ArraySpec(name, dtype_name(tensor), tuple(tensor.shape))
    if not hasattr(tensor, "device_mesh"):
        return Placement(spec, (Box.whole(spec.shape),), replica, replicas)
    mesh: Any = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    extents, expected = _extents_and_ranks(mesh)
    if coordinate is None:
        return Placement(spec, (), expected=expected)
    cuts, replica, replicas = [], 0, 1
    for axis, kind in enumerate(tensor.placements):  # type: ignore[attr-defined]
        parts, index = extents[axis], int(coordinate[axis])
        if kind.is_partial():
            raise StateError(f"{name} is a partial sum over its mesh; redistribute it before it can be captured")
        if kind.is_replicate():
            replica, replicas = replica * parts + index, replicas * parts
        else:
            cuts.append((hasattr(kind, "split_factor"), axis, (kind.dim % len(spec.shape), parts, index)))
    # FSDP over TP on one dimension: the strided outer shard cuts what the inner one has left, so it comes last.
    cuts.sort(key=lambda cut: (cut[0], cut[1]))
    box = shard_box(spec.shape, (cut for _, _, cut in cuts))
    return Placement(spec, (box,), replica, replicas, expected)


def _unlike_memory(tensor: Any) -> str:
    """Why the bytes of a tensor, or of this rank's part of it, cannot be copied out and back in; or nothing."""
    if hasattr(tensor, "device_mesh"):
        tensor = tensor.to_local()
    kind = type(tensor).__qualname__
    if getattr(tensor, "cls_to_become", None) is not None:
        return "has no shape yet: run the module once, or build it with its sizes, before it is protected"
    if tensor.is_meta:
        return "is on the meta device and has no values: materialize it (to_empty) and set its values first"
    if hasattr(tensor, "__tensor_flatten__") or tensor.is_nested:
        return f"is a {kind}, which is made of several tensors inside; give protect() an object whose state_dict returns those"
    if str(tensor.layout) != "torch.strided":
        return f"is {str(tensor.layout).removeprefix('torch.')}; only dense tensors can be captured"
    if tensor.is_conj() or tensor.is_neg():
        return "is a view that is conjugated or negated when it is read; store what resolve_conj() and resolve_neg() return"
    if any(extent > 1 and stride == 0 for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return "is expanded: several of its elements are one in memory; store a contiguous copy"
    return ""


_MESHES: WeakKeyDictionary[Any, tuple[Shape, tuple[int, ...]]] = WeakKeyDictionary()


def _extents_and_ranks(mesh: Any) -> tuple[Shape, tuple[int, ...]]:
    """Kept: torch 2.13 computes `mesh.mesh` anew each time, which for a hundred tensors takes tens of milliseconds."""
    found = _MESHES.get(mesh)
    if found is None:
        ranks = mesh.mesh
        found = _MESHES[mesh] = tuple(map(int, ranks.shape)), tuple(map(int, ranks.flatten().tolist()))
    return found


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# -- the fragment table ------------------------------------------------------------------------------------------------

SCHEMA = pa.schema(
    [
        pa.field("array", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("global_shape", pa.list_(pa.int64()), nullable=False),
        pa.field("offset", pa.list_(pa.int64()), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("slot_offset", pa.int64(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("crc32c", pa.uint32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Fragment:
    """One row of the table: a box of an array, the rank that holds it, and where its bytes begin in that rank's slot.

    The bytes are the box in row-major order, little-endian. `crc32c` is None until somebody has read them.
    """

    array: str
    dtype: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    rank: int
    slot_offset: int
    nbytes: int
    crc32c: int | None = None

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)

    @property
    def spec(self) -> ArraySpec:
        return ArraySpec(self.array, self.dtype, self.global_shape)


@dataclass(frozen=True)
class FragmentTable:
    """An Arrow table with one row per fragment: the one thing that capture, parity, restore and checkpoint all speak."""

    table: pa.Table

    @classmethod
    def from_rows(cls, rows: Iterable[Fragment]) -> FragmentTable:
        rows = list(rows)
        columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in SCHEMA]
        return cls(pa.Table.from_arrays(columns, schema=SCHEMA))

    @classmethod
    def concat(cls, tables: Iterable[FragmentTable]) -> FragmentTable:
        return cls(pa.concat_tables([SCHEMA.empty_table(), *(table.table for table in tables)]).combine_chunks())

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> FragmentTable:
        """Read an Arrow IPC stream and check every row; raises CorruptData when it is not a fragment table."""
        try:
            with pa.ipc.open_stream(pa.py_buffer(data)) as stream:
                table = stream.read_all()
            # Before any value is looked at: a damaged offset would make Arrow read outside of the buffer.
            table.validate(full=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise CorruptData(f"fragment table: not an Arrow stream ({error})") from error
        if not table.schema.equals(SCHEMA):
            raise CorruptData(f"fragment table: its schema differs from the columns {', '.join(SCHEMA.names)}")
        if any(_has_nulls(table.column(field.name)) for field in SCHEMA if not field.nullable):
            raise CorruptData("fragment table: a value that every row must have is null")
        found = cls(table)
        for row in found:
            _check_row(row)
        return found

    def to_bytes(self) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SCHEMA) as stream:
            stream.write_table(self.table)
        return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[Fragment]:
        columns = [self.table.column(name).to_pylist() for name in SCHEMA.names]
        for array, dtype, global_shape, offset, shape, rank, slot_offset, nbytes, crc in zip(*columns, strict=True):
            yield Fragment(array, dtype, tuple(global_shape), tuple(offset), tuple(shape), rank, slot_offset, nbytes, crc)

    @property
    def nbytes(self) -> int:
        """Payload bytes that the table names, duplicates included."""
        return sum(self.table.column("nbytes").to_pylist())

    def specs(self) -> dict[str, ArraySpec]:
        """Every array by name; raises LayoutMismatch when two rows disagree about its dtype or shape."""
        return specs_of(self)

    def with_crcs(self, crcs: Sequence[int]) -> FragmentTable:
        column = pa.array(crcs, pa.uint32())
        return FragmentTable(self.table.set_column(self.table.schema.get_field_index("crc32c"), SCHEMA.field("crc32c"), column))


def specs_of(rows: Iterable[Fragment]) -> dict[str, ArraySpec]:
    """Every array by name; raises LayoutMismatch when two rows disagree about its dtype or shape."""
    specs: dict[str, ArraySpec] = {}
    for row in rows:
        known = specs.get(row.array) or specs.setdefault(row.array, row.spec)
        if (known.dtype, known.shape) != (row.dtype, row.global_shape):
            raise LayoutMismatch(
                f"{row.array}: rank {row.rank} says {row.dtype}{list(row.global_shape)}, another rank says "
                f"{known.dtype}{list(known.shape)}; all ranks have to build the same model"
            )
    return specs


def _has_nulls(column: pa.ChunkedArray) -> bool:
    # Not by `flatten`, which imports all of pyarrow's kernels: 70 ms, in the middle of a recovery.
    nested = pa.types.is_list(column.type) and any(chunk.values.null_count for chunk in column.chunks)
    return bool(column.null_count or nested)


def _check_row(row: Fragment) -> None:
    try:
        spec = row.spec
    except StateError as error:
        raise CorruptData(f"fragment table: {error}") from error
    # Without a Box for each row: every rank does this for the rows of all ranks, while training waits for it.
    sound = (
        len(row.global_shape) == len(row.offset) == len(row.shape)
        and min((*row.offset, *row.shape, row.rank, row.slot_offset, row.nbytes)) >= 0
        and all(map(_fits, row.offset, row.shape, row.global_shape))
        and row.nbytes == math.prod(row.shape) * ITEMSIZE[spec.dtype]
    )
    if not sound:
        raise CorruptData(f"fragment table: row of {row.array} is impossible: {row}")


def _fits(offset: int, extent: int, within: int) -> bool:
    return offset + extent <= within


# -- checks over whole tables ------------------------------------------------------------------------------------------


def check_coverage(specs: Iterable[ArraySpec], pieces: dict[str, list[Box]]) -> None:
    """Every array is tiled by its boxes exactly once; raises LayoutMismatch naming the first hole or overlap."""
    for spec in specs:
        boxes = [box for box in pieces.get(spec.name, []) if box.size]
        covered = sum(box.size for box in boxes)
        outside = next((box for box in boxes if not Box.whole(spec.shape).contains(box)), None)
        if outside is not None:
            raise LayoutMismatch(f"{spec.name}: {outside} lies outside of its shape {spec.shape}")
        overlap = next(iter(_overlaps(boxes)), None)
        if overlap is not None:
            raise LayoutMismatch(f"{spec.name}: elements at {overlap.offset} (shape {overlap.shape}) are held twice")
        if covered != math.prod(spec.shape):
            raise LayoutMismatch(
                f"{spec.name}: {covered} of {math.prod(spec.shape)} elements are held by some rank; "
                "a rank is missing from the job, or has built a different model"
            )


def _overlaps(boxes: list[Box]) -> Iterator[Box]:
    """Pairs that share elements, found by sweeping along the most finely cut dimension (one cut dimension costs n log n)."""
    active: list[Box] = []
    dims = range(len(boxes[0].offset)) if boxes else ()
    along = max(dims, key=lambda dim: len({box.offset[dim] for box in boxes}), default=0)
    for box in sorted(boxes, key=lambda box: box.offset[along:]):
        start = box.offset[along] if box.offset else 0
        active = [other for other in active if other.offset and other.end[along] > start]
        for other in active:
            common = box.intersect(other)
            if common is not None:
                yield common
        active.append(box)
        if not box.offset and len(boxes) > 1:
            yield box


def distinct_fragments(table: FragmentTable) -> FragmentTable:
    """One row for each distinct box: of ranks that hold the same box, the lowest is kept.

    Rows of one box whose bytes differ between ranks are kept apart by naming the others `<array>@rank-<r>`, so that state that
    a rank has for itself is never merged away.
    """
    first: dict[tuple[str, Shape, Shape], Fragment] = {}
    rows: list[Fragment] = []
    for row in sorted(table, key=lambda row: row.rank):
        key = (row.array, row.offset, row.shape)
        known = first.setdefault(key, row)
        if known is row:
            rows.append(row)
        elif known.crc32c != row.crc32c:
            rows.append(replace(row, array=rank_name(row.array, row.rank)))
    return FragmentTable.from_rows(rows)


def rank_name(array: str, rank: int) -> str:
    """The stored name of state that `rank` has for itself."""
    return f"{array}@rank-{rank}"


def split_rows(box: Box, itemsize: int, limit_nbytes: int) -> list[Box]:
    """Cut a box into runs of whole rows of at most `limit_nbytes` each (a single row may be larger)."""
    if not box.shape or box.size * itemsize <= limit_nbytes:
        return [box]
    rows = max(1, limit_nbytes // max(1, box.size // box.shape[0] * itemsize))
    return [box.rows(start, min(start + rows, box.shape[0])) for start in range(0, box.shape[0], rows)]


def grid(shape: Sequence[int], parts: Sequence[int]) -> list[Box]:
    """All boxes of `shape` cut into `parts` chunks per dimension, torch.chunk's way, row-major; empty ones included."""
    return [
        shard_box(shape, [(dim, count, index) for dim, (count, index) in enumerate(zip(parts, where, strict=True))])
        for where in product(*(range(count) for count in parts))
    ]
