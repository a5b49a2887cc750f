"""What a spare does before it is needed: it takes an optimizer's step with throw-away tensors, and keeps what torch learned by it.

torch works out how an operation on sharded tensors is to be done when it meets it for the first time, once for each shape; with
FSDP2 that took half of the first step after a recovery (four ranks on two cores). Nothing of the script's is touched.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

LARGEST_NBYTES = 64 << 20
"""A rank's part of a parameter that is larger is left out: it takes its time at any rate, and memory for a few copies."""


def rehearse(optimizers: Iterable[Optimizer]) -> None:
    """Take a step with each optimizer of torch's own; one of the user's might do more in `step` than is seen from here."""
    for optimizer in optimizers:
        if type(optimizer).__module__.startswith("torch.optim."):
            try:
                _rehearse(optimizer)
            except Exception as error:  # whatever it is, the first step will say it, or do without
                logger.info("a step of %s could not be rehearsed: %s", type(optimizer).__name__, error)


def _rehearse(optimizer: Optimizer) -> None:
    groups = [{**group, "params": list(_stand_ins(group["params"]))} for group in optimizer.param_groups]
    groups = [group for group in groups if group["params"]]
    if not groups:
        return
    kind: Any = type(optimizer)
    twin = kind.__new__(kind)
    twin.__setstate__({"defaults": dict(optimizer.defaults), "state": defaultdict(dict), "param_groups": groups})
    # Beneath the wrapper that calls hooks, which may be the script's.
    getattr(kind.step, "__wrapped__", kind.step)(twin)


def _stand_ins(params: Iterable[torch.Tensor]) -> Iterator[torch.nn.Parameter]:
    """One for each way in which a parameter is cut and shaped."""
    seen = set()
    for param in params:
        if isinstance(param, DTensor) and param.to_local().nbytes <= LARGEST_NBYTES:
            look = (param.shape, param.stride(), param.dtype, param.placements, param.device_mesh)
            if look not in seen:
                seen.add(look)
                stand_in = torch.nn.Parameter(torch.zeros_like(param.detach()))
                stand_in.grad = torch.zeros_like(stand_in)
                yield stand_in
