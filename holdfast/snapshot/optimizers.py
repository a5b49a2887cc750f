"""An optimizer's settings and state, put back by the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from holdfast.arrays import ArraySpec
from holdfast.errors import LayoutMismatch
from holdfast.objects import decode_object, encode_object


def cut_anew(name: str, ours: list[list[str]], own: dict[str, Any], of_all: list[dict[str, Any]]) -> dict[str, Any]:
    """The parameter groups of `ours`, put together from those of all ranks. Raises LayoutMismatch where their settings differ."""
    source = {fqn: (group, every) for every in of_all for group in every["param_groups"] for fqn in group["params"]}
    if any(fqn not in source for fqns in ours for fqn in fqns) or len(own["param_groups"]) != len(ours):
        theirs = [group["params"] for group in own["param_groups"]]
        raise LayoutMismatch(
            f"{name}: the snapshot has {len(theirs)} parameter groups over {sum(map(len, theirs))} parameters, this optimizer "
            f"{len(ours)} over {sum(map(len, ours))}, or in another order; build the optimizer as it was built before"
        )
    groups = []
    for place, fqns in enumerate(ours):
        # One that is empty here, as where a stage has no such parameters, has the settings of its place.
        found = [(fqn, _settings(source[fqn][0])) for fqn in fqns] or [("", _settings(own["param_groups"][place]))]
        different = next((fqn for fqn, settings in found if settings != found[0][1]), None)
        if different is not None:
            raise LayoutMismatch(
                f"{name}: {found[0][0]} and {different} are in one parameter group here and had different settings in the snapshot"
            )
        groups.append({**decode_object(found[0][1]), "params": fqns})
    scalars = {fqn: source[fqn][1]["scalars"][fqn] for fqns in ours for fqn in fqns if fqn in source[fqn][1]["scalars"]}
    return {"param_groups": groups, "scalars": scalars, "order": own.get("order", ())}


def by_place(name: str, ours: list[list[str]], other: dict[str, Any]) -> dict[str, Any]:
    """The settings of an `other` optimizer for parameters of `ours`, group by group. Raises LayoutMismatch where those differ."""
    theirs = other["param_groups"]
    if [len(group["params"]) for group in theirs] != [len(fqns) for fqns in ours]:
        raise LayoutMismatch(
            f"{name}: the parameter groups hold {[len(fqns) for fqns in ours]} parameters here and "
            f"{[len(group['params']) for group in theirs]} on the rank whose settings are to be taken"
        )
    return {"param_groups": [{**group, "params": fqns} for group, fqns in zip(theirs, ours, strict=True)], "scalars": {}}


def in_order(optimizer: Optimizer, order: Sequence[str]) -> None:
    """Give every parameter's state the order that its keys had when it was captured.

    A rank that was replaced holds what was put back, the others what their optimizer has made. Code that goes through it with
    collectives, as every export of whole tensors does, pairs them by this order.
    """
    places = {key: place for place, key in enumerate(order)}
    for state in optimizer.state.values():
        items = sorted(state.items(), key=lambda item: places.get(item[0], len(places)))
        if list(state) != [key for key, _ in items]:
            state.clear()
            state.update(items)


def _settings(group: dict[str, Any]) -> str:
    return encode_object({key: value for key, value in group.items() if key != "params"}, "param_group")


def put(group: dict[str, Any], key: str, value: Any) -> None:
    """A tensor stays the one it is, on its device: compiled steps and captured graphs hold on to a tensor learning rate."""
    if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor) and group[key].shape == value.shape:
        with torch.no_grad():
            group[key].copy_(value)
    else:
        group[key] = value


def empty_state(param: torch.Tensor, key: str, spec: ArraySpec, group: Mapping[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, spec.dtype)
    if tuple(param.shape) == spec.shape and spec.shape:
        return torch.zeros_like(param.detach(), dtype=dtype)
    # torch keeps the count of steps on the CPU unless told otherwise, and all else (Adafactor's factors) with the parameter.
    on_device = key != "step" or bool(group.get("capturable") or group.get("fused"))
    return torch.zeros(spec.shape, dtype=dtype, device=param.device if on_device else "cpu")
