"""The write path: a save is begun, every node writes its fragments, and the coordinator commits.

Data goes to offsets that the plan has computed, so writers share nothing but the directory. Every step is durable before the
next one says so: data before the journal that names it, journals before the documents built from them, documents before the
rename, and COMMIT last. A crash anywhere leaves the older checkpoints untouched and this one invisible. Between the steps are
named crash points, and the tests die at each.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from holdfast.arrays import SMALL_ARRAY_NBYTES, Box, Fragment, check_coverage
from holdfast.ckpt.blocks import BLOCK_NBYTES, Crcs, block_crcs, combine
from holdfast.ckpt.durable import check_room, disk_errors, replace_durably, sync_files, sync_path, write_file
from holdfast.ckpt.journal import Journal, box_place, journal_path
from holdfast.ckpt.manifest import DOCUMENTS, CommitRecord, StoredRun, objects_table, placed, runs_table, sha256, to_parquet
from holdfast.ckpt.plan import WritePlan
from holdfast.ckpt.steps import COMMIT, FRAGMENTS, JOURNALS, LATEST, LAYOUT, OBJECTS, step_name, temporary_name
from holdfast.ckpt.strips import Run
from holdfast.ckpt.views import as_bytes, copy_box, run_bytes
from holdfast.ckpt.zarrdoc import array_document, group_document, groups, root_document, shard_index, to_json
from holdfast.coding import crc32c
from holdfast.errors import ConfigError, CorruptData, LayoutMismatch, StateError
from holdfast.events import crash_point, emit

logger = logging.getLogger(__name__)

SEGMENT_NBYTES = 8 << 20
"""One pwrite: large enough for the disk, small enough that two threads share one fragment."""


# -- begin -------------------------------------------------------------------------------------------------------------


def begin(root: str | Path, plan: WritePlan, token: str) -> Path:
    """A fresh directory for this save, with a place for every array; returns it.

    `token` is the save's own: a directory that a dead save left behind is never written to again. Raises StorageError when the
    disk has no room or refuses.
    """
    root = Path(root)
    directory = root / temporary_name(plan.step, token)
    check_room(root, plan.nbytes)
    if (root / step_name(plan.step) / COMMIT).exists():
        raise ConfigError(f"{root / step_name(plan.step)}: step {plan.step} is committed already; nothing is ever overwritten")
    with disk_errors("beginning a checkpoint in", root):
        root.mkdir(parents=True, exist_ok=True)
        try:
            directory.mkdir()
        except FileExistsError:
            raise ConfigError(f"{directory}: another save has used this token; begin with a new one") from None
        for place in {JOURNALS, *(str(Path(file).parent) for file in _files(plan)), *plan.arrays}:
            (directory / place).mkdir(parents=True, exist_ok=True)
    crash_point("ckpt.begun")
    return directory


def _files(plan: WritePlan) -> list[str]:
    return [array.file(shard) for array in plan.arrays.values() for shard in range(array.shards)]


# -- fragments ---------------------------------------------------------------------------------------------------------


def write_fragments(
    directory: Path,
    plan: WritePlan,
    node: int,
    rows: Iterable[Fragment],
    read: Callable[[Fragment], memoryview],
    *,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> int:
    """The bytes of `rows` and then this node's journal are on the disk; returns how many bytes.

    `read(row)` gives the fragment's bytes, which must not change before this returns. Each byte is summed as it is written, and
    a fragment whose CRC32C is not the one in its row raises CorruptData: memory that rotted is never stored as sound.
    """
    runs: list[StoredRun] = []
    small: dict[str, bytes] = {}
    with disk_errors("writing a checkpoint to", directory, plan.nbytes), ThreadPoolExecutor(threads, "holdfast-write") as pool:
        pending: deque[_FragmentWrite] = deque()
        for row in rows:
            pending.append(_FragmentWrite.start(pool, directory, plan, row, as_bytes(read(row))))
            if len(pending) > 2 * threads:
                _finish(pending.popleft(), plan, runs, small, progress)
        while pending:
            _finish(pending.popleft(), plan, runs, small, progress)
        crash_point("ckpt.fragments_written")
        sync_files(directory / file for file in sorted({run.run.file for run in runs}))
        crash_point("ckpt.fragments_synced")
        replace_durably(journal_path(directory, node), Journal(plan.digest, runs, small).to_bytes())
    crash_point("ckpt.journal_written")
    return sum(run.nbytes for run in runs)


@dataclass(frozen=True)
class _RunWrite:
    run: Run
    view: memoryview
    segments: list[Future[Crcs]]

    def crcs(self) -> Crcs:
        return np.concatenate([segment.result() for segment in self.segments])


@dataclass(frozen=True)
class _FragmentWrite:
    """A fragment on its way to the disk."""

    row: Fragment
    view: memoryview
    runs: list[_RunWrite]

    @classmethod
    def start(
        cls, pool: ThreadPoolExecutor, directory: Path, plan: WritePlan, row: Fragment, view: memoryview
    ) -> _FragmentWrite:
        if len(view) != row.nbytes:
            raise StateError(f"{row.array}, rank {row.rank}: {len(view)} bytes were given, the fragment has {row.nbytes}")
        runs = plan.runs(row)
        writes = []
        for run in runs:
            data = run_bytes(view, row.box, run, row.dtype)
            parts = range(0, len(data), SEGMENT_NBYTES)
            write = partial(_write_segment, directory / run.file)
            segments = [pool.submit(write, run.byte_offset + part, data[part : part + SEGMENT_NBYTES]) for part in parts]
            writes.append(_RunWrite(run, data, segments))
        return cls(row, view, writes)

    def crc(self, crcs: Sequence[Crcs]) -> int:
        """CRC32C of the fragment's own bytes: from its blocks when it is one run, as it nearly always is."""
        if len(self.runs) == 1 and len(self.runs[0].view) == self.row.nbytes:
            return combine(crcs[0], self.row.nbytes)
        return crc32c(self.view)


def _write_segment(path: Path, offset: int, data: memoryview) -> Crcs:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)
    finally:
        os.close(fd)
    return block_crcs(data)


def _finish(
    write: _FragmentWrite,
    plan: WritePlan,
    runs: list[StoredRun],
    small: dict[str, bytes],
    progress: Callable[[int], None] | None,
) -> None:
    """Wait for a fragment's writes, check its CRC and note its runs."""
    row = write.row
    crcs = [run.crcs() for run in write.runs]
    if row.crc32c is not None and row.nbytes and (found := write.crc(crcs)) != row.crc32c:
        raise CorruptData(
            f"step {plan.step}, {row.array} of rank {row.rank} at {list(row.offset)}: crc32c is {found:08x}, "
            f"the fragment table says {row.crc32c:08x}; memory changed after it was captured; "
            "nothing was committed, the older checkpoints are whole"
        )
    for run, blocks in zip(write.runs, crcs, strict=True):
        runs.append(StoredRun(row.array, run.run, len(run.view), combine(blocks, len(run.view)), blocks, row.rank))
        if plan.arrays[row.array].spec.nbytes < SMALL_ARRAY_NBYTES:
            small[box_place(row.array, run.run.box)] = bytes(run.view)
    if progress is not None:
        progress(row.nbytes)


# -- commit ------------------------------------------------------------------------------------------------------------


def commit(
    root: str | Path,
    directory: Path,
    plan: WritePlan,
    *,
    nodes: Sequence[int],
    objects: Mapping[int, Mapping[str, str]],
) -> Path:
    """The save is a checkpoint: complete, on the disk, and found by `latest`; returns its directory.

    Waits for nobody: the journals of `nodes` have to be there. Raises MissingData when one is not, LayoutMismatch when together
    they leave a hole. `objects[rank][name]` is typed JSON. After an error the directory stays as it is, and stays invisible.
    """
    root = Path(root)
    started_s = time.monotonic()
    with disk_errors("committing a checkpoint in", directory):
        journals = [Journal.read(directory, node) for node in nodes]
        runs = _check_journals(plan, nodes, journals)
        crash_point("ckpt.coverage_checked")
        _write_indexes(directory, plan)
        crash_point("ckpt.indexes_written")
        _write_zarr_documents(directory, plan)
        crash_point("ckpt.metadata_written")
        small = _small_arrays(plan, runs, journals)
        (directory / FRAGMENTS).write_bytes(to_parquet(runs_table(runs)))
        (directory / OBJECTS).write_bytes(to_parquet(objects_table(objects, small)))
        (directory / LAYOUT).write_bytes(to_json({"world": len(objects), **plan.layout}))
        for node in nodes:
            journal_path(directory, node).unlink()
        (directory / JOURNALS).rmdir()
        crash_point("ckpt.tables_written")
        _sync_tree(directory)
        crash_point("ckpt.synced")
        record = CommitRecord(plan.step, _digests(directory), len(plan.arrays), len(runs), plan.nbytes, time.time())
        final = _publish(root, directory, plan, record)
    emit("ckpt.committed", step=plan.step, nbytes=plan.nbytes, seconds=time.monotonic() - started_s)
    logger.info("checkpoint of step %d committed: %d arrays, %d bytes, %s", plan.step, len(plan.arrays), plan.nbytes, final)
    return final


def _check_journals(plan: WritePlan, nodes: Sequence[int], journals: Sequence[Journal]) -> list[StoredRun]:
    """All runs, if the journals belong to this plan and tile every array exactly once."""
    for node, journal in zip(nodes, journals, strict=True):
        if journal.plan_digest != plan.digest:
            raise LayoutMismatch(
                f"step {plan.step}: node {node} wrote plan {journal.plan_digest}, the coordinator has {plan.digest}; "
                "all nodes have to plan from the same fragment table"
            )
    runs = [placed(run, plan.arrays.get(run.array), "journal") for journal in journals for run in journal.runs]
    boxes: dict[str, list[Box]] = {}
    for run in runs:
        boxes.setdefault(run.array, []).append(run.box)
    check_coverage(plan.specs.values(), boxes)
    return runs


def _write_indexes(directory: Path, plan: WritePlan) -> None:
    for array in plan.arrays.values():
        for shard in range(array.shards if not array.is_plain else 0):
            fd = os.open(directory / array.file(shard), os.O_WRONLY)
            try:
                os.pwrite(fd, shard_index(array, shard), array.data_nbytes(shard))
            finally:
                os.close(fd)


def _write_zarr_documents(directory: Path, plan: WritePlan) -> None:
    for name in groups(plan.arrays):
        write_file(directory / name / "zarr.json", to_json(group_document()))
    for name, array in plan.arrays.items():
        write_file(directory / name / "zarr.json", to_json(array_document(array)))
    attributes = {"holdfast": {"format": 1, "step": plan.step, "block_nbytes": BLOCK_NBYTES, **_origin(plan)}}
    write_file(directory / "zarr.json", to_json(root_document(plan.arrays.values(), attributes)))


def _origin(plan: WritePlan) -> dict[str, object]:
    return {key: plan.layout[key] for key in ("world", "mesh", "parent") if key in plan.layout}


def _small_arrays(plan: WritePlan, runs: Iterable[StoredRun], journals: Iterable[Journal]) -> dict[str, bytes]:
    """Every array below 64 KiB, put together from the journals."""
    pieces = {where: data for journal in journals for where, data in journal.small.items()}
    small = {spec.name: bytearray(spec.nbytes) for spec in plan.specs.values() if spec.nbytes < SMALL_ARRAY_NBYTES}
    for run in runs:
        if run.array in small:
            spec = plan.arrays[run.array].spec
            data, target = memoryview(pieces[box_place(run.array, run.box)]), memoryview(small[run.array])
            copy_box(data, run.run.held, target, Box.whole(spec.shape), run.box, spec.dtype)
    return {name: bytes(data) for name, data in small.items()}


def _sync_tree(directory: Path) -> None:
    paths = [Path(place) for place, _, _ in os.walk(directory)]
    documents = [Path(place) / name for place, _, names in os.walk(directory) for name in names]
    sync_files([*documents, *paths])


def _digests(directory: Path) -> dict[str, str]:
    return {name: sha256((directory / name).read_bytes()) for name in DOCUMENTS}


def _publish(root: Path, directory: Path, plan: WritePlan, record: CommitRecord) -> Path:
    final = root / step_name(plan.step)
    if final.exists():
        if (final / COMMIT).exists():
            raise ConfigError(f"{final}: step {plan.step} was committed by another save in the meantime; this one is dropped")
        # A save died between its rename and its COMMIT. Move it aside under a name that readers ignore.
        os.rename(final, root / temporary_name(plan.step, f"dead-{time.time_ns()}"))
    os.rename(directory, final)
    sync_path(root)
    crash_point("ckpt.renamed")
    replace_durably(final / COMMIT, record.to_bytes())
    crash_point("ckpt.committed")
    replace_durably(root / LATEST, f"{final.name}\n".encode())
    crash_point("ckpt.latest_written")
    return final
