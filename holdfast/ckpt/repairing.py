"""Putting damaged bytes right: from the parity beside the step, and from another copy of it.

Only blocks whose checksum is the one that this checkpoint expects are taken, so a repair can never bring in other data; the replica
may have been written from another layout. A file is repaired in a copy that then replaces it whole. What follows from the layout
(shard indexes, Zarr documents) is written anew without any replica.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from holdfast.arrays import Box
from holdfast.ckpt.blocks import BLOCK_NBYTES, block_crcs
from holdfast.ckpt.catalog import find_step, open_checkpoint
from holdfast.ckpt.dual import head
from holdfast.ckpt.durable import disk_errors, replace_durably, sync_path
from holdfast.ckpt.manifest import DOCUMENTS, StoredRun, read_checked, read_commit
from holdfast.ckpt.parity import ParityCheck, check_parity, repair_from_parity
from holdfast.ckpt.reader import Checkpoint, open_directory
from holdfast.ckpt.reading import Progress
from holdfast.ckpt.steps import Address, step_of
from holdfast.ckpt.storage import local
from holdfast.ckpt.strips import ArrayLayout, Run
from holdfast.ckpt.verify import Damage, VerifyReport, shard_end
from holdfast.ckpt.views import run_bytes
from holdfast.ckpt.zarrdoc import array_document, group_document, to_json
from holdfast.errors import ConfigError, HoldfastError, LayoutMismatch


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was put right, or could be, and what is left."""

    path: str
    step: int
    replica: str
    files: tuple[str, ...]
    blocks: int
    lost: tuple[Damage, ...]
    dry_run: bool


@dataclass(frozen=True, slots=True)
class _Patch:
    """Right bytes for one damaged stretch of a file."""

    file: str
    byte_offset: int
    data: memoryview


def repair(
    path: str | Path, replica: str | Path | None = None, *, dry_run: bool = False, progress: Progress | None = None
) -> Repaired:
    """Everything of the step at `path` that its parity, and the checkpoint at `replica`, can put right is right again.

    Without parity COMMIT itself has to be sound, for it decides what is right. Raises ConfigError when there is neither, and
    LayoutMismatch when the replica holds other arrays.
    """
    address = Address.parse(str(path))
    directory = local(find_step(address.path, address.step), "repair")
    check = check_parity(directory, progress)
    if check is None and replica is None:
        raise ConfigError(f"{directory}: has no sound parity beside it; give --replica, another copy of the step")
    by_parity = _by_parity(directory, check, dry_run) if check is not None else None
    if by_parity is not None and (replica is None or not by_parity.lost):
        return by_parity
    assert replica is not None
    by_replica = _by_replica(directory, replica, dry_run, progress)
    if by_parity is None:
        return by_replica
    files = tuple(sorted({*by_parity.files, *by_replica.files}))
    return replace(by_replica, files=files, blocks=by_parity.blocks + by_replica.blocks)


def _by_parity(directory: Path, check: ParityCheck, dry_run: bool) -> Repaired:
    """What parity alone puts right; what it cannot is listed by files, for only the documents know arrays."""
    files = repair_from_parity(directory, check, dry_run=dry_run)
    lost = [_lost(check, block) for block in check.lost]
    if not dry_run and not lost:
        lost = list(open_directory(directory).verify().damages)
    step = step_of(directory)
    return Repaired(str(directory), -1 if step is None else step, "", tuple(files), len(check.repairable), tuple(lost), dry_run)


def _lost(check: ParityCheck, block: int) -> Damage:
    stream = check.stream
    start = block * stream.block_nbytes
    name, offset, count = next(stream.pieces(start, start + stream.block_nbytes), ("", 0, 0))
    what = f"more than the {stream.parity} blocks are damaged that parity can rebuild together"
    return Damage("", name, offset, count, (), (), what)


def _by_replica(directory: Path, replica: str | Path, dry_run: bool, progress: Progress | None) -> Repaired:
    source = open_checkpoint(replica, None if Address.parse(str(replica)).step is not None else read_commit(directory).step)
    documents = _documents(directory, source)
    if not dry_run:
        for name, data in documents.items():
            with disk_errors("repairing", directory / name):
                replace_durably(directory / name, data)
    elif documents:  # without them the data cannot be looked at
        return Repaired(str(directory), source.step, str(source.path), tuple(documents), 0, (), True)
    checkpoint = open_directory(directory)
    if {name: checkpoint.specs[name] for name in checkpoint.specs} != dict(source.specs):
        raise LayoutMismatch(f"{source.path}: holds other arrays than {directory}; it is no replica of it")
    report = checkpoint.verify(progress)
    patches = [patch for damage in report.damages for patch in _patches(checkpoint, source, damage)]
    files = tuple(sorted({*documents, *(patch.file for patch in patches), *_derived(checkpoint, report)}))
    if not dry_run:
        with disk_errors("repairing", directory):
            for file in {patch.file for patch in patches} | set(_derived(checkpoint, report)):
                _rewrite(checkpoint, file, [patch for patch in patches if patch.file == file])
        lost = tuple(open_directory(directory).verify().damages)
    else:
        lost = tuple(damage for damage in report.damages if not _is_covered(checkpoint, damage, patches))
    blocks = sum(-(-len(patch.data) // BLOCK_NBYTES) for patch in patches)
    return Repaired(str(directory), checkpoint.step, str(source.path), files, blocks, lost, dry_run)


def _documents(directory: Path, source: Checkpoint) -> dict[str, bytes]:
    """The replica's copies of our damaged documents, where they are exactly what our COMMIT names."""
    record = read_commit(directory)
    found: dict[str, bytes] = {}
    for name in DOCUMENTS:
        try:
            read_checked(directory, record, name)
        except HoldfastError:
            found[name] = read_checked(source.path, record, name)
    return found


def _patches(checkpoint: Checkpoint, source: Checkpoint, damage: Damage) -> Iterator[_Patch]:
    """The replica's bytes for a damaged stretch of data, as far as their checksums are ours."""
    if damage.array not in checkpoint.specs:
        return
    for run in checkpoint.runs(damage.array):
        start, stop = run.run.byte_offset, run.run.byte_offset + run.nbytes
        low, high = max(start, damage.byte_offset), min(stop, damage.byte_offset + damage.nbytes)
        if run.run.file == damage.file and low < high:
            for block in range((low - start) // BLOCK_NBYTES, (high - start - 1) // BLOCK_NBYTES + 1):
                data = _block_from(source, checkpoint, run, block)
                if data is not None:
                    yield _Patch(damage.file, start + block * BLOCK_NBYTES, data)


def _block_from(source: Checkpoint, checkpoint: Checkpoint, run: StoredRun, block: int) -> memoryview | None:
    if run.is_packed:
        return _packed_block_from(source, run, block)
    rows = checkpoint.block_box(run, block)
    dtype = checkpoint.specs[run.array].dtype
    itemsize = checkpoint.specs[run.array].nbytes // Box.whole(checkpoint.specs[run.array].shape).size
    buffer = memoryview(bytearray(rows.size * itemsize))
    try:
        source.read_box(run.array, rows, buffer)
    except HoldfastError:
        return None  # damaged in the replica too
    held = Box(rows.offset[:1] + run.run.held.offset[1:], rows.shape[:1] + run.run.held.shape[1:])
    data = run_bytes(buffer, rows, Run(rows, run.run.file, 0, held), dtype)
    first = (rows.offset[0] - run.box.offset[0]) * (run.nbytes // run.run.held.shape[0]) if rows.shape else 0
    at = block * BLOCK_NBYTES - first
    found = data[at : at + min(BLOCK_NBYTES, run.nbytes - block * BLOCK_NBYTES)]
    return found if block_crcs(found)[0] == run.blocks[block] else None


def _packed_block_from(source: Checkpoint, run: StoredRun, block: int) -> memoryview | None:
    """Compressed bytes can only come from a replica that compressed the same chunk to the same bytes."""
    for twin in source.runs(run.array):
        if twin.is_packed and twin.box == run.box and twin.nbytes == run.nbytes and np.array_equal(twin.blocks, run.blocks):
            start = block * BLOCK_NBYTES
            try:
                return source.read_run(twin, start, min(start + BLOCK_NBYTES, run.nbytes))
            except HoldfastError:
                return None  # damaged in the replica too
    return None


def _derived(checkpoint: Checkpoint, report: VerifyReport) -> list[str]:
    """Damaged files, or ends of files, that follow from the layout alone."""
    files = {damage.file for damage in report.damages}
    shards = {layout.file(shard): layout for layout in checkpoint.layouts.values() for shard in range(layout.shards)}
    return sorted(file for file in files if file.endswith("/zarr.json") or file in shards)


def _is_covered(checkpoint: Checkpoint, damage: Damage, patches: list[_Patch]) -> bool:
    if damage.file.endswith("/zarr.json") or not any(run.run.file == damage.file for run in checkpoint.runs(damage.array)):
        return True
    ends = max(run.run.byte_offset + run.nbytes for run in checkpoint.runs(damage.array) if run.run.file == damage.file)
    held = sum(
        min(patch.byte_offset + len(patch.data), damage.byte_offset + damage.nbytes)
        - max(patch.byte_offset, damage.byte_offset)
        for patch in patches
        if patch.file == damage.file
        and patch.byte_offset < damage.byte_offset + damage.nbytes
        and damage.byte_offset < patch.byte_offset + len(patch.data)
    )
    begins = min(run.run.byte_offset for run in checkpoint.runs(damage.array) if run.run.file == damage.file)
    around = damage.byte_offset >= ends or damage.byte_offset + damage.nbytes <= begins  # it follows from the layout
    return around or held >= min(damage.nbytes, ends - damage.byte_offset)


def _rewrite(checkpoint: Checkpoint, file: str, patches: list[_Patch]) -> None:
    path = local(checkpoint.path, "repair") / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.endswith("/zarr.json"):
        name = file.removesuffix("/zarr.json")
        layout = checkpoint.layouts.get(name)
        replace_durably(path, to_json(group_document() if layout is None else array_document(layout)))
        return
    repaired = path.with_name(f".{path.name}.repair")
    if path.exists():
        shutil.copyfile(path, repaired)
    fd = os.open(repaired, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        for patch in patches:
            os.pwrite(fd, patch.data, patch.byte_offset)
        layout, shard = _shard_of(checkpoint, file)
        index, begins = shard_end(layout, shard, checkpoint.runs(layout.spec.name))
        if layout.head_nbytes:
            os.pwrite(fd, head(layout), 0)
        os.ftruncate(fd, begins)
        os.pwrite(fd, index, begins)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(repaired, path)
    sync_path(path.parent)


def _shard_of(checkpoint: Checkpoint, file: str) -> tuple[ArrayLayout, int]:
    return next(
        (layout, shard)
        for layout in checkpoint.layouts.values()
        for shard in range(layout.shards)
        if layout.file(shard) == file
    )
