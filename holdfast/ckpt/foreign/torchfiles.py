"""torch files, read without executing anything that they bring along, and without reading their tensors before they are asked for.

`torch.load(weights_only=True)` refuses every class that it does not know. Some of them are only containers that a framework leaves
in its checkpoints; a file that is known to hold such is read with an inert class in the place of each, which keeps what it is given
and does nothing. No code of the file, and none of the framework, runs.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from holdfast.ckpt.foreign.source import Source, SourceArray, tensor_source
from holdfast.errors import MissingData, NotACheckpoint, UnsupportedFormat


class Inert:
    """Stands where an object of a class stood that was not loaded: `args` it was made with, and the `state` it was given."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Inert:
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


def value_of(value: Any) -> Any:
    """The plain value in an inert object: an enumeration's member is made from one."""
    return value.args[0] if isinstance(value, Inert) and len(value.args) == 1 else value


def field_of(value: Any, name: str) -> Any:
    """An attribute of an inert object (a namespace, a dataclass); None where it has none of this name."""
    state = value.state if isinstance(value, Inert) else None
    return state.get(name) if isinstance(state, dict) else None


def load_torch(path: Path, inert: Sequence[str] = ()) -> Any:
    """What `torch.save` was given, tensors mapped and not read.

    Classes whose full name starts with one of `inert` are replaced by inert ones. Raises UnsupportedFormat naming the classes
    that are left, MissingData for a file that is not there.
    """
    import torch

    if not path.exists():
        raise MissingData(f"{path}: is missing")
    if not zipfile.is_zipfile(path):
        raise UnsupportedFormat(
            f"{path}: is no torch file of today's kind, or is truncated; it cannot be loaded without executing code. "
            "If it is a file of torch before 1.6, load and save it once with the torch that wrote it"
        )
    stand_ins, refused = _stand_ins(path, inert)
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedFormat(
            f"{path}: cannot be loaded without executing code that it brings along{_why(refused, error)}"
        ) from error


def _stand_ins(path: Path, inert: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Inert classes for the names that are allowed to be, and the names that are not."""
    import torch

    try:
        asked = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        raise UnsupportedFormat(f"{path}: not a file that torch.save wrote ({_first_line(error)})") from error
    allowed = [name for name in asked if any(name == known or name.startswith(f"{known}.") for known in inert)]
    return [(type("Inert", (Inert,), {}), name) for name in allowed], [name for name in asked if name not in allowed]


def _why(refused: Sequence[str], error: Exception) -> str:
    if not refused:
        return f" ({_first_line(error)})"
    return (
        f": it holds objects of {', '.join(refused)}. Save it again without them, or, if they are not needed, name them as inert "
        f"(--inert {refused[0]}): they are then passed over, and nothing of them is executed"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# -- a state dict in one file ------------------------------------------------------------------------------------------


def open_torch(path: Path, inert: Sequence[str] = ()) -> Source:
    """Any nest of dictionaries: tensors are arrays, the rest are objects."""
    import torch

    arrays: dict[str, SourceArray] = {}
    objects: dict[str, Any] = {}
    left_out: list[str] = []
    for where, value in leaves(load_torch(path, inert)):
        name = array_name_of(where)
        if isinstance(value, torch.Tensor):
            arrays[name] = tensor_source(name, value)
        elif holds_inert(value):
            left_out.append(f"{name} holds objects that were not loaded")
        else:
            objects[name] = value
    if not arrays:
        raise NotACheckpoint(f"{path}: holds no tensors")
    return Source("torch", arrays, objects, left_out=tuple(left_out))


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Tensors and objects by where they stand; a dictionary without a tensor in it is one object."""
    if isinstance(value, dict) and (not path or _holds_tensor(value)):
        for key, item in value.items():
            yield from leaves(item, (*path, str(key)))
    else:
        yield path or ("value",), value


def array_name_of(path: Iterable[Any]) -> str:
    from holdfast.ckpt.dcp import array_name

    return array_name([str(part).replace("/", ".") for part in path])


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return hasattr(value, "untyped_storage")


def holds_inert(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(holds_inert, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set):
        return any(map(holds_inert, value))
    return isinstance(value, Inert)
