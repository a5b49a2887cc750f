"""Reed-Solomon over whole buffers: k fragments of data, m of parity, any k of the k+m are enough.

Fragments are anything with a buffer (numpy arrays, mappings, bytearrays; CPU tensors through `.numpy()`) and all of one length.
They are read where they are and written where the caller says: nothing is copied and nothing is allocated per byte. Every
argument is checked before the first byte is written, so a call that raises has changed nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from holdfast.coding.backend import Backend, choose
from holdfast.coding.buffers import LARGEST_CALL, check_length, check_span, is_whole, readable, refuse_overlap, region, writable
from holdfast.coding.claims import Claims
from holdfast.coding.field import MAX_FRAGMENTS, decode_matrix, parity_matrix
from holdfast.coding.scrub import DamagedChunk, ScrubReport, locate, syndrome_matrix
from holdfast.errors import ConfigError, MissingData

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Buffer

    from holdfast.coding.backend import Kernel
    from holdfast.coding.buffers import Region
    from holdfast.coding.field import Bytes

T = TypeVar("T")

CHUNK = 4 << 20  # small enough for the cache to help, large enough that Python's part is lost in it (measured: 1-4 MiB)
DELTA = 512 << 10  # old XOR new is made in pieces of this size, still in the cache when they are used

MOST_THREADS = 256

_changing = Claims()


class ErasureCode:
    """Any k of k+m fragments give back all others. Fragments 0 … k-1 are the data, k … k+m-1 the parities.

    The code is systematic (data fragments are the data) and the same on every back end, byte for byte. A byte column is a
    codeword of `reedsolo.RSCodec(m)`; with m = 1 the parity is the XOR of the data; the XOR of all fragments is always zero.
    Methods may be called from many threads. They release the GIL; `threads` spreads one call over several.
    """

    def __init__(self, k: int, m: int, backend: str | Backend = "auto") -> None:
        if not (is_whole(k, 1, MAX_FRAGMENTS) and is_whole(m, 0, MAX_FRAGMENTS - k)):
            raise ConfigError(f"need k >= 1, m >= 0 and k + m <= {MAX_FRAGMENTS}; got k={k!r}, m={m!r}")
        self.k, self.m, self.n = int(k), int(m), int(k) + int(m)
        self._backend = choose(backend) if isinstance(backend, str) else backend

    def __repr__(self) -> str:
        return f"ErasureCode(k={self.k}, m={self.m}, backend={self.backend!r})"

    @property
    def backend(self) -> str:
        """The name of the code that does the arithmetic: "isal", "numba" or "numpy"."""
        return self._backend.name

    @property
    def parity_matrix(self) -> Bytes:
        """m × k: parities = matrix · data."""
        return parity_matrix(self.k, self.m)

    @property
    def generator_matrix(self) -> Bytes:
        """(k+m) × k: fragments = matrix · data. Its first k rows are the identity."""
        return np.concatenate([np.eye(self.k, dtype=np.uint8), self.parity_matrix])

    # -- making parity ---------------------------------------------------------------------------------------------------

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer], *, chunk_size: int = CHUNK, threads: int = 1) -> None:
        """The parities hold the parity of the data; what they held before is overwritten."""
        sources, targets = self._data(data), self._parity(parity)
        self._run(self._encoder(), sources, targets, sources[0].size, chunk_size, threads)

    def encode_chunk(self, data: Sequence[Buffer], parity: Sequence[Buffer], offset: int, length: int) -> None:
        """The same for bytes [offset, offset + length) of every fragment: for data that arrives piece by piece."""
        sources, targets = self._data(data), self._parity(parity)
        check_length(sources + targets, sources[0].size)
        check_span(offset, length, sources[0].size)
        sources, targets = _cut(sources, offset, length), _cut(targets, offset, length)
        self._run(self._encoder(), sources, targets, length, CHUNK, 1)

    def accumulate(self, parity: Sequence[Buffer], index: int, chunk: Buffer, offset: int = 0) -> None:
        """The part of data fragment `index` that starts at `offset` is added to the parities.

        Starting from zeroed parities, adding every data fragment once, in any order, is the same as `encode`, at about half
        its speed: for stragglers and for passing partial sums from node to node. Adding a fragment twice takes it out again.
        """
        self._check_index(index)
        source = readable(chunk, "chunk")
        targets = self._parity_at(parity, offset, source.size)
        refuse_overlap(targets, [source])
        with _changing.hold(targets):
            self._add(index, source, targets)

    def update(
        self,
        parity: Sequence[Buffer],
        index: int,
        *,
        old: Buffer | None = None,
        new: Buffer | None = None,
        delta: Buffer | None = None,
        offset: int = 0,
    ) -> None:
        """The parities follow a change of data fragment `index` from `old` to `new`, or by `delta`, which is old XOR new.

        With `offset` only the part of the fragment that starts there has changed. Giving the delta is twice as fast.
        """
        if delta is not None and old is None and new is None:
            return self.accumulate(parity, index, delta, offset)
        if delta is not None or old is None or new is None:
            raise ConfigError("update takes either old= and new=, or delta=")
        self._check_index(index)
        before, after = readable(old, "old"), readable(new, "new")
        check_length([after], before.size)
        targets = self._parity_at(parity, offset, before.size)
        refuse_overlap(targets, [before, after])
        scratch = region(np.empty(min(DELTA, before.size), np.uint8))
        with _changing.hold(targets):
            for start in range(0, before.size, DELTA):
                stop = min(start + DELTA, before.size)
                change = scratch.cut(0, stop - start)
                np.bitwise_xor(before.array[start:stop], after.array[start:stop], out=change.array)
                self._add(index, change, _cut(targets, start, stop - start))
        return None

    # -- using parity ----------------------------------------------------------------------------------------------------

    def reconstruct(
        self,
        fragments: Mapping[int, Buffer],
        out: Mapping[int, Buffer],
        *,
        chunk_size: int = CHUNK,
        threads: int = 1,
    ) -> None:
        """The buffers in `out` hold the fragments of those numbers, rebuilt from any k others.

        Only what is in `out` is rebuilt, and only k of the given fragments are read. They are believed: check them first.
        `MissingData` if fewer than k are given.
        """
        sources = self._numbered(fragments, readable, "fragment")
        targets = self._numbered(out, writable, "out")
        if both := sorted(set(sources) & set(targets)):
            raise ConfigError(f"fragments {both} are given and also asked for")
        if len(sources) < self.k:
            raise MissingData(
                f"{len(sources)} fragments are left and {self.k} are needed to rebuild {sorted(targets)} (k={self.k}, "
                f"m={self.m}); here: {sorted(sources)}. Fall back to an older snapshot or a checkpoint"
            )
        if not targets:
            return
        have, want = self._chosen(tuple(sorted(sources))), tuple(sorted(targets))
        kernel = _decoder(self._backend, self.k, self.m, have, want)
        length = sources[have[0]].size
        check_length(sources.values(), length)
        refuse_overlap(list(targets.values()), list(sources.values()))
        self._run(kernel, [sources[j] for j in have], [targets[j] for j in want], length, chunk_size, threads)

    def syndromes(self, fragments: Mapping[int, Buffer], offset: int = 0, length: int | None = None) -> Bytes:
        """One row per spare fragment, all zero exactly where the fragments agree; see `scrub` for what it means."""
        regions = self._scrubbable(fragments)
        size = next(iter(regions.values())).size
        length = size - offset if length is None else length
        check_span(offset, length, size)
        return self._syndromes({j: each.cut(offset, offset + length) for j, each in regions.items()}, length)

    def scrub(self, fragments: Mapping[int, Buffer], *, chunk_size: int = 1 << 20, threads: int = 1) -> ScrubReport:
        """Says which chunks of which fragments contradict the others, from the bytes alone. Changes nothing.

        At least k+1 fragments are needed. With s = len(fragments) - k spare ones, up to s // 2 bad fragments per byte column
        are named and up to s are noticed.
        """
        regions = self._scrubbable(fragments)
        length = next(iter(regions.values())).size

        def look(start: int, stop: int) -> DamagedChunk | None:
            pieces = {j: each.cut(start, stop) for j, each in regions.items()}
            syndromes = self._syndromes(pieces, stop - start)
            if not syndromes.max():
                return None
            columns, culprits = locate(self.k, self.m, {j: each.array for j, each in pieces.items()}, syndromes)
            return DamagedChunk(start, stop - start, columns, culprits)

        found = _spread(look, length, chunk_size, threads)
        return ScrubReport(length, tuple(chunk for chunk in found if chunk))

    # -- helpers -----------------------------------------------------------------------------------------------------------

    def _data(self, data: Sequence[Buffer]) -> list[Region]:
        if len(data) != self.k:
            raise ConfigError(f"{len(data)} data fragments given, k is {self.k}")
        return [readable(buffer, f"data {j}") for j, buffer in enumerate(data)]

    def _parity(self, parity: Sequence[Buffer]) -> list[Region]:
        if len(parity) != self.m:
            raise ConfigError(f"{len(parity)} parities given, m is {self.m}")
        return [writable(buffer, f"parity {r}") for r, buffer in enumerate(parity)]

    def _parity_at(self, parity: Sequence[Buffer], offset: int, length: int) -> list[Region]:
        targets = self._parity(parity)
        if targets:
            check_length(targets, targets[0].size)
            check_span(offset, length, targets[0].size)
        return _cut(targets, offset, length)

    def _numbered(self, buffers: Mapping[int, Buffer], view: Callable[[Buffer, str], Region], what: str) -> dict[int, Region]:
        if wrong := [j for j in buffers if not is_whole(j, 0, self.n - 1)]:
            raise ConfigError(f"{what} numbers {wrong} are not among 0 … {self.n - 1} (k={self.k}, m={self.m})")
        return {j: view(buffer, f"{what} {j}") for j, buffer in buffers.items()}

    def _scrubbable(self, fragments: Mapping[int, Buffer]) -> dict[int, Region]:
        regions = self._numbered(fragments, readable, "fragment")
        if len(regions) <= self.k:
            raise ConfigError(f"{len(regions)} fragments cannot contradict each other; give at least {self.k + 1} (k={self.k})")
        regions = {j: regions[j] for j in sorted(regions)}
        check_length(regions.values(), next(iter(regions.values())).size)
        return regions

    def _check_index(self, index: int) -> None:
        if not is_whole(index, 0, self.k - 1):
            raise ConfigError(f"data fragment {index!r} is not among 0 … {self.k - 1}")

    def _encoder(self) -> Kernel:
        return _decoder(self._backend, self.k, self.m, tuple(range(self.k)), tuple(range(self.k, self.n)))

    def _chosen(self, here: tuple[int, ...]) -> tuple[int, ...]:
        """Which fragments to read: the first k. A back end that multiplies slowly prefers all n-1 and a plain XOR."""
        if len(here) == self.n - 1 and self.backend != "isal":
            return here
        return here[: self.k]

    def _add(self, index: int, source: Region, targets: list[Region]) -> None:
        if not targets:
            return
        kernel = self._encoder()
        for start in range(0, source.size, CHUNK):
            stop = min(start + CHUNK, source.size)
            kernel.add(index, source.cut(start, stop), _cut(targets, start, stop - start))

    def _syndromes(self, fragments: Mapping[int, Region], length: int) -> Bytes:
        out = np.empty((len(fragments) - self.k, length), np.uint8)
        kernel = _checker(self._backend, self.k, self.m, tuple(fragments))
        self._run(kernel, list(fragments.values()), [region(row) for row in out], length, CHUNK, 1)
        return out

    def _run(
        self, kernel: Kernel, sources: list[Region], targets: list[Region], length: int, chunk_size: int, threads: int
    ) -> None:
        check_length(sources, length)
        check_length(targets, length)
        refuse_overlap(targets, sources)

        def work(start: int, stop: int) -> None:
            kernel.write([each.cut(start, stop) for each in sources], [each.cut(start, stop) for each in targets])

        _spread(work if targets else lambda start, stop: None, length, chunk_size, threads)


@lru_cache(maxsize=64)
def _decoder(backend: Backend, k: int, m: int, have: tuple[int, ...], want: tuple[int, ...]) -> Kernel:
    if len(have) > k:  # all fragments but one: their XOR is the one
        return backend.kernel(np.ones((1, len(have)), np.uint8))
    return backend.kernel(decode_matrix(k, m, have, want))


@lru_cache(maxsize=64)
def _checker(backend: Backend, k: int, m: int, have: tuple[int, ...]) -> Kernel:
    return backend.kernel(syndrome_matrix(k, m, have))


def _cut(regions: list[Region], offset: int, length: int) -> list[Region]:
    return [each.cut(offset, offset + length) for each in regions]


def _spread(work: Callable[[int, int], T], length: int, chunk_size: int, threads: int) -> list[T]:
    """work(start, stop) for every chunk, in order or on several threads; results in order."""
    if not is_whole(chunk_size, 1, LARGEST_CALL):
        raise ConfigError(f"chunk_size is {chunk_size!r}; it can be 1 … {LARGEST_CALL} (1-4 MiB is fastest)")
    if not is_whole(threads, 1, MOST_THREADS):
        raise ConfigError(f"threads is {threads!r}; it can be 1 … {MOST_THREADS}")
    starts = range(0, length, chunk_size)
    stops = [min(start + chunk_size, length) for start in starts]
    if threads == 1 or len(stops) <= 1:
        return list(map(work, starts, stops))
    with ThreadPoolExecutor(min(threads, len(stops))) as pool:
        return list(pool.map(work, starts, stops))
