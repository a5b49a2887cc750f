"""Writes checkpoints in the layout that DeepSpeed documents in its zero_to_fp32.py, from a model and its optimizer.

DeepSpeed itself is not needed. The classes whose objects it leaves in its files are made up for the moment of saving, under their
real names, so that the files ask a reader for them just as real ones do.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn


@contextmanager
def borrowed_names(**classes: type) -> Iterator[None]:
    """Classes that pickle finds under foreign names, given with `__` for a dot."""
    made = []
    for full, cls in classes.items():
        module, _, name = full.replace("__", ".").rpartition(".")
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            place = ".".join(parts[:depth])
            if place not in sys.modules:
                sys.modules[place] = ModuleType(place)
                made.append(place)
        cls.__module__, cls.__qualname__, cls.__name__ = module, name, name
        setattr(sys.modules[module], name, cls)
    try:
        yield
    finally:
        for place in made:
            del sys.modules[place]


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0


class ZeroStageEnum(IntEnum):
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class FragmentAddress:
    numel: int
    start: int


def write(root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, stage: int, ranks: int, step: int) -> Path:
    """`root/global_step<step>` and `root/latest`."""
    directory = root / f"global_step{step}"
    directory.mkdir(parents=True)
    with borrowed_names(
        deepspeed__runtime__fp16__loss_scaler__LossScaler=LossScaler,
        deepspeed__runtime__zero__config__ZeroStageEnum=ZeroStageEnum,
        deepspeed__utils__tensor_fragment__fragment_address=FragmentAddress,
    ):
        (_write_stage_3 if stage == 3 else _write_stage_2)(directory, model, optimizer, stage, ranks, step)
    (root / "latest").write_text(directory.name)
    return directory


def names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _shared(model: nn.Module) -> dict[str, str]:
    """Other names of parameters that have one already."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def _model_states(model: nn.Module, groups: list[list[str]], module: dict[str, torch.Tensor], step: int) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    return {
        "module": module,
        "buffer_names": [name for name, _ in model.named_buffers()],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, parameters[name].shape) for name in names) for names in groups],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": _shared(model),
        "lr_scheduler": {"last_epoch": step},
        "global_steps": step,
        "ds_config": {"train_batch_size": 8},
        "ds_version": "0.17.5",
        "note": {"user": "kept"},
    }


def _hyper(optimizer: torch.optim.Optimizer, counts: Sequence[int]) -> list[dict[str, Any]]:
    first, groups = 0, []
    for group, count in zip(optimizer.param_groups, counts, strict=True):
        kept = {key: value for key, value in group.items() if key != "params"}
        groups.append({**kept, "params": list(range(first, first + count))})
        first += count
    return groups


def _write_stage_2(directory: Path, model: nn.Module, optimizer: Any, stage: int, ranks: int, step: int) -> None:
    parameters, groups = dict(model.named_parameters()), names_by_group(model, optimizer)
    torch.save(_model_states(model, groups, dict(model.state_dict()), step), directory / "mp_rank_00_model_states.pt")

    def flat(names: list[str], pick: Any) -> torch.Tensor:
        joined = torch.cat([pick(parameters[name]).detach().float().reshape(-1) for name in names])
        return nn.functional.pad(joined, (0, -joined.numel() % (2 * ranks)))

    states = ("exp_avg", "exp_avg_sq")
    for rank in range(ranks):
        masters, base, paddings = [], {}, []
        for number, names in enumerate(groups):
            whole = flat(names, lambda parameter: parameter)
            padding = whole.numel() - sum(parameters[name].numel() for name in names)
            share = whole.numel() // ranks
            paddings.append(padding if rank == ranks - 1 else 0)
            mine = slice(rank * share, (rank + 1) * share)
            masters.append(whole[mine][: share - paddings[-1]].clone())  # DeepSpeed takes the padding off here, and only here
            base[number] = {key: flat(names, lambda p, key=key: optimizer.state[p][key])[mine].clone() for key in states}
            base[number]["step"] = optimizer.state[parameters[names[0]]]["step"].clone()
        document = {
            "loss_scaler": LossScaler(),
            "dynamic_loss_scale": False,
            "overflow": False,
            "clip_grad": 0.0,
            "base_optimizer_state": {"state": base, "param_groups": _hyper(optimizer, [1] * len(groups))},
            "single_partition_of_fp32_groups": masters,
            "zero_stage": ZeroStageEnum(stage),
            "group_paddings": paddings,
            "partition_count": [ranks] * len(groups),
            "ds_version": "0.17.5",
            "param_slice_mappings": [OrderedDict({groups[0][0]: FragmentAddress(3, 0)})],
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": document, "ds_config": {}, "ds_version": "0.17.5"}, directory / name)


def _write_stage_3(directory: Path, model: nn.Module, optimizer: Any, stage: int, ranks: int, step: int) -> None:
    parameters, groups = dict(model.named_parameters()), names_by_group(model, optimizer)
    # Sub-groups: at most two parameters each, never across parameter groups.
    sub_groups = [names[first : first + 2] for names in groups for first in range(0, len(names), 2)]

    def part(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        share = -(-tensor.numel() // ranks)
        mine = tensor.detach().float().reshape(-1)[rank * share : (rank + 1) * share]
        return nn.functional.pad(mine, (0, share - mine.numel()))

    for rank in range(ranks):

        def flat(names: list[str], pick: Any, rank: int = rank) -> torch.Tensor:
            return torch.cat([part(pick(parameters[name]), rank) for name in names])

        base = {
            number: {
                **{key: flat(names, lambda p, key=key: optimizer.state[p][key]) for key in ("exp_avg", "exp_avg_sq")},
                "step": optimizer.state[parameters[names[0]]]["step"].clone(),
            }
            for number, names in enumerate(sub_groups)
        }
        counts = [-(-len(names) // 2) for names in groups]
        document = {
            "zero_stage": ZeroStageEnum(stage),
            "loss_scaler": LossScaler(),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": ranks,
            "optimizer_state_dict": {"state": base, "param_groups": _hyper(optimizer, counts)},
            "fp32_flat_groups": [flat(names, lambda p: p) for names in sub_groups],
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": document, "ds_version": "0.17.5"}, directory / f"{name}_optim_states.pt")
        module = {
            key: value if key in dict(model.named_buffers()) else value.new_empty(0)
            for key, value in model.state_dict().items()
        }
        states = _model_states(model, groups, module, step)
        frozen = {key: value for key, value in parameters.items() if not value.requires_grad}
        states["frozen_param_shapes"] = OrderedDict((key, value.shape) for key, value in frozen.items())
        states["frozen_param_fragments"] = OrderedDict((key, part(value, rank)) for key, value in frozen.items())
        torch.save(states, directory / f"{name}_model_states.pt")
