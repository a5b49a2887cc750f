"""Asynchronous saves of live objects: what can be prepared is kept from one save to the next, so that a call is short.

What is kept about a module or an optimizer is used again only while it holds the very same tensors, at the same addresses; state
that cannot be known that cheaply is asked for each time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.optim import Optimizer

from holdfast.ckpt.dcp import UniversalWriter, save_state_dict
from holdfast.ckpt.lazy import local_of
from holdfast.ckpt.live import module_of, state_dict_of
from holdfast.events import emit

logger = logging.getLogger(__name__)

Signature = tuple[Any, ...]

_savers: dict[str, BackgroundSaver] = {}


def saver_of(path: str | os.PathLike[str], writer: UniversalWriter | None) -> BackgroundSaver:
    """The saver that has its threads and buffers already, where this run was saved before."""
    if writer is not None:
        writer.set_path(path)
        writer.background = writer.background or BackgroundSaver(writer)
        return writer.background  # type: ignore[no-any-return]
    key = str(path)
    if key not in _savers:
        _savers[key] = BackgroundSaver(UniversalWriter(path))
    return _savers[key]


class BackgroundSaver:
    """Saves one run in the background, one save at a time."""

    def __init__(self, writer: UniversalWriter) -> None:
        self._writer = writer
        self._known = KnownState()
        self._pool = ThreadPoolExecutor(1, "holdfast-save")
        self._upload: Future[Any] | None = None
        self._group: Any = None

    def save(self, state: Mapping[str, Any], step: int | None) -> AsyncSaveResponse:
        self._wait()
        self._writer.set_step(step)
        staged = self._writer.stage(self._known.state_dict(state))
        if self._group is None and dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        self._upload = self._pool.submit(self._save, staged)
        return AsyncSaveResponse(staging_completion=staged, upload_completion=self._upload)  # type: ignore[arg-type]

    def close(self) -> None:
        self._pool.shutdown()

    def _wait(self) -> None:
        """The buffers are free. A save that is still running is slower than the interval between saves."""
        if self._upload is None or self._upload.done():
            return
        started_s = time.perf_counter()
        with suppress(Exception):  # its caller has it, and it has been logged
            self._upload.result()
        seconds = time.perf_counter() - started_s
        logger.warning("waited %.1f s for the save before this one; save less often, or to a faster place", seconds)
        emit("ckpt.waited", seconds=seconds)

    def _save(self, staged: Future[dict[str, Any]]) -> None:
        try:
            save_state_dict(staged.result(), self._writer, self._group, alone=self._group is None)
        except Exception as error:
            emit("ckpt.failed", step=self._writer.step, error=repr(error))
            logger.error("the asynchronous save to %s failed; training goes on: %s", self._writer.root, error)
            raise


class KnownState:
    """State dicts of live objects, remembered as long as the objects hold the same tensors."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Signature, dict[str, Any]]] = {}

    def state_dict(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """As `live.state_dict_of`."""
        if not state:
            return state_dict_of(state)
        return {name: self._part(name, item, state) for name, item in state.items()}

    def _part(self, name: str, item: Any, state: Mapping[str, Any]) -> Any:
        signature = _signature(item)
        if signature is None:
            return self._fresh(name, item, state)
        known = self._parts.get(name)
        if known is None or known[0] != signature:
            part = self._fresh(name, item, state)
            self._parts.pop(name, None)
            if _only_holds(part, item):
                self._parts[name] = signature, part
            return part
        return known[1] if isinstance(item, nn.Module) else {**known[1], "param_groups": _groups(item, known[1])}

    def _fresh(self, name: str, item: Any, state: Mapping[str, Any]) -> Any:
        with_module = {"": module_of(name, item, state)} if isinstance(item, Optimizer) and item.state else {}
        return state_dict_of({name: item, **with_module})[name]


def _signature(item: Any) -> Signature | None:
    """Equal to an earlier one only if the object holds the same tensors in the same memory; None where nobody can know."""
    if isinstance(item, nn.Module):
        return (id(item), *map(_place, chain(item.parameters(), item.buffers())))
    if isinstance(item, Optimizer) and item.state:
        states = item.state.values()
        if not all(isinstance(value, torch.Tensor) for held in states for value in held.values()):
            return None
        groups = tuple((tuple(group), tuple(map(id, group["params"]))) for group in item.param_groups)
        held = tuple((tuple(one), *map(_place, one.values())) for one in states)
        return (id(item), groups, tuple(map(id, item.state)), held)
    return None


def _place(tensor: torch.Tensor) -> Signature:
    local = local_of(tensor)
    return (id(tensor), local.data_ptr(), tensor.shape, local.stride())


def _only_holds(part: dict[str, Any], item: Any) -> bool:
    """Whether a state dict's tensors are the object's own memory, and nothing else in it can change."""
    if isinstance(item, nn.Module):
        own = {local_of(tensor).data_ptr() for tensor in chain(item.parameters(), item.buffers())}
        values: Iterable[Any] = part.values()
    else:
        own = {local_of(value).data_ptr() for held in item.state.values() for value in held.values()}
        same_groups = len(part["param_groups"]) == len(item.param_groups)
        values = [*(value for held in part["state"].values() for value in held.values()), *([] if same_groups else [None])]
    return all(isinstance(value, torch.Tensor) and local_of(value).data_ptr() in own for value in values)


def _groups(optimizer: Optimizer, known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups as they are now (a scheduler changes them), under the names found earlier."""
    return [
        {**group, "params": old["params"]} for group, old in zip(optimizer.param_groups, known["param_groups"], strict=True)
    ]
