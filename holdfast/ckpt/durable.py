"""Files that are on the disk when a function returns, and disk errors in words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.errors import StorageError

FSYNC_THREADS = 8
"""Concurrent fsyncs of many small files share the filesystem's journal commits."""


@contextmanager
def disk_errors(doing: str, path: Any, needs_nbytes: int = 0) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what was being done, where, and what to do about it.

    `path` is a Path or an object store's place.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"{doing} {error.filename or path}: {_advice(error, path, needs_nbytes)}") from error


def _advice(error: OSError, path: Any, needs_nbytes: int) -> str:
    if error.errno is None:  # what a client of an object store says
        return f"{error}; the older checkpoints are whole; check the address, the credentials and the endpoint"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(path)).free
        needs = f"the save needs {needs_nbytes} bytes, " if needs_nbytes else ""
        return f'no space left ({needs}{free} are free); remove old steps with "holdfast prune" or give another directory'
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{os.strerror(error.errno)}; this user has to be able to write there"
    return error.strerror or repr(error)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def check_room(root: Path, needs_nbytes: int) -> None:
    """Raise StorageError when the filesystem clearly has no room for a save, before any of it is written."""
    free = shutil.disk_usage(_existing(root)).free
    if free < needs_nbytes:
        raise StorageError(
            f"{root}: the save needs {needs_nbytes} bytes, {free} are free; remove old steps with "
            '"holdfast prune" or give another directory'
        )


def write_file(path: Path, data: bytes) -> None:
    """A new file; not yet durable (see `sync_files`)."""
    with open(path, "xb") as file:
        file.write(data)


def replace_durably(path: Path, data: bytes) -> None:
    """`path` holds `data`, whole and on the disk; a crash leaves what was there before."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """fsync a file or a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_files(paths: Iterable[Path]) -> None:
    """fsync every path; raises the first error, after all were tried."""
    with ThreadPoolExecutor(FSYNC_THREADS, "holdfast-fsync") as pool:
        for result in [pool.submit(sync_path, path) for path in paths]:
            result.result()
