"""What no single writer could finish: files that an earlier step has, files of many hands in an object store, small arrays there.

The coordinator does this between the journals and the documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from holdfast.ckpt.blocks import block_crcs
from holdfast.ckpt.bucket import PIECES, BucketFiles, piece_name
from holdfast.ckpt.disk import DiskFiles
from holdfast.ckpt.manifest import StoredRun
from holdfast.ckpt.plan import WritePlan, is_large
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.strips import ArrayLayout
from holdfast.ckpt.zarrdoc import shard_index
from holdfast.errors import CorruptData, StateError


def complete_files(
    files: DiskFiles | BucketFiles,
    plan: WritePlan,
    runs: Sequence[StoredRun],
    small: Mapping[str, bytes],
    parent: Checkpoint | None,
) -> None:
    """Every file of the plan is there, whole and durable."""
    by_file: dict[str, list[StoredRun]] = {}
    for run in runs:
        by_file.setdefault(run.run.file, []).append(run)
    if isinstance(files, BucketFiles):
        _put_small(files, plan, small)
        _join_pieces(files, plan, by_file)
    else:
        _inherit(files, plan, by_file, parent)
    files.wait()


# -- on a filesystem ---------------------------------------------------------------------------------------------------


def _inherit(files: DiskFiles, plan: WritePlan, by_file: Mapping[str, list[StoredRun]], parent: Checkpoint | None) -> None:
    """Files without a new byte become links; elsewhere the unchanged stretches are taken from the parent's file."""
    for file, runs in by_file.items():
        old = [run for run in runs if run.inherited_from is not None]
        if not old:
            continue
        if parent is None or not isinstance(parent.path, Path):
            raise StateError(f"{files.directory}: nodes inherited {file} from an earlier step that commit was not given")
        if len(old) == len(runs):
            files.inherit(parent.path, file)
            continue
        for run in old:
            files.inherit_range(parent.path, file, run.run.byte_offset, run.nbytes)
        for at, data in _index(plan.arrays[old[0].array], old[0]):
            files.write_at(file, at, memoryview(data))
        files.finish(file)


def _index(layout: ArrayLayout, run: StoredRun) -> Iterator[tuple[int, bytes]]:
    """The shard index of a run's file, and where it stands. (The run that begins the file may not have been written.)"""
    if not layout.is_plain:
        shard = layout.shard_of(run.box)
        yield layout.data_nbytes(shard), shard_index(layout, shard)


# -- in an object store ------------------------------------------------------------------------------------------------


def _put_small(files: BucketFiles, plan: WritePlan, small: Mapping[str, bytes]) -> None:
    """Small arrays came with the journals: one object each, however many ranks held them."""
    files.put_documents({plan.arrays[name].file(0): data for name, data in small.items() if data})


def _join_pieces(files: BucketFiles, plan: WritePlan, by_file: Mapping[str, list[StoredRun]]) -> None:
    """Arrays whose fragments form no grid were uploaded in pieces: stream them into their files, checked on the way."""
    joined = False
    for file, runs in by_file.items():
        layout = plan.arrays[runs[0].array]
        if is_large(layout.spec) and not layout.is_packed and not _is_one(layout, runs):
            files.put_file(file, _joined(files, layout, runs))
            joined = True
    if joined:
        (files.directory / PIECES).remove_tree()


def _is_one(layout: ArrayLayout, runs: Sequence[StoredRun]) -> bool:
    """Whether one run is the whole file."""
    return len(runs) == 1 and runs[0].box == layout.shard_box(layout.shard_of(runs[0].box))


def _joined(files: BucketFiles, layout: ArrayLayout, runs: Iterable[StoredRun]) -> Iterator[bytes]:
    at = 0
    for run in sorted(runs, key=lambda run: run.run.byte_offset):
        piece = files.directory / piece_name(run.run.file, run.run.byte_offset)
        data = piece.read_bytes()
        if len(data) != run.nbytes or (block_crcs(memoryview(data)) != run.blocks).any():
            raise CorruptData(f"{piece}: is not what was uploaded; nothing was committed, the older checkpoints are whole")
        yield bytes(run.run.byte_offset - at)
        yield data
        at = run.run.byte_offset + run.nbytes
    for where, index in _index(layout, run):
        yield bytes(where - at)
        yield index
