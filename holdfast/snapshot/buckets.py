"""How DDP cuts the gradients into buckets, kept with a snapshot, so that a restored run adds numbers up in the same order.

An all-reduce over more than two ranks sums every element in an order that depends on its place in the buffer. DDP reduces its first
step in one bucket and arranges its buckets anew after that, by the order in which gradients arrived. A process that starts again
would therefore reduce its first step in another order than a run that was never interrupted, and differ in the last bits.

Here are all the private names of DDP that holdfast touches, tested with torch 2.11 and 2.13.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

Buckets = list[list[int]]
"""Parameter numbers by bucket, in the order of reduction."""


def replicated(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """Every DDP module in `modules`, in the order of their trees."""
    return [part for module in modules for part in module.modules() if isinstance(part, DistributedDataParallel)]


def buckets_of(ddp: Any) -> Buckets | None:
    """How the buckets are arranged; None while they are still the ones that DDP was built with."""
    known: Buckets | None = getattr(ddp, "_holdfast_buckets", None)
    text = str(ddp._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices", ""))
    return [[int(number) for number in bucket.split()] for bucket in text.split(",")] if text else known


def arrange(ddp: Any, buckets: Buckets | None) -> None:
    """Give `ddp` a fresh reducer with these buckets (None: the ones a new DDP has), as if no backward had ever begun.

    Needs no communication. Every rank has to do it, or none.
    """
    if ddp.mixed_precision is not None:
        logger.warning("DDP with mixed_precision keeps its own buckets; a restored step may differ in the last bits")
        return
    parameters, expect_sparse = ddp._build_params_for_reducer()
    if buckets is not None and sorted(number for bucket in buckets for number in bucket) != list(range(len(parameters))):
        logger.warning("the snapshot's DDP buckets are of another set of parameters and are not used")
        buckets = None
    with _assigned(buckets, ddp.bucket_bytes_cap):
        ddp._ddp_init_helper(parameters, expect_sparse, ddp._build_debug_param_to_name_mapping(parameters), ddp.static_graph)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
    for hook, state in ddp._comm_hooks:
        dist._register_comm_hook(ddp.reducer, state, hook)  # type: ignore[attr-defined] # private, as all of this
    ddp._holdfast_buckets = buckets


@contextmanager
def _assigned(buckets: Buckets | None, cap_nbytes: int) -> Iterator[None]:
    """While DDP builds its reducer, it is told this assignment instead of computing one."""
    if buckets is None:
        yield
        return
    name = "_compute_bucket_assignment_by_size"
    compute = getattr(dist, name)

    def told(*_: Any) -> tuple[Buckets, list[int]]:
        return buckets[::-1], [cap_nbytes] * len(buckets)  # DDP reverses both

    setattr(dist, name, told)
    try:
        yield
    finally:
        setattr(dist, name, compute)
