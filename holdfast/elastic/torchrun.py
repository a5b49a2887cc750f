"""What every torchrun agent loads from us by itself: the cure for restarts that meet the dead attempt's addresses.

torch 2.13's agent keeps one store for the life of a job and no longer separates attempts by key, so restarted workers read the
addresses of their predecessors and fail with "connection refused" until all restarts are used up. Agents load the entry points of
`torchrun.handlers` when they start; loading this module turns the sharing off, so that each attempt gets a store of its own.
"""

from __future__ import annotations

import os
from typing import Any

# Read by the agent when it sets up a rendezvous, so setting it here is in time. A user's own choice is left alone.
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def rendezvous_handler() -> Any:
    """The creator that torchrun registers for `--rdzv-backend holdfast`: c10d's own, with the cure applied."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    def create(parameters: Any) -> Any:
        backend, store = create_backend(parameters)
        return create_handler(store, backend, parameters)

    return create
