"""What every torchrun agent loads from us: the cure for restarts that meet the dead attempt's addresses, and a rendezvous.

torch 2.13's agent keeps one store for the life of a job and no longer separates attempts by key, so restarted workers read the
addresses of their predecessors and fail with "connection refused" until all restarts are used up. Agents load the entry points
of `torchrun.handlers` when they start; loading this module turns the sharing off, so that each attempt gets a store of its own.

`--rdzv-backend holdfast` is c10d's rendezvous on one endpoint, and one that survives the loss of any of its hosts on several
(`rendezvous/`).
"""

from __future__ import annotations

import os
from typing import Any

# Read by the agent when it sets up a rendezvous, so setting it here is in time. A user's own choice is left alone.
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def rendezvous_handler() -> Any:
    """The creator that torchrun registers for `--rdzv-backend holdfast`."""

    def create(parameters: Any) -> Any:
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

        from holdfast.elastic.rendezvous import replicated

        if "," in (parameters.endpoint or ""):
            return replicated.create(parameters)
        _, store = create_backend(parameters)
        return create_handler(store, replicated.Backend(store, parameters.run_id), parameters)

    return create
