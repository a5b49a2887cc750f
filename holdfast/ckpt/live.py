"""Live objects to a checkpoint and back, without keepers: `save`, `save_async`, `load`.

The state is the mapping that `holdfast.protect` takes: modules, optimizers, and anything with `state_dict` and `load_state_dict`.
Works with one process, and with many in a process group (every rank calls with its own part). torch is loaded by the calls.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from holdfast.ckpt.parity import add_parity
from holdfast.ckpt.parityfile import Parity
from holdfast.ckpt.storage import local
from holdfast.errors import LayoutMismatch, StateError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

    from holdfast.ckpt.dcp import UniversalWriter
    from holdfast.ckpt.storage import Place


def save(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    direct: bool = False,
    compress: Mapping[str, int] | None = None,
    incremental: bool = False,
    parity: Parity | None = None,
) -> Place:
    """The state is a committed step of the run at `path`, a directory or a URI; returns the step's place.

    With `parity` as much of the step as it says may rot and can be repaired (directories only); it is written after the step is
    committed.

    The options are those of `UniversalWriter`.
    """
    from holdfast.ckpt.dcp import UniversalWriter, save_state_dict

    writer = UniversalWriter(path, step=step, direct=direct, compress=compress, incremental=incremental)
    save_state_dict(state_dict_of(state), writer, None, alone=_is_alone())
    if parity is not None and writer.checkpoint is not None:  # on the coordinator
        add_parity(local(writer.checkpoint, "parity"), parity)
    return writer.checkpoint or writer.root


def save_async(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    writer: UniversalWriter | None = None,
) -> AsyncSaveResponse:
    """Begin to save and return within about a millisecond; the next optimizer step waits by itself for what is not copied yet.

    `upload_completion.result()` of the answer is there when the step is committed, and raises what went wrong; a save that
    failed is logged too, and training goes on. A save that is still being written is waited for. Threads, host buffers (one copy
    of the state) and what is known of the state's structure are kept for the next save to the same `path`, or in your own
    `writer`, whose `close` lets them go. With a process group the first call is a collective: it makes a group of its own, so that
    saves never mix with the training's communication.
    """
    from holdfast.ckpt.background import saver_of

    return saver_of(path, writer).save(state, step)


def load(state: Mapping[str, Any], path: str | os.PathLike[str], *, step: int | None = None) -> int:
    """The live objects hold what the checkpoint holds, whatever layout it was saved from; returns its step."""
    from torch import nn
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
    from torch.optim import Optimizer

    from holdfast.ckpt.dcp import UniversalReader

    reader = UniversalReader(path, step=step)
    wanted = state_dict_of(state, make_state=True, stored=reader.checkpoint.specs)
    missing = sorted(set(wanted) - {name.split("/")[0] for name in _stored(reader)})
    if missing:
        raise LayoutMismatch(f"{reader.checkpoint.path}: holds nothing for {', '.join(missing)}")
    dcp_load(wanted, storage_reader=reader, no_dist=_is_alone())
    for name, item in state.items():
        if isinstance(item, Optimizer):
            set_optimizer_state_dict(module_of(name, item, state), item, optim_state_dict=wanted[name])
        elif hasattr(item, "load_state_dict") and not isinstance(item, nn.Module):
            item.load_state_dict(wanted[name])  # a module's own tensors have been filled in place
    return reader.checkpoint.step


def _stored(reader: Any) -> set[str]:
    objects = (name for texts in reader.checkpoint.objects.values() for name in texts)
    return {*reader.checkpoint.specs, *objects}


def state_dict_of(
    state: Mapping[str, Any], *, make_state: bool = False, stored: Collection[str] | None = None
) -> dict[str, Any]:
    """One nested state dict, optimizer state under its parameters' names; tensors are the live ones.

    With `make_state`, optimizers that have not stepped yet get the state that a checkpoint can be loaded into. With the names
    of the `stored` arrays, tied weights are listed once, by a name that is among them.
    """
    from torch import nn
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.optim import Optimizer

    if not state:
        raise StateError("there is no state to save; pass a mapping such as {'model': model, 'optim': optimizer}")
    found: dict[str, Any] = {}
    for name, item in state.items():
        if isinstance(item, nn.Module):
            tensors = get_model_state_dict(item)
            found[name] = tensors if stored is None else _once(item, tensors, name, stored)
        elif isinstance(item, Optimizer) and (make_state or item.state):
            found[name] = get_optimizer_state_dict(module_of(name, item, state), item)
        elif isinstance(item, Optimizer):
            found[name] = {"param_groups": []}  # nothing has been learned yet, and asking torch would make it up
        elif hasattr(item, "state_dict"):
            found[name] = item.state_dict()
        else:
            found[name] = item
    return found


def _once(module: Any, tensors: dict[str, Any], name: str, stored: Collection[str]) -> dict[str, Any]:
    """Without the further names of parameters that are the same object; the same on all ranks, whatever they hold of it."""
    names: dict[int, list[str]] = {}
    for place, parameter in module.named_parameters(remove_duplicate=False):
        key = ".".join(part for part in place.split(".") if part not in _WRAPPERS)
        key = key if key in tensors else key.removeprefix("module.")
        if key in tensors:
            names.setdefault(id(parameter), []).append(key)
    further: set[str] = set()
    for twins in names.values():
        kept = next((twin for twin in twins if f"{name}/{twin}" in stored), twins[0])
        further.update(twin for twin in twins if twin != kept)
    return {key: tensor for key, tensor in tensors.items() if key not in further}


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch.compile and wrappers put into the names of parameters, and DCP leaves out."""


def module_of(name: str, optimizer: Any, state: Mapping[str, Any]) -> Any:
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
