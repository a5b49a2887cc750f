"""Keys and values of a long sequence, chunk by chunk: the newest exact, the past in few bits.

K and V of past chunks are read again for every later chunk but never written, and each later chunk rebuilds its attention from
what it reads. So their error does not meet an exact logsumexp, and int4 costs 7 to 9 times less gradient error here than
quantizing the live chunk would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from holdfast.errors import ConfigError
from holdfast.kernels.activations.host import HostPacked, HostTier
from holdfast.kernels.quant import KIVI_KEY4, KIVI_VALUE4, Backend, Packed, QuantSpec, dequantize, quantize
from holdfast.kernels.sequences.gear import GearPacked, GearSpec, dequantize_gear, quantize_gear
from holdfast.kernels.sequences.reorder import channel_order, reordered, restored

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSpec:
    """How past chunks are stored. None keeps them exact. Default: KIVI's layout (arXiv:2402.02750) at int4, keys in groups of
    64 tokens per channel, values per token. `gear` adds a low-rank and outlier correction. `reorder` sorts the channels of each
    head by size before keys are packed: for block formats along channels, such as MXINT8 with `axis=(-1,)`, whose blocks would
    mix large channels with small ones. `host` keeps all of it in host memory."""

    key: QuantSpec | None = KIVI_KEY4
    value: QuantSpec | None = KIVI_VALUE4
    gear: GearSpec | None = None
    reorder: bool = False
    host: bool = False

    def __post_init__(self) -> None:
        if self.gear is not None and (self.key is None or self.value is None):
            raise ConfigError("gear corrects quantized keys and values; it needs key and value specs")
        if self.gear is not None and self.host:
            raise ConfigError("gear and host cannot be combined")
        if self.reorder and (self.key is None or self.key.axis != (-1,) or self.key.block is None):
            raise ConfigError(
                f"reorder sorts channels for blocks along them: the key spec needs axis=(-1,) and a block; got {self.key}"
            )


@dataclass(frozen=True, slots=True)
class Reordered:
    """Keys packed with their channels in another order, (heads, channels) int16."""

    packed: Packed | HostPacked | GearPacked
    order: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.order.nbytes


Stored = torch.Tensor | Packed | HostPacked | GearPacked | Reordered


class ChunkKVStore:
    """K and V (batch, heads, tokens, channels) of every layer and chunk. A layer's chunks are appended in order.

    The newest chunk of a layer stays exact until a later one reads it or is appended. `past(layer, chunk)` returns
    what lies before a chunk, as one tensor each for K and V.
    """

    def __init__(self, spec: KVSpec | None = None, *, backend: Backend = "auto") -> None:
        self.spec = spec or KVSpec()
        self._backend = backend
        self._chunks: dict[Hashable, list[tuple[Stored, Stored]]] = {}
        self._host = HostTier() if self.spec.host else None

    def append(self, layer: Hashable, key: torch.Tensor, value: torch.Tensor) -> None:
        """Adds the next chunk of `layer`, exact, and packs the one before it. Keeps references to the two tensors."""
        if key.ndim != 4 or value.shape[:3] != key.shape[:3]:
            raise ConfigError(f"K and V are (batch, heads, tokens, channels); got {tuple(key.shape)} and {tuple(value.shape)}")
        chunks = self._chunks.setdefault(layer, [])
        if chunks:
            chunks[-1] = self._pack_pair(chunks[-1])
        chunks.append((key.detach(), value.detach()))

    def seal(self) -> None:
        """Packs the newest chunks too: nothing will read them as the newest again."""
        for chunks in self._chunks.values():
            if chunks:
                chunks[-1] = self._pack_pair(chunks[-1])

    def past(self, layer: Hashable, chunk: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V of the chunks before number `chunk`, joined along tokens; None if there are none."""
        chunks = self._chunks.get(layer, [])
        pairs = [self._pack_pair(pair) for pair in chunks[:chunk]]
        if not pairs:
            return None
        chunks[:chunk] = pairs  # packed before it is first read: forward and backward then see the same past
        keys = torch.cat([self._restore(k) for k, _ in pairs], dim=2)
        return keys, torch.cat([self._restore(v) for _, v in pairs], dim=2)

    def drop(self, chunk: int) -> None:
        """Forgets chunk `chunk` of every layer and all after it; backward has passed them."""
        for chunks in self._chunks.values():
            del chunks[chunk:]

    def chunks(self, layer: Hashable) -> int:
        """How many chunks of `layer` are stored."""
        return len(self._chunks.get(layer, []))

    @property
    def nbytes(self) -> int:
        """Bytes of all stored chunks, scales included."""
        return sum(part.nbytes for chunks in self._chunks.values() for pair in chunks for part in pair)

    def _pack_pair(self, pair: tuple[Stored, Stored]) -> tuple[Stored, Stored]:
        key, value = pair
        if isinstance(key, torch.Tensor) and self.spec.key is not None:
            key = self._pack_key(key, self.spec.key)
        if isinstance(value, torch.Tensor) and self.spec.value is not None:
            value = self._pack(value, self.spec.value)
        return key, value

    def _pack_key(self, x: torch.Tensor, spec: QuantSpec) -> Stored:
        if not self.spec.reorder:
            return self._pack(x, spec)
        order = channel_order(x)
        return Reordered(self._pack(reordered(x, order), spec), order)

    def _pack(self, x: torch.Tensor, spec: QuantSpec) -> Packed | HostPacked | GearPacked:
        if self.spec.gear is not None:
            return quantize_gear(x, spec, self.spec.gear)
        packed = quantize(x, spec, backend=self._backend)
        return packed if self._host is None else self._host.put(packed)

    def _restore(self, x: Stored) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return x
        if isinstance(x, Reordered):
            return restored(self._restore(x.packed), x.order)
        if isinstance(x, GearPacked):
            return dequantize_gear(x)
        if isinstance(x, HostPacked):
            assert self._host is not None
            fetched = self._host.fetch(x)
            assert isinstance(fetched, Packed)  # nothing else was put there
            x = fetched
        return dequantize(x, backend=self._backend)
