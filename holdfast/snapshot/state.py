"""The user's objects as arrays and objects: what has to be captured, and how it is put back, bit for bit.

Modules and torch optimizers are taken apart by name, so an optimizer's state is found under its parameter's name and never under
a number. Anything else with `state_dict` and `load_state_dict` is taken by what its `state_dict` returns. Random generators are
captured without being asked for.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.arrays import ArraySpec, Placement, check_name, placement_of
from holdfast.errors import LayoutMismatch, StateError
from holdfast.objects import decode_object, encode_object
from holdfast.snapshot.buckets import arrange, buckets_of, replicated
from holdfast.snapshot.modules import Replicas, bare, check_known, check_whole, fqn_of, homes_of, replicas_of
from holdfast.snapshot.optimizers import by_place, cut_anew, empty_state, in_order, put

RNG, BUCKETS = "rng", "ddp-buckets"
"""The names under which random generators and the order of DDP's sums are kept; not free for objects of the user's."""

LOOSE = "parameter"
"""Beside its optimizer state: the name of a parameter that belongs to no module."""

LARGE_TENSOR_NBYTES = 64 * 1024
"""Tensors of plain objects from this size on become arrays; smaller ones stay inside the object."""


@dataclass(frozen=True, slots=True)
class Held:
    """One array as this rank holds it now: its placement, the tensor with the local bytes, and when it may be copied.

    `lazy` ones change only in `optimizer.step`, so they may be copied while forward and backward run.
    """

    placement: Placement
    tensor: torch.Tensor
    lazy: bool
    home: tuple[dict[Any, Any], Any] | None = None
    """The dictionary and key under which the tensor was found, to see cheaply whether it still is the one."""

    def is_current(self) -> bool:
        return self.home is None or self.home[0].get(self.home[1]) is self.tensor

    @property
    def local(self) -> torch.Tensor:
        return local_part(self.tensor)

    @property
    def name(self) -> str:
        return self.placement.spec.name


@dataclass(frozen=True, slots=True)
class _Known:
    """What modules and optimizers held when they were last looked at; `looks` are what may change of a tensor that stays."""

    signature: tuple[int, ...]
    held: tuple[Held, ...]
    looks: tuple[Any, ...]

    def is_current(self, signature: tuple[int, ...]) -> bool:
        return (
            self.signature == signature
            and all(item.is_current() for item in self.held)
            and self.looks == tuple(_look_of(item.tensor) for item in self.held)
        )


def _look_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.device, tensor.requires_grad


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that holds this rank's bytes, without a copy and without autograd."""
    with torch.no_grad():
        return tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor.detach()


class TrackedState:
    """The mapping given to `protect`, checked once and read at every snapshot. Raises StateError for what cannot be captured."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        if not objects:
            raise StateError("protect() was given no state; pass a mapping such as {'model': model, 'optim': optimizer}")
        for name, item in objects.items():
            _check_object(name, item)
        self.objects = dict(objects)
        self.modules = {name: item for name, item in objects.items() if isinstance(item, nn.Module)}
        self.optimizers = {name: item for name, item in objects.items() if isinstance(item, Optimizer)}
        self.others = {n: item for n, item in objects.items() if n not in self.modules and n not in self.optimizers}
        self.replicated = replicated(self.modules.values())
        self._named: dict[str, dict[int, tuple[str, Placement]]] = {}
        self._known: _Known | None = None
        self.others_have_arrays = False
        """Plain objects with large tensors may make them anew at every `state_dict`, so no plan over them can be kept."""
        self._large: dict[str, torch.Tensor] = {}
        self._made_up: set[str] = set()
        """Modules whose `state_dict` has more than their parameters and buffers: extra state, or what a hook adds."""
        self.held()
        self.texts()  # what has no typed form is said now, and not by every snapshot that fails for it

    # -- reading --

    def held(self) -> list[Held]:
        """Every array as this rank holds it at this moment. Call between steps; raises StateError when two share a name.

        Looking at every tensor takes as long as restoring it, so what was found last is kept for as long as it is the same.
        """
        signature, known, others = self.signature(), self._known, list(self._of_others())
        if known is not None and known.is_current(signature) and not others:
            return list(known.held)
        self._named.clear()
        self._known = None
        of_modules = list(self._of_modules())
        own = [*of_modules, *self._of_optimizers({id(item.tensor) for item in of_modules})]
        found = own + others
        names = {item.name for item in found}
        if len(names) != len(found):
            twice = next(item.name for item in found if sum(item.name == other.name for other in found) > 1)
            raise StateError(f"two tensors would be stored as {twice!r}; rename one of the objects given to protect()")
        for name in names:
            inner = next((parent for parent in _parents(name) if parent in names), None)
            if inner is not None:
                raise StateError(f"{inner!r} is an array and cannot also be the folder of {name!r}; rename one of the two")
        self._known = _Known(signature, tuple(own), tuple(_look_of(item.tensor) for item in own))
        return found

    def signature(self) -> tuple[int, ...]:
        """Changes when arrays appear or go, or when what holds them does: a layer put in another's place, a loaded state dict.

        Identities and counts only, so that it costs microseconds. A plan keeps the dictionaries of its arrays alive, so none of
        their identities is given to another; which tensors are in them, `Held` knows.
        """
        return (
            *(
                hash(
                    tuple(
                        (id(part._parameters), len(part._parameters), id(part._buffers), len(part._buffers))
                        for part in m.modules()
                    )
                )
                for m in self.modules.values()
            ),
            *(hash(tuple((id(state), len(state)) for state in item.state.values())) for item in self.optimizers.values()),
            *(
                hash(tuple(id(param) for param in group["params"]))
                for optimizer in self.optimizers.values()
                for group in optimizer.param_groups
            ),
        )

    def owners(self) -> dict[int, tuple[int, int]]:
        """Who changes a tensor, by its identity: which optimizer and which of its parameter groups, counted in order."""
        return {
            id(tensor): (number, place)
            for number, optimizer in enumerate(self.optimizers.values())
            for place, group in enumerate(optimizer.param_groups)
            for param in group["params"]
            for tensor in (param, *optimizer.state.get(param, {}).values())
        }

    def texts(self) -> dict[str, str]:
        """Every object but the random generators as typed text, now."""
        found: dict[str, str] = {}
        for name, module in self.modules.items():
            if name not in self._made_up:
                continue
            homes = homes_of(module)
            extra = {key: value for key, value in bare(module).state_dict(keep_vars=True).items() if id(value) not in homes}
            if extra:
                found[name] = encode_object(extra, name)
        for name, optimizer in self.optimizers.items():
            found[name] = encode_object(self._groups_of(name, optimizer), name)
        arranged = [buckets_of(ddp) for ddp in self.replicated]
        if any(arranged):
            found[BUCKETS] = encode_object(arranged, BUCKETS)
        self.others_have_arrays = False
        for name, item in self.others.items():
            value = item.state_dict()
            self.others_have_arrays |= any(True for _ in _large_tensors(value, name))
            found[name] = encode_object(_without_large(value), name)
        return found

    def optimized(self) -> list[str]:
        """The parameters of the optimizers, as `optim/<parameter>`: under these names the first step makes their state."""
        return [f"{name}/{fqn}" for name, item in self.optimizers.items() for fqn, _ in self._names(name, item).values()]

    # -- writing back --

    def prepare(self, stored: Mapping[str, ArraySpec], elsewhere: Collection[str] = ()) -> list[Held]:
        """Make room for every stored array of ours and return where each goes.

        Optimizer state that does not exist before the first step is created, and a plain object's large tensors are what they
        were when stored, whatever it holds now. `elsewhere` are the names of arrays, and the `optimized`, of all ranks, which may
        hold other stages or experts. Raises LayoutMismatch when an array of ours is not stored, or one is stored that nobody holds.
        """
        for name, optimizer in self.optimizers.items():
            self._create_state(name, optimizer, stored)
        held = [item for item in self.held() if item.name.split("/")[0] not in self.others]
        self._check_same(held, stored, elsewhere)
        return held + self._room_for_others(stored)

    def prepare_anew(self, stored: Mapping[str, ArraySpec]) -> list[Held]:
        """As `prepare`, for a rank whose own arrays are lost: those of its modules, and optimizers that have not taken a step."""
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        return [item for item in self.held() if item.name.split("/")[0] in self.modules] + self._room_for_others(stored)

    def texts_by_place(self, texts: Mapping[str, str]) -> dict[str, str]:
        """The texts of a rank with other parameters, as if they were ours: settings go by place. Raises LayoutMismatch."""
        found = dict(texts)
        for name, optimizer in self.optimizers.items():
            names = self._names(name, optimizer)
            ours = [[names[id(param)][0] for param in group["params"]] for group in optimizer.param_groups]
            found[name] = encode_object(by_place(name, ours, decode_object(texts[name])), name)
        return found

    def _room_for_others(self, stored: Mapping[str, ArraySpec]) -> list[Held]:
        """Fresh tensors, given to the objects by `load_texts`: what `state_dict` hands out may be copies, or not be there yet."""
        live = {path: tensor for name, item in self.others.items() for path, tensor in _large_tensors(item.state_dict(), name)}
        wanted = [(name, spec) for name, spec in stored.items() if name.split("/")[0] in self.others and "@rank-" not in name]
        self._large = {
            name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=live[name].device if name in live else "cpu")
            for name, spec in wanted
        }
        return [Held(placement_of(name, tensor), tensor, lazy=False) for name, tensor in self._large.items()]

    def load_texts(self, texts: Mapping[str, str], of_all: Iterable[Mapping[str, str]] = ()) -> None:
        """Put the objects back; the random generators last, so that nothing draws from them afterwards.

        Where stages or experts are cut in another way than before, a rank's parameters were several others': `of_all` are the
        texts of all ranks, from which their settings are gathered.
        """
        for name, optimizer in self.optimizers.items():
            if name in texts:
                every = (decode_object(other[name]) for other in of_all if name in other)
                self._load_groups(name, optimizer, decode_object(texts[name]), every)
        for name, module in self.modules.items():
            if name in texts:
                bare(module).load_state_dict(decode_object(texts[name]), strict=False)
        for name, item in self.others.items():
            if name not in texts:
                raise LayoutMismatch(f"the snapshot has no object {name!r}; it was written without it")
            item.load_state_dict(_with_large(decode_object(texts[name]), name, self._large))
        self._large = {}
        arranged = decode_object(texts[BUCKETS]) if BUCKETS in texts else []
        for place, ddp in enumerate(self.replicated):
            arrange(ddp, arranged[place] if place < len(arranged) else None)
        if RNG in texts:
            _set_rng(decode_object(texts[RNG]))

    # -- modules --

    def _of_modules(self) -> Iterator[Held]:
        trained = {
            id(param) for optimizer in self.optimizers.values() for group in optimizer.param_groups for param in group["params"]
        }
        for name, module in self.modules.items():
            replicas = replicas_of(module)
            parameters = {id(param) for param in module.parameters()}
            homes = homes_of(module)
            seen: dict[int, str] = {}
            self._made_up.discard(name)
            for key, tensor in bare(module).state_dict(keep_vars=True).items():
                if id(tensor) not in homes:
                    self._made_up.add(name)
                    continue
                if seen.setdefault(id(tensor), key) != key:
                    continue  # tied: stored under its first name
                is_parameter = id(tensor) in parameters
                # DDP sends rank 0's buffers to all at the next forward; until then each rank has its own.
                known = replicas if is_parameter else Replicas()
                placement = known.place(f"{name}/{fqn_of(key)}", key, tensor)
                lazy = id(tensor) in trained or (is_parameter and not tensor.requires_grad)
                yield Held(placement, tensor, lazy, homes[id(tensor)])
            check_whole(name, module, seen)

    # -- optimizers --

    def _names(self, name: str, optimizer: Optimizer) -> dict[int, tuple[str, Placement]]:
        """For each parameter of the optimizer: its name, by identity, and how it is placed. Kept until `held` looks anew."""
        if name not in self._named:
            self._named[name] = self._find_names(optimizer)
        return self._named[name]

    def _find_names(self, optimizer: Optimizer) -> dict[int, tuple[str, Placement]]:
        wanted = {id(param) for group in optimizer.param_groups for param in group["params"]}
        found: dict[str, dict[int, tuple[str, Placement]]] = {}
        for name, module in self.modules.items():
            replicas = replicas_of(module)
            for key, param in bare(module).named_parameters():
                if id(param) in wanted:
                    found.setdefault(name, {})[id(param)] = (fqn_of(key), replicas.place(fqn_of(key), key, param))
        prefix = len(found) > 1  # one optimizer over several modules: their parameters may share names
        named = {
            key: (f"{module}.{fqn}" if prefix else fqn, placement)
            for module, params in found.items()
            for key, (fqn, placement) in params.items()
        }
        for place, group in enumerate(optimizer.param_groups):
            for number, param in enumerate(group["params"]):
                if id(param) not in named:
                    fallback = f"group-{place}.param-{number}"
                    named[id(param)] = (fallback, placement_of(fallback, param))
        return named

    def _of_optimizers(self, captured: Collection[int]) -> Iterator[Held]:
        """Their state, and the parameters that are not `captured` with a module: a temperature, a table of somebody's own."""
        for name, optimizer in self.optimizers.items():
            names = self._names(name, optimizer)
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                if id(param) not in captured and not self._is_in_others(param):
                    fqn, like = names[id(param)]
                    yield Held(replace(like, spec=replace(like.spec, name=f"{name}/{fqn}/{LOOSE}")), param, lazy=True)
            for param, state in optimizer.state.items():
                if id(param) not in names:
                    continue
                fqn, like = names[id(param)]
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        yield _held_state(f"{name}/{fqn}/{key}", value, like, (state, key))

    def _groups_of(self, name: str, optimizer: Optimizer) -> dict[str, Any]:
        names = self._names(name, optimizer)
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": [names[id(p)][0] for p in group["params"]],
            }
            for group in optimizer.param_groups
        ]
        scalars = {
            names[id(param)][0]: kept
            for param, state in optimizer.state.items()
            if id(param) in names and (kept := {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)})
        }
        order = list(
            dict.fromkeys(chain.from_iterable(state for param, state in optimizer.state.items() if id(param) in names))
        )
        return {"param_groups": groups, "scalars": scalars, "order": order}

    def _load_groups(self, name: str, optimizer: Optimizer, stored: dict[str, Any], of_all: Iterable[dict[str, Any]]) -> None:
        names = self._names(name, optimizer)
        ours = [[names[id(param)][0] for param in group["params"]] for group in optimizer.param_groups]
        if ours != [group["params"] for group in stored["param_groups"]]:
            stored = cut_anew(name, ours, stored, list(of_all))
        for group, kept in zip(optimizer.param_groups, stored["param_groups"], strict=True):
            for key, value in kept.items():
                if key != "params":
                    put(group, key, value)
        params = {names[id(param)][0]: param for group in optimizer.param_groups for param in group["params"]}
        for fqn, kept in stored["scalars"].items():
            optimizer.state[params[fqn]].update(kept)
        in_order(optimizer, stored.get("order", ()))

    def _create_state(self, name: str, optimizer: Optimizer, stored: Mapping[str, ArraySpec]) -> None:
        names = self._names(name, optimizer)
        kept: dict[str, list[tuple[str, ArraySpec]]] = {}
        for array, spec in stored.items():
            of, _, key = array.rpartition("/")
            if "@" not in key and key != LOOSE:
                kept.setdefault(of, []).append((key, spec))
        for group in optimizer.param_groups:
            for param in group["params"]:
                for key, spec in kept.get(f"{name}/{names[id(param)][0]}", ()):
                    if key not in optimizer.state[param]:
                        optimizer.state[param][key] = empty_state(param, key, spec, group)

    def _is_in_others(self, param: torch.Tensor) -> bool:
        """Whether an object that is no module brings it: its state dict has such a tensor, or a copy."""
        return any(
            (tensor.dtype, tensor.shape) == (param.dtype, param.shape)
            for item in self.others.values()
            for _, tensor in _tensors(item.state_dict(), "")
        )

    # -- other objects --

    def _of_others(self) -> Iterator[Held]:
        for name, item in self.others.items():
            for path, tensor in _large_tensors(item.state_dict(), name):
                yield Held(placement_of(path, tensor), tensor, lazy=False)

    def _check_same(self, held: list[Held], stored: Mapping[str, ArraySpec], elsewhere: Collection[str]) -> None:
        ours = {item.name: item.placement.spec for item in held}
        theirs = {name: spec for name, spec in stored.items() if "@rank-" not in name and name.split("/")[0] not in self.others}
        missing = sorted(ours.keys() - theirs.keys())
        extra = sorted(
            name for name in theirs.keys() - ours.keys() if name not in elsewhere and name.rpartition("/")[0] not in elsewhere
        )
        if missing or extra:
            raise LayoutMismatch(
                f"the snapshot and the running state have different arrays: {_some(missing)} only here, {_some(extra)} only in the "
                "snapshot; build the same model and optimizer as when it was taken"
            )
        for name, spec in ours.items():
            found = theirs[name]
            if found != spec:
                raise LayoutMismatch(
                    f"{name} is {spec.dtype}{list(spec.shape)} here and {found.dtype}{list(found.shape)} in the snapshot"
                )


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_object(name: str, item: Any) -> None:
    if not isinstance(name, str) or "/" in name or "@" in name:
        raise StateError(f"protect(): {name!r} cannot name an object; use a short word such as 'model'")
    check_name(name)
    if name == RNG:
        raise StateError(f"protect(): the name {RNG!r} is taken by the random generators, which are captured by themselves")
    if name == BUCKETS:
        raise StateError(f"protect(): the name {BUCKETS!r} is taken by the order in which DDP adds gradients up")
    lacking = [method for method in ("state_dict", "load_state_dict") if not callable(getattr(item, method, None))]
    if lacking:
        raise StateError(
            f"protect(): {name!r} is a {type(item).__qualname__} without {' and '.join(lacking)}; pass the object that holds the "
            "state, or wrap it in one with both methods"
        )
    check_known(name, item)


def _parents(name: str) -> Iterator[str]:
    parts = name.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "none"


def _held_state(name: str, value: torch.Tensor, like: Placement, home: tuple[dict[Any, Any], Any]) -> Held:
    """Optimizer state is placed as its parameter is: a DTensor says so itself, a plain tensor of DDP is equal on all replicas."""
    placement = placement_of(name, value)
    if not hasattr(value, "device_mesh") and like.replicas > 1:
        placement = Placement(placement.spec, placement.boxes, like.replica, like.replicas, like.expected)
    # A count on the GPU is left to the copy stream: fetching it here would wait for all that the GPU has been given to do.
    return Held(placement, value, value.dim() > 0 or value.is_cuda, home)


# -- plain objects --------------------------------------------------------------------------------------------------------


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.nbytes >= LARGE_TENSOR_NBYTES


def _large_tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in _tensors(value, path) if _is_large(tensor))


def _tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor inside a state dict, with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _tensors(item, f"{path}/{place}")


def _without_large(value: Any) -> Any:
    """The value with its large tensors left out; an empty tensor stands in their place."""
    if _is_large(value):
        return value.new_empty(0)
    if isinstance(value, dict):
        return _dict_like(value, ((key, _without_large(item)) for key, item in value.items()))
    if type(value) in (list, tuple):
        return type(value)(_without_large(item) for item in value)
    return value


def _dict_like(value: dict[Any, Any], items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    return OrderedDict(items) if isinstance(value, OrderedDict) else dict(items)


def _with_large(value: Any, name: str, large: Mapping[str, torch.Tensor]) -> Any:
    """`value` with `large`, the restored tensors by path, in the places that were left empty for them."""

    def fill(part: Any, path: str) -> Any:
        if isinstance(part, torch.Tensor) and part.numel() == 0 and path in large:
            return large[path]
        if isinstance(part, dict):
            return _dict_like(part, ((key, fill(item, f"{path}/{key}")) for key, item in part.items()))
        if type(part) in (list, tuple):
            return type(part)(fill(item, f"{path}/{place}") for place, item in enumerate(part))
        return part

    return fill(value, name)


# -- random generators ------------------------------------------------------------------------------------------------------


def rng_states() -> dict[str, Any]:
    """The state of every generator, as values of their own; call it before anything else could draw from them."""
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
