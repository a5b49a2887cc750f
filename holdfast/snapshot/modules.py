"""What a module holds, under the names that the user gave, whatever has been wrapped around it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from holdfast.arrays import Placement, placement_of
from holdfast.errors import StateError

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def replicated_by(module: nn.Module) -> DistributedDataParallel | None:
    """The DDP around a module, also beneath `torch.compile`."""
    module = _uncompiled(module)
    return module if isinstance(module, DistributedDataParallel) else None


def _uncompiled(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", None)  # its class is not named here: importing that takes seconds
    return inner if isinstance(inner, nn.Module) else module


def bare(module: nn.Module) -> nn.Module:
    """The user's own module, whatever DDP and `torch.compile` have been wrapped around it, in either order."""
    ddp = replicated_by(module)
    return _uncompiled(module if ddp is None else ddp.module)


def homes_of(module: nn.Module) -> dict[int, tuple[dict[str, Any], str]]:
    """For each parameter and buffer, by identity: the dictionary of a submodule and the key under which it lives there."""
    return {
        id(tensor): (home, key)
        for part in bare(module).modules()
        for home in (part._parameters, part._buffers)
        for key, tensor in home.items()
        if tensor is not None
    }


def fqn_of(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


_HIDING = {
    "FullyShardedDataParallel": "holds FullyShardedDataParallel (FSDP1), whose parameters are parts of a flat buffer; shard it "
    "with torch.distributed.fsdp.fully_shard (FSDP2)",
    "ZeroRedundancyOptimizer": "is a ZeroRedundancyOptimizer, which keeps its state in another optimizer inside; shard the model "
    "with torch.distributed.fsdp.fully_shard and use a plain optimizer",
}
"""Classes of torch (named, not imported: that takes seconds) and what to do instead."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Which replica of how many a module's parameters are: known for DDP, else the module is taken as this rank's own."""

    number: int = 0
    count: int = 1
    ranks: tuple[int, ...] = ()
    apart: frozenset[str] = frozenset()
    """Parameters that DDP was told to ignore, such as the experts of this rank: no other rank need have them."""

    def place(self, name: str, key: str, tensor: torch.Tensor) -> Placement:
        """The placement of the parameter that its module calls `key`."""
        if not self.ranks or fqn_of(key) in self.apart:
            return placement_of(name, tensor)
        placement = placement_of(name, tensor, replica=self.number, replicas=self.count)
        return placement if placement.expected else replace(placement, expected=self.ranks)


def replicas_of(module: nn.Module) -> Replicas:
    ddp = replicated_by(module)
    if ddp is None:
        return Replicas()
    group = ddp.process_group
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    apart = frozenset(fqn_of(key) for key in ddp.parameters_to_ignore)
    return Replicas(torch.distributed.get_rank(group), len(ranks), ranks, apart)


def check_whole(name: str, module: nn.Module, captured: Collection[int]) -> None:
    """Raise StateError where a parameter that is trained is not among the tensors `captured`, by identity: it would be lost."""
    for key, param in bare(module).named_parameters():
        if param.requires_grad and id(param) not in captured:
            raise StateError(
                f"{name}: the parameter {fqn_of(key)} is not in the module's state_dict, or only as a copy, so it cannot be put "
                "back; give protect() the module that holds it itself, or an object of your own with state_dict and load_state_dict"
            )


def check_known(name: str, item: object) -> None:
    """Raise StateError for the wrappers of torch that keep state where it cannot be captured."""
    parts = item.modules() if isinstance(item, nn.Module) else (item,)
    for part in parts:
        for kind in type(part).__mro__:
            if kind.__name__ in _HIDING and kind.__module__.startswith("torch."):
                raise StateError(f"protect(): {name!r} {_HIDING[kind.__name__]}")
