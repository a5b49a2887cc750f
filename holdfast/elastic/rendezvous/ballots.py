"""The messages of registers as frames: a JSON tree, and behind it the bytes of all values in the order in which they are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from holdfast.elastic.rendezvous import register
from holdfast.errors import ClusterError

_NAMED: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        register.Prepare,
        register.Accept,
        register.Look,
        register.List,
        register.Claim,
        register.Promise,
        register.Accepted,
        register.Refused,
        register.Seen,
        register.Listed,
        register.Forgetful,
        register.Stranger,
        register.Founded,
        register.Memory,
        register.Outlived,
        register.Answer,
        register.Register,
        register.Set,
        register.CompareSet,
        register.Add,
        register.Append,
        register.Delete,
        register.Get,
        register.Op,
    )
}


def pack(messages: tuple[Any, ...]) -> tuple[Any, bytes]:
    blobs: list[bytes] = []
    return _tree(messages, blobs), b"".join(blobs)


def unpack(tree: Any, payload: memoryview) -> Any:
    """Raises ClusterError for what `pack` does not write."""
    try:
        found, rest = _thing(tree, payload)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ClusterError(f"a replica sent a message that is not understood ({error!r}); are two releases mixed?") from error
    if len(rest):
        raise ClusterError(f"a replica sent {len(rest)} bytes that belong to nothing")
    return found


def _tree(thing: Any, blobs: list[bytes]) -> Any:
    if isinstance(thing, bytes):
        blobs.append(thing)
        return {"bytes": len(thing)}
    if isinstance(thing, register.Value):
        return {"data": _tree(thing.data, blobs), "applied": thing.applied}
    if isinstance(thing, tuple):
        return [_tree(each, blobs) for each in thing]
    if isinstance(thing, Mapping):
        return {"map": {key: _tree(each, blobs) for key, each in thing.items()}}
    if is_dataclass(thing):
        return {"is": type(thing).__name__, "with": [_tree(getattr(thing, part.name), blobs) for part in fields(thing)]}
    return thing


def _thing(tree: Any, rest: memoryview) -> tuple[Any, memoryview]:
    """What the tree stands for, and the bytes that were not needed."""
    if isinstance(tree, list):
        found = []
        for each in tree:
            one, rest = _thing(each, rest)
            found.append(one)
        return tuple(found), rest
    if not isinstance(tree, dict):
        return tree, rest
    if "bytes" in tree:
        nbytes = int(tree["bytes"])
        if not 0 <= nbytes <= len(rest):
            raise ValueError(f"{nbytes} bytes are announced, {len(rest)} are left")
        return bytes(rest[:nbytes]), rest[nbytes:]
    if "applied" in tree:
        data, rest = _thing(tree["data"], rest)
        return register.Value(data, {session: tuple(last) for session, last in tree["applied"].items()}), rest
    if "map" in tree:
        entries = {}
        for key, each in tree["map"].items():
            entries[key], rest = _thing(each, rest)
        return entries, rest
    parts, rest = _thing(tree["with"], rest)
    return _NAMED[tree["is"]](*parts), rest
