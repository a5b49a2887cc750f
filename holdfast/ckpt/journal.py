"""What one node has written, in a file of its own: the coordinator commits from journals, not from messages.

A journal is made durable after the data it names, so a journal that can be read vouches for bytes that are on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from holdfast.arrays import Box
from holdfast.ckpt.manifest import RUNS_SCHEMA, StoredRun, runs_of, runs_table
from holdfast.ckpt.steps import JOURNALS
from holdfast.ckpt.storage import Place
from holdfast.errors import CorruptData, MissingData


@dataclass(frozen=True, slots=True)
class Journal:
    """The runs a node wrote, and the bytes of those that belong to small arrays, by (array, offset)."""

    plan_digest: str
    runs: Sequence[StoredRun]
    small: Mapping[str, bytes]

    def to_bytes(self) -> bytes:
        table = runs_table(self.runs)
        small = [self.small.get(place(array, offset)) for array, offset in _places(table)]
        table = table.append_column("small", pa.array(small, pa.binary()))
        table = table.replace_schema_metadata({"plan": self.plan_digest})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]

    @classmethod
    def read(cls, directory: Place, node: int) -> Journal:
        """The journal that `node` left in a save's directory; MissingData or CorruptData when it cannot be trusted."""
        path = directory / journal_name(node)
        try:
            with pa.ipc.open_file(pa.py_buffer(path.read_bytes())) as file:
                table = file.read_all()
            runs = runs_of(table.select(RUNS_SCHEMA.names))
            small = zip(_places(table), table.column("small").to_pylist(), strict=True)
            digest = (table.schema.metadata or {})[b"plan"].decode()
        except FileNotFoundError as error:
            raise MissingData(f"{path}: node {node} left no journal; its part of the checkpoint was not written") from error
        except (pa.ArrowException, KeyError, OSError) as error:
            raise CorruptData(f"{path}: not a journal ({error})") from error
        return cls(digest, runs, {place(*where): data for where, data in small if data is not None})


def journal_name(node: int) -> str:
    return f"{JOURNALS}/{node:05d}.arrow"


def place(array: str, offset: Sequence[int]) -> str:
    return f"{array}@{','.join(map(str, offset))}"


def box_place(array: str, box: Box) -> str:
    return place(array, box.offset)


def _places(table: pa.Table) -> list[tuple[str, list[int]]]:
    return list(zip(table.column("array").to_pylist(), table.column("offset").to_pylist(), strict=True))
