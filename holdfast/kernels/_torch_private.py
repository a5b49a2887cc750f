"""The private torch names this package leans on, in one place. Tested on torch 2.11 and 2.13.

`tests/kernels/test_torch_private.py` calls each of them and fails loudly when a release moves one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

TESTED_ON = ("2.11", "2.13")


def without_torch_function() -> Any:
    """A context in which no TorchFunctionMode sees what we do to the tensors we were handed."""
    return torch._C.DisableTorchFunction()


def checkpoint_is_saving() -> bool:
    """True inside a region of torch.utils.checkpoint: its hooks are on top, and others pushed now would disarm them."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return bool(hooks) and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


class StorageWatch:
    """A weak reference to a storage. While it lives, no new storage gets the same `key`, even after the old one is freed."""

    __slots__ = ("_weak", "key")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.key = storage_key(storage)

    def get(self) -> torch.UntypedStorage | None:
        """The storage, or None once it has been freed."""
        return torch.UntypedStorage._new_with_weak_ptr(self._weak.cdata)


def storage_key(storage: torch.UntypedStorage) -> int:
    """An integer equal for two handles of one storage, and unique among the storages alive or watched."""
    return int(storage._cdata)


def compiled_saved_node() -> torch.fx.Node | None:
    """The forward graph's node whose value AOTAutograd is asking a hook about, or None outside of that moment."""
    from torch._functorch._aot_autograd import graph_compile

    info = graph_compile._get_saved_tensor_hook_context()
    return None if info is None else info["_node"]
