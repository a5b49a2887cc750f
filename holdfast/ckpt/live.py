"""Live objects to a checkpoint and back, without keepers: `save`, `save_async`, `load`.

The state is the mapping that `holdfast.protect` takes: modules, optimizers, and anything with `state_dict` and `load_state_dict`.
Works with one process, and with many in a process group (every rank calls with its own part). torch is loaded by the calls.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.ckpt.parity import add_parity
from holdfast.ckpt.parityfile import Parity
from holdfast.errors import LayoutMismatch, StateError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

    from holdfast.ckpt.dcp import UniversalWriter


def save(
    state: Mapping[str, Any], path: str | os.PathLike[str], *, step: int | None = None, parity: Parity | None = None
) -> Path:
    """The state is a committed step of the run at `path`; returns the step's directory.

    With `parity` as much of the step as it says may rot and can be repaired; it is written after the step is committed.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    from holdfast.ckpt.dcp import UniversalWriter

    writer = UniversalWriter(path, step=step)
    dcp_save(state_dict_of(state), storage_writer=writer, no_dist=_is_alone())
    if parity is not None and writer.checkpoint is not None:  # on the coordinator
        add_parity(writer.checkpoint, parity)
    return writer.checkpoint or writer.root


def save_async(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    writer: UniversalWriter | None = None,
) -> AsyncSaveResponse:
    """Begin to save and return; the next optimizer step waits by itself for what is not copied yet.

    `upload_completion.result()` of the answer is there when the step is committed, and raises what went wrong. Give the same
    `writer` to every call to have its host buffers used again.
    """
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

    from holdfast.ckpt.dcp import UniversalWriter

    writer = writer or UniversalWriter(path, step=step)
    response = async_save(state_dict_of(state), storage_writer=writer, no_dist=_is_alone())
    assert isinstance(response, AsyncSaveResponse)
    return response


def load(state: Mapping[str, Any], path: str | os.PathLike[str], *, step: int | None = None) -> int:
    """The live objects hold what the checkpoint holds, whatever layout it was saved from; returns its step."""
    from torch import nn
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
    from torch.optim import Optimizer

    from holdfast.ckpt.dcp import UniversalReader

    reader = UniversalReader(path, step=step)
    wanted = state_dict_of(state, make_state=True)
    missing = sorted(set(wanted) - {name.split("/")[0] for name in _stored(reader)})
    if missing:
        raise LayoutMismatch(f"{reader.checkpoint.path}: holds nothing for {', '.join(missing)}")
    dcp_load(wanted, storage_reader=reader, no_dist=_is_alone())
    for name, item in state.items():
        if isinstance(item, Optimizer):
            set_optimizer_state_dict(_module_of(name, item, state), item, optim_state_dict=wanted[name])
        elif hasattr(item, "load_state_dict") and not isinstance(item, nn.Module):
            item.load_state_dict(wanted[name])  # a module's own tensors have been filled in place
    return reader.checkpoint.step


def _stored(reader: Any) -> set[str]:
    objects = (name for texts in reader.checkpoint.objects.values() for name in texts)
    return {*reader.checkpoint.specs, *objects}


def state_dict_of(state: Mapping[str, Any], *, make_state: bool = False) -> dict[str, Any]:
    """One nested state dict, optimizer state under its parameters' names; tensors are the live ones.

    With `make_state`, optimizers that have not stepped yet get the state that a checkpoint can be loaded into.
    """
    from torch import nn
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.optim import Optimizer

    if not state:
        raise StateError("there is no state to save; pass a mapping such as {'model': model, 'optim': optimizer}")
    found: dict[str, Any] = {}
    for name, item in state.items():
        if isinstance(item, nn.Module):
            found[name] = get_model_state_dict(item)
        elif isinstance(item, Optimizer) and (make_state or item.state):
            found[name] = get_optimizer_state_dict(_module_of(name, item, state), item)
        elif isinstance(item, Optimizer):
            found[name] = {"param_groups": []}  # nothing has been learned yet, and asking torch would make it up
        elif hasattr(item, "state_dict"):
            found[name] = item.state_dict()
        else:
            found[name] = item
    return found


def _module_of(name: str, optimizer: Any, state: Mapping[str, Any]) -> Any:
    """The module whose parameters the optimizer holds; names come from it."""
    from torch import nn

    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    modules = [item for item in state.values() if isinstance(item, nn.Module)]
    found = next((module for module in modules if held <= {id(parameter) for parameter in module.parameters()}), None)
    if found is None:
        raise StateError(f"{name}: its parameters belong to no module in the state; pass the module too")
    return found


def _is_alone() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized())
