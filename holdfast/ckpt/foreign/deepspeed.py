"""DeepSpeed checkpoints with ZeRO stages 1, 2 and 3, as DeepSpeed's own zero_to_fp32.py reads them.

    global_step1000/
      mp_rank_00_model_states.pt                   module, param_shapes: one {name: shape} for each parameter group, in flat order
      zero_pp_rank_<dp>_mp_rank_00_optim_states.pt the rank's part of the flat fp32 parameters and of the optimizer's state

Stages 1 and 2 lay the parameters of a group end to end, pad the end, and cut that into one range for each rank; a parameter may
lie across several ranks. Stage 3 cuts every parameter by itself into equal ranges, the last one padded, and a rank's file has its
ranges end to end, over all groups. Either way a rank holds flat ranges of parameters, and these are boxes of the stored arrays.

Stored are `model/<name>` (the module's own values; with stage 3, where the module is cut up, the fp32 ones),
`optim/<name>/master` (the fp32 values that the optimizer works on), `optim/<name>/<state>`, and the hyperparameters as objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.arrays import ArraySpec, Box, flat_range_boxes
from holdfast.ckpt.foreign.source import Source, SourceArray, dtype_of, flat_source, tensor_source
from holdfast.ckpt.foreign.torchfiles import holds_inert, load_torch, value_of
from holdfast.errors import CorruptData, MissingData, NotACheckpoint, UnsupportedFormat

INERT = ("deepspeed", "numpy", "argparse.Namespace", "__builtin__", "builtins")
"""Whose objects a DeepSpeed checkpoint holds beside its tensors: loss scalers, enumerations, addresses of fragments."""

_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


@dataclass(frozen=True)
class FlatRange:
    """Elements [start, stop) of a flattened parameter are elements [at, …) of some rank's flat tensor."""

    rank: int
    tensor: int
    start: int
    stop: int
    at: int


def ranges_of_stage_2(
    shapes: Sequence[Mapping[str, int]], held: Sequence[Sequence[int]]
) -> dict[str, tuple[int, list[FlatRange]]]:
    """Where every parameter lies: its group, and its ranges.

    `shapes[group]` gives the elements of each parameter in flat order, `held[rank][group]` how many a rank's partition has.
    Raises CorruptData when the partitions together are shorter than the parameters.
    """
    found: dict[str, tuple[int, list[FlatRange]]] = {}
    for group, sizes in enumerate(shapes):
        bounds = [0]
        for partition in held:
            bounds.append(bounds[-1] + partition[group])
        if bounds[-1] < sum(sizes.values()):
            raise CorruptData(
                f"group {group}: the ranks' partitions have {bounds[-1]} elements, its parameters {sum(sizes.values())}; "
                "a rank's file is missing or of another save"
            )
        first = 0
        for name, size in sizes.items():
            ranges = []
            for rank in range(len(held)):
                start, stop = max(first, bounds[rank]), min(first + size, bounds[rank + 1])
                if start < stop:
                    ranges.append(FlatRange(rank, group, start - first, stop - first, start - bounds[rank]))
            found[name] = group, ranges
            first += size
    return found


def ranges_of_stage_3(
    shapes: Sequence[Mapping[str, int]], held: Sequence[Sequence[int]]
) -> dict[str, tuple[int, list[FlatRange]]]:
    """The same for stage 3, where `held[rank][sub_group]` are the sizes of a rank's flat tensors, read end to end."""
    ranks = len(held)
    found: dict[str, tuple[int, list[FlatRange]]] = {}
    at = 0
    for name, size in ((name, size) for sizes in shapes for name, size in sizes.items()):
        share = -(-size // ranks)
        ranges: list[FlatRange] = []
        sub_group = -1
        for rank in range(ranks):
            start, stop = min(rank * share, size), min((rank + 1) * share, size)
            sub_group, inside = _find(held[rank], at, share, name)
            if start < stop:
                ranges.append(FlatRange(rank, sub_group, start, stop, inside))
        found[name] = sub_group, ranges
        at += share
    return found


def _find(sizes: Sequence[int], at: int, share: int, name: str) -> tuple[int, int]:
    """The tensor of a list laid end to end that holds element `at`, and where in it that is."""
    for number, size in enumerate(sizes):
        if at < size or (at == size == 0):
            if at + share > size:
                raise CorruptData(f"{name}: its part lies across two flat tensors of a rank, where stage 3 never puts it")
            return number, at
        at -= size
    raise CorruptData(f"{name}: lies past the end of a rank's flat tensors; a file is of another save")


# -- opening -----------------------------------------------------------------------------------------------------------


def find_deepspeed(path: Path) -> Path | None:
    """The directory with the files of one step: `path`, or the one that its `latest` names."""
    if not path.is_dir():
        return None
    if any(_OPTIM.fullmatch(file.name) for file in path.iterdir()):
        return path
    latest = path / "latest"
    if latest.is_file() and re.fullmatch(r"[\w.-]{1,200}", tag := latest.read_text(errors="replace").strip()):
        return path / tag if tag not in (".", "..") and (path / tag).is_dir() and find_deepspeed(path / tag) else None
    return None


def open_deepspeed(path: Path, inert: Sequence[str] = ()) -> Source:
    """A DeepSpeed checkpoint, tensors mapped. Raises MissingData when a rank's file is not there, UnsupportedFormat for a stage or
    a kind of parallelism that is not understood."""
    directory = find_deepspeed(path)
    if directory is None:
        raise NotACheckpoint(f"{path}: has no zero_pp_rank_*_optim_states.pt, and no 'latest' that names a directory with them")
    names = (*INERT, *inert)
    optims = [load_torch(file, names)["optimizer_state_dict"] for file in _optim_files(directory)]
    models = [load_torch(file, names) for file in _model_files(directory)]
    return _Step(directory, models, optims).source()


def _optim_files(directory: Path) -> list[Path]:
    found = {(int(match[1]), int(match[2])): file for file in directory.iterdir() if (match := _OPTIM.fullmatch(file.name))}
    if {mp for _, mp in found} != {0}:
        raise UnsupportedFormat(
            f"{directory}: was saved with tensor or pipeline parallelism inside DeepSpeed (mp_rank {max(mp for _, mp in found)}); "
            "only data parallelism is understood. Convert it with DeepSpeed's ds_to_universal.py first"
        )
    missing = [rank for rank in range(1 + max(rank for rank, _ in found)) if (rank, 0) not in found]
    if missing:
        raise MissingData(f"{directory}: the optim_states file of rank {missing[0]} is missing")
    return [found[rank, 0] for rank in range(len(found))]


def _model_files(directory: Path) -> list[Path]:
    found = {int(match[1] or 0): file for file in directory.iterdir() if (match := _MODEL.fullmatch(file.name))}
    if not found:
        raise MissingData(f"{directory}: has no *_model_states.pt")
    return [found[rank] for rank in sorted(found)]


@dataclass(frozen=True)
class _Step:
    """The files of one step, loaded."""

    directory: Path
    models: Sequence[Mapping[str, Any]]
    optims: Sequence[Mapping[str, Any]]

    def source(self) -> Source:
        self._check()
        arrays = {**self._module(), **self._flat(), **self._frozen()}
        if self.stage == 3:
            arrays |= {f"model/{name}": _renamed(arrays[f"optim/{name}/master"], f"model/{name}") for name in self.ranges}
        objects, left_out = self._objects()
        layout = {"tied": self.shared, "deepspeed": {"stage": self.stage, "ranks": len(self.optims)}}
        step = self.models[0].get("global_steps")
        return Source("deepspeed", arrays, objects, step if type(step) is int else None, layout, tuple(left_out))

    def _check(self) -> None:
        count = self.optims[0].get("partition_count", len(self.optims))
        count = max(count) if isinstance(count, list | tuple) else count
        if count != len(self.optims):
            raise MissingData(f"{self.directory}: {count} ranks saved, optim_states files of {len(self.optims)} are there")
        if self.stage not in (1, 2, 3):
            raise UnsupportedFormat(f"{self.directory}: ZeRO stage {self.stage!r} is not one of 1, 2, 3")
        for key in ("param_shapes", "module"):
            if key not in self.models[0]:
                raise UnsupportedFormat(f"{self.directory}: the model_states file has no {key!r}; it was not saved with ZeRO")
        if self.stage == 3 and len(self.models) != len(self.optims):
            raise MissingData(
                f"{self.directory}: {len(self.optims)} ranks saved, model_states files of {len(self.models)} are there"
            )

    @property
    def stage(self) -> int:
        found = value_of(self.optims[0].get("zero_stage", 1))  # the bfloat16 optimizer is stage 1 and does not say so
        return int(found) if isinstance(found, int) else -1

    @property
    def shared(self) -> dict[str, str]:
        """Names that are another name's parameter."""
        pairs = self.models[0].get("shared_params", {})
        return {str(name): str(of) for name, of in (pairs.items() if isinstance(pairs, dict) else pairs)}

    @property
    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        groups = self.models[0]["param_shapes"]
        groups = groups if isinstance(groups, list | tuple) else [groups]
        return [{str(name): tuple(shape) for name, shape in group.items()} for group in groups]

    @property
    def masters(self) -> list[list[Any]]:
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        if any(key not in optim for optim in self.optims):
            raise UnsupportedFormat(f"{self.directory}: an optim_states file has no {key!r}, stage {self.stage} needs it")
        return [list(optim[key]) for optim in self.optims]

    @property
    def ranges(self) -> dict[str, tuple[int, list[FlatRange]]]:
        sizes = [{name: math.prod(shape) for name, shape in group.items()} for group in self.shapes]
        held = [[tensor.numel() for tensor in rank] for rank in self.masters]
        return (ranges_of_stage_3 if self.stage == 3 else ranges_of_stage_2)(sizes, held)

    # -- arrays --

    def _module(self) -> dict[str, SourceArray]:
        """What the module itself holds whole: everything with stages 1 and 2, buffers with stage 3."""
        wanted = set(self.models[0].get("buffer_names", ())) if self.stage == 3 else set(self.models[0]["module"])
        named = ((str(name), tensor) for name, tensor in self.models[0]["module"].items() if name in wanted)
        return {
            f"model/{name}": tensor_source(f"model/{name}", tensor)
            for name, tensor in named
            if hasattr(tensor, "untyped_storage") and name not in self.shared
        }

    def _flat(self) -> dict[str, SourceArray]:
        """The optimizer's flat tensors, cut into parameters: fp32 values, and each state that is as long."""
        shapes = {name: shape for group in self.shapes for name, shape in group.items()}
        masters, states = self.masters, [_states(optim) for optim in self.optims]
        arrays: dict[str, SourceArray] = {}
        for name, (group, ranges) in self.ranges.items():
            arrays[f"optim/{name}/master"] = _cut(f"optim/{name}/master", shapes[name], ranges, masters)
            for key in states[0][group] if group < len(states[0]) else ():
                full = f"optim/{name}/{key}"
                if _is_flat(states[0][group][key]):
                    flats = [[state.get(key) for state in rank] for rank in states]
                    arrays[full] = _cut(full, shapes[name], ranges, flats)
                elif (scalar := _scalar(states[0][group][key])) is not None:
                    arrays[full] = tensor_source(full, scalar)
        return arrays

    def _frozen(self) -> dict[str, SourceArray]:
        """Parameters that are not trained, which stage 3 cuts up like the others."""
        if self.stage != 3:
            return {}
        shapes = self.models[0].get("frozen_param_shapes") or {}
        fragments = [model.get("frozen_param_fragments") or {} for model in self.models]
        arrays = {}
        for name, shape in shapes.items():
            size, ranks = math.prod(shape), len(fragments)
            share = -(-size // ranks)
            bounds = ((rank, min(rank * share, size), min((rank + 1) * share, size)) for rank in range(ranks))
            ranges = [FlatRange(rank, 0, start, stop, 0) for rank, start, stop in bounds if start < stop]
            flats = [[held[name].reshape(-1)] if name in held else [] for held in fragments]
            arrays[f"model/{name}"] = _cut(f"model/{name}", tuple(shape), ranges, flats)
        return arrays

    # -- objects --

    def _objects(self) -> tuple[dict[str, Any], list[str]]:
        """Hyperparameters under the parameters' names, and what the user put into the checkpoint."""
        groups, left_out = _param_groups(self.optims[0], [list(group) for group in self.shapes]), []
        objects: dict[str, Any] = {"optim/param_groups": groups} if groups is not None else {}
        for key, value in self.models[0].items():
            if key in _FRAMEWORK or hasattr(value, "untyped_storage") or value is None:
                continue
            if holds_inert(value):
                left_out.append(f"{key} holds objects that were not loaded")
            else:
                objects[f"deepspeed/{key}"] = value
        return objects, left_out


_FRAMEWORK = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "ds_config",
}
"""Parts of a model_states file that are arrays, or that describe how they were laid out."""


def _states(optim: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The base optimizer's state for each flat tensor, in order: `{"exp_avg": …, "step": …}`."""
    base = optim.get("base_optimizer_state", optim.get("optimizer_state_dict", {}))
    if isinstance(base, list):  # an "elastic" checkpoint: no parameter groups, and padding is taken off
        return [dict(state) for state in base]
    states, groups = base.get("state", {}), base.get("param_groups", [])
    order = [number for group in groups for number in group["params"]] or sorted(states)
    steps = {number: group["step"] for group in groups if "step" in group for number in group["params"]}
    return [{**({"step": steps[number]} if number in steps else {}), **states.get(number, {})} for number in order]


def _param_groups(optim: Mapping[str, Any], names: Sequence[Sequence[str]]) -> list[dict[str, Any]] | None:
    base = optim.get("base_optimizer_state", optim.get("optimizer_state_dict", {}))
    if isinstance(base, list) or len(base.get("param_groups", [])) != len(names):
        return None
    clean = [{key: value for key, value in group.items() if not holds_inert(value)} for group in base["param_groups"]]
    return [{**group, "params": list(params)} for group, params in zip(clean, names, strict=True)]


def _is_flat(value: Any) -> bool:
    return hasattr(value, "untyped_storage") and value.dim() == 1 and value.numel() > 1


def _scalar(value: Any) -> Any:
    """Step counters as torch keeps them: a float32 without dimensions."""
    import torch

    if type(value) in (int, float):
        return torch.tensor(float(value))
    if hasattr(value, "untyped_storage") and value.numel() == 1:
        return value.detach().reshape(())
    return None


def _cut(name: str, shape: tuple[int, ...], ranges: Sequence[FlatRange], flats: Sequence[Sequence[Any]]) -> SourceArray:
    """A parameter's boxes, from the flat ranges that the ranks hold of it."""
    pieces: dict[Box, tuple[Any, int]] = {}
    dtype = "float32"
    for part in ranges:
        tensor = flats[part.rank][part.tensor] if part.tensor < len(flats[part.rank]) else None
        if tensor is None or tensor.numel() < part.at + part.stop - part.start:
            raise CorruptData(
                f"{name}: rank {part.rank} holds {0 if tensor is None else tensor.numel()} elements of its flat tensor, too few"
            )
        dtype = dtype_of(tensor)
        for box, at in _boxes(shape, part):
            pieces[box] = tensor, at
    return flat_source(ArraySpec(name, dtype, shape), pieces)


def _boxes(shape: tuple[int, ...], part: FlatRange) -> Iterator[tuple[Box, int]]:
    at = part.at
    for box in flat_range_boxes(shape, part.start, part.stop):
        yield box, at
        at += box.size


def _renamed(array: SourceArray, name: str) -> SourceArray:
    return SourceArray(ArraySpec(name, array.spec.dtype, array.spec.shape), array.boxes, array.read)
