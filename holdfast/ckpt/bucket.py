"""A step's files in an object store: every object whole and from one hand, and COMMIT the only commit point.

A store has no writing at an offset, no rename and no hard link, but an object appears whole or not at all. So each save has a
prefix of its own (nothing that is there is ever overwritten, nobody's late upload lands in another save), files are those that one
writer holds whole, and what cannot be cut that way is uploaded in pieces, which the coordinator joins before it commits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from holdfast.ckpt.steps import COMMIT, INTERNAL, LATEST, step_directories, step_of
from holdfast.ckpt.storage import REMOTE_THREADS, RemotePath
from holdfast.errors import ConfigError, StateError
from holdfast.events import crash_point

PIECES = f"{INTERNAL}/pieces"


class BucketFiles:
    """The objects of one save, under its own prefix."""

    shares_files = False

    def __init__(self, directory: RemotePath) -> None:
        self.directory = directory

    # -- data ----------------------------------------------------------------------------------------------------------

    def write_at(self, file: str, at: int, data: memoryview) -> None:
        """A piece of a file that others have parts of too: an object of its own until `commit`."""
        (self.directory / piece_name(file, at)).write_bytes(data)

    def put_file(self, file: str, parts: Iterable[memoryview | bytes]) -> None:
        """The object, in one upload; it is durable when this returns."""
        with self.directory.fs.open_output_stream(str(self.directory.path / file)) as upload:
            for part in parts:
                upload.write(part)

    def finish(self, file: str) -> None:
        """An object that has been uploaded is durable already."""

    def wait(self) -> None:
        """As `finish`."""

    def close(self) -> None:
        """Holds nothing."""

    def inherit(self, parent: object, file: str) -> None:
        raise StateError(f"{self.directory}: object stores have no links; a save there writes everything")

    def inherit_range(self, parent: object, file: str, at: int, nbytes: int) -> None:
        self.inherit(parent, file)

    # -- documents, and the end ----------------------------------------------------------------------------------------

    def put_durably(self, name: str, data: bytes) -> None:
        (self.directory / name).write_bytes(data)

    def put_documents(self, documents: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(REMOTE_THREADS, "holdfast-upload") as pool:
            for done in [pool.submit(self.put_durably, name, data) for name, data in documents.items()]:
                done.result()

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.directory / name).unlink()

    def seal(self, documents: Iterable[str]) -> None:
        """Every object is durable since its upload ended."""

    def publish(self, root: RemotePath, step: int, commit: bytes) -> RemotePath:
        """The step is a checkpoint."""
        check_uncommitted(root, step)
        (self.directory / COMMIT).write_bytes(commit)
        crash_point("ckpt.committed")
        (root / LATEST).write_bytes(f"{self.directory.name}\n".encode())
        crash_point("ckpt.latest_written")
        return self.directory


def piece_name(file: str, at: int) -> str:
    return f"{PIECES}/{file}@{at}"


def check_uncommitted(root: RemotePath, step: int) -> None:
    """Raise ConfigError when the step is a checkpoint already, under whatever token."""
    if not root.exists():
        return
    there = [path for path in step_directories(root) if step_of(path) == step and (path / COMMIT).exists()]
    if there:
        raise ConfigError(f"{there[0]}: step {step} is committed already; nothing is ever overwritten")
