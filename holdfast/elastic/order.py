"""The order in which samples are used: a function of seed, epoch and place, and of nothing else.

Nobody stores it and nobody agrees on it. Any rank of any world can say which sample stands at a place, and where a sample
stands, in constant memory, however large the data set is. The stream runs through the epochs without a gap: position p of a data
set of n samples is place p % n of epoch p // n.

A keyed Feistel network permutes the smallest power of four that holds the data set; a value that falls outside is sent through
again until it is inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, §3). Both ways
are exact permutations by construction.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from holdfast.errors import ConfigError

NAME = "feistel-8"
"""Kept in every state: a later release with another order refuses to go on in the middle of this one."""

ROUNDS = 8
LARGEST = 2**62

Ids: TypeAlias = npt.NDArray[np.int64]
_Words: TypeAlias = npt.NDArray[np.uint64]


def samples_at(positions: npt.ArrayLike, size: int, seed: int, *, shuffle: bool = True) -> Ids:
    """The samples at these positions of the stream, for a data set of `size` samples."""
    wanted = np.atleast_1d(np.asarray(positions, np.int64))
    epochs, places = np.divmod(wanted, check_size(size))
    if not shuffle:
        return places
    out = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _walk(places[here], size, _keys(seed, int(epoch)))
    return out


def position_of(sample: int, epoch: int, size: int, seed: int, *, shuffle: bool = True) -> int:
    """Where in the stream `sample` is used in `epoch`."""
    if not 0 <= sample < check_size(size):
        raise ConfigError(f"sample {sample} is none of a data set of {size}")
    place = np.array([sample], np.int64)
    if shuffle:
        place = _walk(place, size, _keys(seed, epoch), backwards=True)
    return epoch * size + int(place[0])


def check_size(size: int) -> int:
    if not 0 < size <= LARGEST:
        raise ConfigError(f"a data set of {size} samples has no order; 1 … 2^62 samples are accepted")
    return size


def _walk(values: Ids, size: int, keys: tuple[int, ...], *, backwards: bool = False) -> Ids:
    """Through the network, and again for as long as a value lies outside; those that are inside are never touched twice."""
    half = max(1, -(-(size - 1).bit_length() // 2))
    out = _network(values.astype(np.uint64), half, keys, backwards)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _network(out[outside], half, keys, backwards)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def _network(values: _Words, half: int, keys: tuple[int, ...], backwards: bool) -> _Words:
    width, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> width, values & mask
    for key in reversed(keys) if backwards else keys:
        if backwards:
            left, right = right ^ (_mixed(left, key) & mask), left
        else:
            left, right = right, left ^ (_mixed(right, key) & mask)
    return (left << width) | right


def _mixed(words: _Words, key: int) -> _Words:
    """Every bit of the result depends on every bit of the word and of the key (the finalizer of MurmurHash3)."""
    mixed = words ^ np.uint64(key)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(33))


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{NAME}/{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))
