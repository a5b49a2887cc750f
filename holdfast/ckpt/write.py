"""The write path: a save is begun, every node writes its fragments, and the coordinator commits.

Data goes to places that the plan has computed, so writers share nothing but the directory. Every step is durable before the
next one says so: data before the journal that names it, journals before the documents built from them, documents before the
rename, and COMMIT last. A crash anywhere leaves the older checkpoints untouched and this one invisible. Between the steps are
named crash points, and the tests die at each.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from holdfast.arrays import SMALL_ARRAY_NBYTES, Box, Fragment, check_coverage
from holdfast.ckpt.blocks import BLOCK_NBYTES
from holdfast.ckpt.bucket import BucketFiles, check_uncommitted
from holdfast.ckpt.disk import DiskFiles
from holdfast.ckpt.durable import check_room, disk_errors
from holdfast.ckpt.fragments import FragmentWrite, NodeWriter
from holdfast.ckpt.joining import complete_files
from holdfast.ckpt.journal import Journal, box_place, journal_name
from holdfast.ckpt.manifest import DOCUMENTS, CommitRecord, StoredRun, objects_table, placed, runs_table, sha256, to_parquet
from holdfast.ckpt.plan import WritePlan
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.steps import COMMIT, FRAGMENTS, JOURNALS, LAYOUT, OBJECTS, bucket_name, step_name, temporary_name
from holdfast.ckpt.storage import REMOTE_THREADS, Place, RemotePath, place
from holdfast.ckpt.views import copy_box
from holdfast.ckpt.zarrdoc import array_document, group_document, groups, root_document, to_json
from holdfast.errors import ConfigError, HoldfastError, LayoutMismatch
from holdfast.events import crash_point, emit

logger = logging.getLogger(__name__)

# -- begin -------------------------------------------------------------------------------------------------------------


def begin(root: str | Place, plan: WritePlan, token: str) -> Place:
    """A fresh place for this save, with a directory for every array; returns it.

    `root` is a directory or the URI of an object store's prefix. `token` is the save's own: a directory that a dead save left
    behind is never written to again. Raises StorageError when the disk has no room or refuses, and ConfigError when the plan's
    files cannot be written to such a place.
    """
    root = place(root)
    if isinstance(root, RemotePath):
        directory: Place = _begin_in_store(root, plan, token)
    else:
        directory = _begin_on_disk(root, plan, token)
    crash_point("ckpt.begun")
    return directory


def _begin_on_disk(root: Path, plan: WritePlan, token: str) -> Path:
    directory = root / temporary_name(plan.step, token)
    if not plan.inherits:  # what an incremental save will need is not known yet
        check_room(root, plan.nbytes)
    if (root / step_name(plan.step) / COMMIT).exists():
        raise ConfigError(f"{root / step_name(plan.step)}: step {plan.step} is committed already; nothing is ever overwritten")
    with disk_errors("beginning a checkpoint in", root):
        root.mkdir(parents=True, exist_ok=True)
        try:
            directory.mkdir()
        except FileExistsError:
            raise ConfigError(f"{directory}: another save has used this token; begin with a new one") from None
        for where in {JOURNALS, *(str(Path(file).parent) for file in _files(plan)), *plan.arrays}:
            (directory / where).mkdir(parents=True, exist_ok=True)
    return directory


def _begin_in_store(root: RemotePath, plan: WritePlan, token: str) -> RemotePath:
    if not plan.whole_files:
        raise ConfigError(f"{root}: an object store takes only whole files; plan with plan_write(…, whole_files=True)")
    with disk_errors("beginning a checkpoint in", root):
        check_uncommitted(root, plan.step)
        directory = root / bucket_name(plan.step, token)
        if directory.exists():
            raise ConfigError(f"{directory}: another save has used this token; begin with a new one")
    return directory


def _files(plan: WritePlan) -> list[str]:
    return [array.file(shard) for array in plan.arrays.values() for shard in range(array.shards)]


@contextmanager
def _open_files(directory: Place, direct: bool = False) -> Iterator[DiskFiles | BucketFiles]:
    files = BucketFiles(directory) if isinstance(directory, RemotePath) else DiskFiles(directory, direct=direct)
    try:
        yield files
    finally:
        files.close()


# -- fragments ---------------------------------------------------------------------------------------------------------


def write_fragments(
    directory: str | Place,
    plan: WritePlan,
    node: int,
    rows: Iterable[Fragment],
    read: Callable[[Fragment], memoryview],
    *,
    threads: int = 2,
    direct: bool = False,
    parent: Checkpoint | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """The bytes of `rows` and then this node's journal are on the disk; returns how many bytes of data were written.

    `read(row)` gives the fragment's bytes, which must not change before this returns. Each byte is summed as it is written, and
    a fragment whose CRC32C is not the one in its row raises CorruptData: memory that rotted is never stored as sound.

    With `direct` data goes past the page cache (O_DIRECT), where the filesystem lets it. With `parent`, an earlier step of the
    same run, bytes that it has already are not written again; every node and `commit` have to be given the same one.
    """
    directory, rows = place(directory), list(rows)
    threads = max(threads, REMOTE_THREADS) if isinstance(directory, RemotePath) else threads
    pending: deque[FragmentWrite] = deque()
    with (
        disk_errors("writing a checkpoint to", directory, plan.nbytes),
        _open_files(directory, direct) as files,
        ThreadPoolExecutor(threads, "holdfast-write") as pool,
    ):
        writer = NodeWriter(plan, files, pool, rows, parent)

        def finish() -> None:
            write = pending.popleft()
            writer.finish(write)
            if progress is not None:
                progress(write.row.nbytes)

        for row in rows:
            pending.append(writer.start(row, read(row)))
            if len(pending) > 2 * threads:
                finish()
        while pending:
            finish()
        crash_point("ckpt.fragments_written")
        files.wait()
        crash_point("ckpt.fragments_synced")
        files.put_durably(journal_name(node), Journal(plan.digest, writer.runs, writer.small).to_bytes())
    crash_point("ckpt.journal_written")
    return sum(run.nbytes for run in writer.runs if run.inherited_from is None)


# -- commit ------------------------------------------------------------------------------------------------------------


def commit(
    root: str | Place,
    directory: str | Place,
    plan: WritePlan,
    *,
    nodes: Sequence[int],
    objects: Mapping[int, Mapping[str, str]],
    parent: Checkpoint | None = None,
) -> Place:
    """The save is a checkpoint: complete, on the disk, and found by `latest`; returns its directory.

    Waits for nobody: the journals of `nodes` have to be there. Raises MissingData when one is not, LayoutMismatch when together
    they leave a hole. `objects[rank][name]` is typed JSON; `parent` is the one that the nodes were given. After an error the
    directory stays as it is, and stays invisible.
    """
    root, directory = place(root), place(directory)
    started_s = time.monotonic()
    with disk_errors("committing a checkpoint in", directory), _open_files(directory) as files:
        journals = [Journal.read(directory, node) for node in nodes]
        runs = _check_journals(plan, nodes, journals)
        crash_point("ckpt.coverage_checked")
        small = _small_arrays(plan, runs, journals)
        complete_files(files, plan, runs, small, parent)
        crash_point("ckpt.files_completed")
        documents = _zarr_documents(plan)
        files.put_documents(documents)
        crash_point("ckpt.metadata_written")
        tables = _tables(plan, runs, objects, small)
        files.put_documents(tables)
        files.remove([journal_name(node) for node in nodes])
        crash_point("ckpt.tables_written")
        files.seal([*documents, *tables])
        crash_point("ckpt.synced")
        digests = {name: sha256(data) for name, data in {**documents, **tables}.items() if name in DOCUMENTS}
        record = CommitRecord(plan.step, digests, len(plan.arrays), len(runs), plan.nbytes, time.time())
        final = files.publish(root, plan.step, record.to_bytes())  # type: ignore[arg-type]  # both are of one kind
    seconds = time.monotonic() - started_s
    emit("ckpt.committed", step=plan.step, nbytes=plan.nbytes, inherited_nbytes=_inherited_nbytes(runs), seconds=seconds)
    logger.info("checkpoint of step %d committed: %d arrays, %d bytes, %s", plan.step, len(plan.arrays), plan.nbytes, final)
    return final


def discard(directory: str | Place) -> None:
    """What a failed save left is removed, as far as that is possible; a checkpoint is never touched."""
    directory = place(directory)
    if isinstance(directory, Path):
        shutil.rmtree(directory, ignore_errors=True)  # a save that was committed has been renamed
        return
    with suppress(OSError, HoldfastError):
        if not (directory / COMMIT).exists():
            directory.remove_tree()


def _inherited_nbytes(runs: Iterable[StoredRun]) -> int:
    return sum(run.nbytes for run in runs if run.inherited_from is not None)


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


def _zarr_documents(plan: WritePlan) -> dict[str, bytes]:
    documents = {f"{name}/zarr.json": to_json(group_document()) for name in groups(plan.arrays)}
    documents |= {f"{name}/zarr.json": to_json(array_document(array)) for name, array in plan.arrays.items()}
    attributes = {"holdfast": {"format": 1, "step": plan.step, "block_nbytes": BLOCK_NBYTES, **_origin(plan)}}
    return documents | {"zarr.json": to_json(root_document(plan.arrays.values(), attributes))}


def _tables(
    plan: WritePlan, runs: Sequence[StoredRun], objects: Mapping[int, Mapping[str, str]], small: Mapping[str, bytes]
) -> dict[str, bytes]:
    return {
        FRAGMENTS: to_parquet(runs_table(runs)),
        OBJECTS: to_parquet(objects_table(objects, small)),
        LAYOUT: to_json({"world": len(objects), **plan.layout}),
    }


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
