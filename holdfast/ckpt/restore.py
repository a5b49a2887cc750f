"""A checkpoint, cut for a mesh and written as files that a job can load at once.

Reads are checked, memory is bounded, and the output directory appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, Fragment, FragmentTable, split_rows
from holdfast.ckpt.catalog import open_checkpoint
from holdfast.ckpt.cuts import LocalArray
from holdfast.ckpt.durable import check_room, disk_errors, sync_files
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.plan import plan_write
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.reading import Progress
from holdfast.ckpt.reads import nbytes_read
from holdfast.ckpt.reshard import ReshardPlan, plan_reshard
from holdfast.ckpt.rules import Rules
from holdfast.ckpt.safetensors import write_skeleton
from holdfast.ckpt.stream import DEFAULT_MEMORY_NBYTES, Destination, check_memory, stream
from holdfast.ckpt.write import begin, commit, write_fragments
from holdfast.errors import ConfigError

FORMATS = ("torch", "safetensors", "universal", "dcp")

PROBE_PARTS, PROBE_NBYTES, PROBE_S = 32, 4 << 20, 0.5
"""A dry run reads at most so much to say how fast the storage is."""


@dataclass(frozen=True, slots=True)
class RestoredRank:
    """What one rank of the mesh gets, and from which file it loads it."""

    rank: int
    file: str
    arrays: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did, or would do."""

    checkpoint: str
    step: int
    mesh: str
    format: str
    out: str
    ranks: tuple[RestoredRank, ...]
    nbytes: int
    read_nbytes: int
    memory_nbytes: int
    dry_run: bool
    seconds: float
    read_nbytes_per_s: float | None = None
    """What a dry run measured, reading a little of the checkpoint; a page cache that is warm makes it better than the disk is."""

    @property
    def estimated_s(self) -> float | None:
        """How long the reading alone would take, after a dry run."""
        return self.read_nbytes / self.read_nbytes_per_s if self.read_nbytes_per_s else None

    @property
    def read_amplification(self) -> float:
        return self.read_nbytes / self.nbytes if self.nbytes else 1.0


def restore(
    path: str | Path | Checkpoint,
    mesh: Mesh | str,
    out: str | Path,
    format: str = "torch",
    *,
    rules: Rules | None = None,
    only: Callable[[str], bool] | None = None,
    max_memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    threads: int = 2,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """`out` holds the checkpoint as `mesh` wants it; with `dry_run` only the numbers come back.

    torch: `rank-00000.pt` …, for `torch.load(weights_only=True)`. safetensors: `rank-00000.safetensors` … (`model.safetensors`
    for a mesh of one). universal: a checkpoint whose fragments are those of the mesh. dcp: a torch.distributed.checkpoint whose
    chunks are those of the mesh. What several ranks hold is read once. `out` must be new or empty; after an error it is as it
    was. `only(name)` picks arrays.
    """
    started_s = time.monotonic()
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    check_memory(max_memory_nbytes)
    mesh = mesh if isinstance(mesh, Mesh) else Mesh.parse(mesh)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    specs = {name: spec for name, spec in checkpoint.specs.items() if only is None or only(name)}
    if not specs:
        raise ConfigError(f"{checkpoint.path}: no array is left to restore")
    plan = plan_reshard(specs, mesh, rules=rules, world=checkpoint.world)
    out = Path(out)
    if not dry_run:
        with fresh_directory(out) as place:
            check_room(out, sum(plan.rank_nbytes))
            _WRITERS[format](checkpoint, plan, place, max_memory_nbytes, threads, progress)
    return Restored(
        checkpoint=str(checkpoint.path),
        step=checkpoint.step,
        mesh=str(mesh),
        format=format,
        out=str(out),
        ranks=tuple(_rank_info(plan, format, rank, checkpoint.step) for rank in range(mesh.ranks)),
        nbytes=sum(plan.rank_nbytes),
        read_nbytes=_read_nbytes(checkpoint, plan),
        memory_nbytes=min(max_memory_nbytes, sum(plan.rank_nbytes) * 2 + threads * (8 << 20)),
        dry_run=dry_run,
        seconds=time.monotonic() - started_s,
        read_nbytes_per_s=probe_read(checkpoint, plan, threads) if dry_run else None,
    )


def probe_read(checkpoint: Checkpoint, plan: ReshardPlan, threads: int) -> float | None:
    """Bytes per second of reading some of what the plan reads, checked, for PROBE_S at most; None when there is nothing to read.

    Damage that it meets is raised: better before a restore than in the middle of it.
    """
    parts = [part for local, _ in plan.replicas for part in local.parts]
    parts = parts[:: max(1, len(parts) // PROBE_PARTS)]
    nbytes, started_s = 0, time.monotonic()
    for part in parts:
        spec = checkpoint.specs[part.array]
        itemsize = ITEMSIZE[spec.dtype]
        box = split_rows(part.box, itemsize, PROBE_NBYTES)[0]
        checkpoint.read_box(part.array, box, bytearray(box.size * itemsize), threads=threads)
        nbytes += box.size * itemsize
        if time.monotonic() - started_s > PROBE_S:
            break
    return nbytes / max(time.monotonic() - started_s, 1e-9) if nbytes else None


@contextmanager
def fresh_directory(out: Path) -> Iterator[Path]:
    """A directory to fill that becomes `out` when all went well, and is removed when not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already and not empty; give a new directory")
    place = out.with_name(f".{out.name}.partial-{os.getpid()}")
    with disk_errors("restoring to", place):
        place.mkdir(parents=True)
        try:
            yield place
            if out.exists():
                out.rmdir()
            os.rename(place, out)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise


def _rank_info(plan: ReshardPlan, format: str, rank: int, step: int) -> RestoredRank:
    shared = {"universal": f"step-{step:08d}", "dcp": "*.distcp"}
    file = shared.get(format) or _file(format, rank, plan.mesh.ranks)
    return RestoredRank(rank, file, len(plan.ranks[rank]), plan.rank_nbytes[rank])


def _file(format: str, rank: int, ranks: int) -> str:
    if format == "torch":
        return f"rank-{rank:05d}.pt"
    return "model.safetensors" if ranks == 1 else f"rank-{rank:05d}.safetensors"


def _read_nbytes(checkpoint: Checkpoint, plan: ReshardPlan) -> int:
    """Bytes asked of the disk, checksum blocks and sieves included; replicas share one read."""
    boxes = [(part.array, part.box) for local, _ in plan.replicas for part in local.parts]
    small = sum(len(checkpoint.small[name]) for name, _ in boxes if name in checkpoint.small)
    return small + nbytes_read(checkpoint.plan(boxes))


# -- one writer per format ---------------------------------------------------------------------------------------------


def _write_torch(
    checkpoint: Checkpoint, plan: ReshardPlan, out: Path, memory: int, threads: int, progress: Progress | None
) -> None:
    from holdfast.ckpt.torchfile import write_skeleton as write_torch_skeleton

    begins: list[dict[str, int]] = []
    paths = [out / _file("torch", rank, plan.mesh.ranks) for rank in range(plan.mesh.ranks)]
    for rank, locals_ in enumerate(plan.ranks):
        shapes = {local.name: checkpoint.specs[local.name].shape for local in locals_ if local.name in checkpoint.specs}
        begins.append(write_torch_skeleton(paths[rank], checkpoint.step, locals_, shapes, objects_for(checkpoint, rank)))
    _fill(checkpoint, plan, paths, begins, memory, threads, progress)
    sync_files(out.iterdir())


def _write_safetensors(
    checkpoint: Checkpoint, plan: ReshardPlan, out: Path, memory: int, threads: int, progress: Progress | None
) -> None:
    about = {"format": "pt", "step": str(checkpoint.step), "mesh": str(plan.mesh)}
    paths = [out / _file("safetensors", rank, plan.mesh.ranks) for rank in range(plan.mesh.ranks)]
    begins = [
        write_skeleton(path, [ArraySpec(local.name, local.dtype, local.tensor_shape) for local in locals_], about)
        for path, locals_ in zip(paths, plan.ranks, strict=True)
    ]
    _fill(checkpoint, plan, paths, begins, memory, threads, progress)
    sync_files(out.iterdir())


def _fill(
    checkpoint: Checkpoint,
    plan: ReshardPlan,
    paths: Sequence[Path],
    begins: Sequence[Mapping[str, int]],
    memory: int,
    threads: int,
    progress: Progress | None,
) -> None:
    """Every rank's file gets its bytes; replicas are read once and written to each of their files."""
    destinations = [
        Destination(local, tuple((paths[rank], begins[rank][name]) for rank, name in holders))
        for local, holders in plan.replicas
    ]
    stream(checkpoint, destinations, max_memory_nbytes=memory, threads=threads, progress=progress)


def _write_dcp(
    checkpoint: Checkpoint, plan: ReshardPlan, out: Path, memory: int, threads: int, progress: Progress | None
) -> None:
    from holdfast.ckpt.dcpfile import write_dcp

    boxes: dict[str, list[Box]] = {}
    for locals_ in plan.ranks:
        for part in (part for local in locals_ for part in local.parts):
            held = boxes.setdefault(part.array, [])
            if part.box not in held:
                held.append(part.box)
    boxes |= {local.name: [] for local in plan.ranks[0] if not local.parts and local.name in checkpoint.specs}
    write_dcp(checkpoint, boxes, out, max_memory_nbytes=memory, threads=threads, progress=progress)


def _write_universal(
    checkpoint: Checkpoint, plan: ReshardPlan, out: Path, memory: int, threads: int, progress: Progress | None
) -> None:
    """Each box once, by the first rank that wants it, in rows that fit the memory."""
    rows: dict[tuple[str, Box], Fragment] = {}
    for rank, locals_ in enumerate(plan.ranks):
        for local in locals_:
            for part in local.parts:
                for box in split_rows(part.box, local.nbytes // max(1, _size(local)), memory // 16):
                    rows.setdefault((part.array, box), _fragment(checkpoint.specs[part.array], box, rank))
    for spec in checkpoint.specs.values():
        if not spec.nbytes and any(local.name == spec.name for local in plan.ranks[0]):
            rows.setdefault((spec.name, Box.whole(spec.shape)), _fragment(spec, Box.whole(spec.shape), 0))
    layout = {**checkpoint.layout, "mesh": dict(plan.mesh.axes), "world": plan.mesh.ranks, "parent": checkpoint.step}
    table = FragmentTable.from_rows(rows.values())
    write = plan_write(table, step=checkpoint.step, layout=layout)
    directory = begin(out, write, "restore")

    def read(row: Fragment) -> memoryview:
        data = memoryview(bytearray(row.nbytes))
        checkpoint.read_box(row.array, row.box, data, threads=threads)
        return data

    write_fragments(directory, write, 0, table, read, threads=threads, progress=progress)
    commit(out, directory, write, nodes=[0], objects={rank: objects_for(checkpoint, rank) for rank in range(plan.mesh.ranks)})


def _size(local: LocalArray) -> int:
    return Box.whole(local.shape).size


def _fragment(spec: ArraySpec, box: Box, rank: int) -> Fragment:
    nbytes = spec.nbytes // max(1, Box.whole(spec.shape).size) * box.size
    return Fragment(spec.name, spec.dtype, spec.shape, box.offset, box.shape, rank, 0, nbytes)


def objects_for(checkpoint: Checkpoint, rank: int) -> Mapping[str, str]:
    """A rank's own objects, or the lowest rank's where the saved world was smaller."""
    if rank in checkpoint.objects or not checkpoint.objects:
        return checkpoint.objects.get(rank, {})
    return checkpoint.objects[min(checkpoint.objects)]


_WRITERS = {"torch": _write_torch, "safetensors": _write_safetensors, "universal": _write_universal, "dcp": _write_dcp}
