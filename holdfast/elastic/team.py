"""The ranks of a job deciding together, at the start and never while it trains.

Whatever one rank finds wrong, every rank hears of, so that all stop with a clear error and none waits for one that has gone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from holdfast.environment import Environment
from holdfast.errors import ClusterError, ConfigError, HoldfastError

T = TypeVar("T")

SHORT_NBYTES = 8 << 10
"""What ranks tell each other fits in here nearly always; then one collective does."""

_SIZE = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank's part of a common action came to: a plain value, or an error in words (`node`: whom it blames)."""

    value: Any = None
    error: str = ""
    message: str = ""
    node: int | None = None


class Team:
    """All ranks of the default process group, or this process alone. Raises ConfigError where a group is lacking."""

    def __init__(self, env: Environment) -> None:
        self.grouped = dist.is_available() and dist.is_initialized()
        if env.world > 1 and not self.grouped:
            raise ConfigError(
                f"this is rank {env.rank} of {env.world} and torch.distributed has no process group; call "
                "torch.distributed.init_process_group() before protect()"
            )
        self.rank = dist.get_rank() if self.grouped else 0
        self.world = dist.get_world_size() if self.grouped else 1

    def gather(self, data: bytes, *, room_nbytes: int = SHORT_NBYTES) -> list[bytes]:
        """What every rank gave, in the order of ranks. Blocks until all have.

        `room_nbytes`, the same on all ranks, is what fits into one collective; what is longer takes a second.
        """
        if self.world == 1:
            return [data]
        first = self._all_gather(_SIZE.pack(len(data)) + data[:room_nbytes], _SIZE.size + room_nbytes)
        sizes = [_SIZE.unpack_from(part)[0] for part in first]
        if max(sizes) <= room_nbytes:
            return [part[_SIZE.size : _SIZE.size + size] for part, size in zip(first, sizes, strict=True)]
        return [part[:size] for part, size in zip(self._all_gather(data, max(sizes)), sizes, strict=True)]

    def _all_gather(self, data: bytes, nbytes: int) -> list[bytes]:
        """Every rank's bytes, with zeros up to `nbytes`."""
        mine = torch.frombuffer(bytearray(data.ljust(nbytes, b"\0")), dtype=torch.uint8).to(_device())
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        return [part.cpu().numpy().tobytes() for part in parts]

    def attempt(self, action: Callable[[], Any], *, room_nbytes: int = SHORT_NBYTES) -> list[Outcome]:
        """Every rank does its part; all learn how each fared. Values have to be plain JSON, or bytes."""
        try:
            mine: dict[str, Any] = {"value": action()}
        except (HoldfastError, OSError) as error:
            self._error: BaseException | None = error
            mine = {"error": type(error).__name__, "message": str(error), "node": getattr(error, "node", None)}
        else:
            self._error = None
        return [_outcome(item) for item in self.gather(_packed(mine), room_nbytes=room_nbytes)]

    def all(self, action: Callable[[], Any], *, room_nbytes: int = SHORT_NBYTES) -> list[Any]:
        """Every rank's value; when one failed, it raises its own error and the others say whose it was."""
        return self.settle(self.attempt(action, room_nbytes=room_nbytes))

    def settle(self, outcomes: list[Outcome]) -> list[Any]:
        """The values of the attempt just made, or its errors raised."""
        if self._error is not None:
            raise self._error
        for rank, outcome in enumerate(outcomes):
            if outcome.error:
                raise ClusterError(f"rank {rank} stopped the start with {outcome.error}: {outcome.message}")
        return [outcome.value for outcome in outcomes]


def _packed(fared: dict[str, Any]) -> bytes:
    """Bytes as they are behind a B, all else as JSON, which begins with a brace."""
    value = fared.get("value")
    return b"B" + value if isinstance(value, bytes) else json.dumps(fared).encode()


def _outcome(data: bytes) -> Outcome:
    return Outcome(data[1:]) if data[:1] == b"B" else Outcome(**json.loads(data))


def _device() -> torch.device:
    backend = str(dist.get_backend_config()) if hasattr(dist, "get_backend_config") else str(dist.get_backend())
    on_cpu = "cpu" in backend or "gloo" in backend
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
