"""Is this tensor a weight in disguise?

Autograd saves weights next to activations: as transposed views, as the bfloat16 copies that autocast makes, as FSDP's unsharded
views. Packing one costs memory instead of saving it, quantizes the weights, and under FSDP keeps alive what resharding was to
free. No single test finds them all, so all are asked.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch

from holdfast.kernels._torch_private import storage_key

# Steps from a weight to what an operation saves of it: views and casts, each with one input.
_VIEWS_AND_CASTS = (
    "T", "Transpose", "View", "Permute", "Expand", "ToCopy", "AsStrided", "UnsafeView", "Slice", "Select", "Unsqueeze",
    "Squeeze", "Clone", "Split", "SplitWithSizes", "Unbind", "Alias", "ReshapeAlias", "Narrow", "Movedim", "Detach", "Chunk",
)  # fmt: skip
_LONGEST_CHAIN = 16


def model_storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Keys of the storages behind parameters and buffers, DTensor shards left out (what forward uses is elsewhere)."""
    return {storage_key(t.untyped_storage()) for t in tensors if type(t).__torch_dispatch__ is _PLAIN}


def is_weight(t: torch.Tensor, known_storages: Container[int]) -> bool:
    """True if `t` is a parameter or buffer, a view of one, or a cast of one."""
    if isinstance(t, (torch.nn.Parameter, torch.nn.Buffer)):
        return True
    if isinstance(t._base, torch.nn.Parameter):
        return True  # FSDP2's unsharded weights: neither storage nor address is that of model.parameters()
    if storage_key(t.untyped_storage()) in known_storages:
        return True
    return _descends_from_parameter(t)


def _descends_from_parameter(t: torch.Tensor) -> bool:
    node: Any = t.grad_fn
    for _ in range(_LONGEST_CHAIN):
        if node is None:
            return False
        name = node.name().removesuffix(">").split("Backward")[0].split("::")[-1]
        if name == "AccumulateGrad" or hasattr(node, "variable"):
            return isinstance(node.variable, torch.nn.Parameter)
        if name not in _VIEWS_AND_CASTS:
            return False
        node = node.next_functions[0][0] if node.next_functions else None
    return False


_PLAIN = torch.Tensor.__torch_dispatch__
