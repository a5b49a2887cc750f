"""Where checkpoints live: a directory, or a prefix of an object store, behind pathlib's face.

`place` turns what a user writes into a `Place`. What readers do with one is the same for both; how a save is written differs
(`disk.py`, `bucket.py`), because object stores know neither writing at an offset nor renaming.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from holdfast.ckpt.durable import disk_errors
from holdfast.errors import ConfigError, MissingData, UnsupportedFormat

REMOTE_THREADS = 8
"""A request to an object store waits more than it works."""


def is_remote(where: Any) -> bool:
    """Whether this names an object store: a URI that is not `file://`."""
    return isinstance(where, RemotePath) or ("://" in str(where) and not str(where).startswith("file://"))


def place(where: str | os.PathLike[str] | RemotePath) -> Place:
    """The place that a path or a URI names; nothing is looked up yet.

    URIs are those of `pyarrow.fs` (`s3://bucket/run`, `gs://…`, `hdfs://…`); credentials and endpoints come from the environment
    (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …) or, other than secrets, from the URI's query. Raises ConfigError.
    """
    if isinstance(where, RemotePath):
        return where
    text = os.fspath(where)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return RemotePath.of(text) if is_remote(text) else Path(text)


def local(where: Place, what: str) -> Path:
    """The directory that `where` is; ConfigError when it is none, for `what` works on directories only."""
    if isinstance(where, RemotePath):
        raise ConfigError(f"{where}: {what} works on directories; copy the step to one first")
    return where


@dataclass(frozen=True, slots=True)
class _Stat:
    st_size: int


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A key or a prefix of an object store, with the part of `pathlib.Path` that checkpoints need. Prints as its URI.

    `path` is what the filesystem calls it, `scheme` and `query` are kept to print it.
    """

    path: PurePosixPath
    scheme: str
    query: str
    fs: Any = field(repr=False, compare=False)
    known: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, uri: str) -> RemotePath:
        parts = urlsplit(uri)
        if "@" in parts.netloc:
            raise ConfigError(f"{parts.scheme}://…: keep credentials out of addresses, which are logged; set the environment")
        fs = _filesystem(f"{parts.scheme}://{parts.netloc}", parts.query)
        root = f"{parts.netloc}{parts.path}" if parts.scheme in ("s3", "gs", "gcs", "abfs", "abfss") else parts.path
        return cls(PurePosixPath(root.rstrip("/") or "/"), parts.scheme, parts.query, fs)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}{'?' + self.query if self.query else ''}"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.path / name, self.scheme, self.query, self.fs)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.path.parent, self.scheme, self.query, self.fs)

    def exists(self) -> bool:
        return bool(self._info().type != pafs.FileType.NotFound)

    def is_dir(self) -> bool:
        return bool(self._info().type == pafs.FileType.Directory)

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[RemotePath]:
        with disk_errors("listing", self):
            infos = self.fs.get_file_info(pafs.FileSelector(str(self.path)))
        for info in infos:
            yield RemotePath(PurePosixPath(info.path), self.scheme, self.query, self.fs, info)

    def stat(self) -> _Stat:
        info = self._info()
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(str(self))
        return _Stat(info.size)

    def read_bytes(self) -> bytes:
        with self.fs.open_input_file(str(self.path)) as file:
            return file.read()  # type: ignore[no-any-return]

    def write_bytes(self, data: bytes | memoryview) -> None:
        """The object is there, whole, when this returns; stores replace objects in one step."""
        with self.fs.open_output_stream(str(self.path)) as file:
            file.write(data)

    def unlink(self) -> None:
        self.fs.delete_file(str(self.path))

    def remove_tree(self) -> None:
        self.fs.delete_dir(str(self.path))

    def files(self) -> Iterator[tuple[str, int]]:
        """Every object below, as its name from here and its size."""
        with disk_errors("listing", self):
            infos = self.fs.get_file_info(pafs.FileSelector(str(self.path), recursive=True, allow_not_found=True))
        for info in infos:
            if info.type == pafs.FileType.File:
                yield str(PurePosixPath(info.path).relative_to(self.path)), info.size

    def _info(self) -> Any:
        if self.known is not None:
            return self.known
        with disk_errors("looking at", self):
            return self.fs.get_file_info(str(self.path))


Place = Path | RemotePath


@lru_cache(maxsize=32)
def _filesystem(base: str, query: str) -> Any:
    """One client for each store and process: making one may cost a request."""
    try:
        found, _ = pafs.FileSystem.from_uri(f"{base}{'?' + query if query else ''}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{base}: pyarrow has no filesystem for this ({error})") from error
    return found


# -- reading -----------------------------------------------------------------------------------------------------------


class OpenFile(Protocol):
    """A data file that is open for reading, by any number of threads."""

    def read_into(self, buffers: Sequence[memoryview], at: int) -> int:
        """Fill the buffers, one after the other, from byte `at` on; returns how many bytes there were, 0 at the end."""
        ...

    def size(self) -> int: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LocalFile:
    fd: int

    def read_into(self, buffers: Sequence[memoryview], at: int) -> int:
        return os.preadv(self.fd, buffers, at)

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    file: Any

    def read_into(self, buffers: Sequence[memoryview], at: int) -> int:
        data = memoryview(self.file.read_at(sum(map(len, buffers)), at))
        done = 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def size(self) -> int:
        return int(self.file.size())

    def close(self) -> None:
        self.file.close()


def open_data(directory: Place, name: str) -> OpenFile:
    """A file of a checkpoint, opened without following a link anywhere below `directory`.

    Raises FileNotFoundError, UnsupportedFormat for a link, and MissingData with the reason for everything else.
    """
    path = directory / name
    try:
        if isinstance(directory, RemotePath):
            return RemoteFile(directory.fs.open_input_file(str(directory.path / name)))
        return LocalFile(_open_unlinked(directory, name))
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise UnsupportedFormat(f"{path}: is a symbolic link; a checkpoint holds only files of its own") from error
        raise MissingData(f"{path} cannot be read ({error.strerror or error})") from error


def _open_unlinked(directory: Path, name: str) -> int:
    path = directory / name
    if os.path.realpath(path.parent) != os.path.join(_real(str(directory)), *Path(name).parts[:-1]):
        raise UnsupportedFormat(f"{path}: a directory on the way is a symbolic link; a checkpoint holds only files of its own")
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _real(directory: str) -> str:
    return os.path.realpath(directory)
