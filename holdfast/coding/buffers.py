"""What callers hand in, checked once: nothing below this file looks at a pointer twice.

The fast back ends are C functions that believe every length and address they are given. A view made here holds an export of
the caller's buffer, so a mapping cannot be closed while it is being read or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from holdfast.coding.field import Bytes

ALIGNMENT = 64  # a cache line and the widest vector
STAGGER, STAGGER_PERIOD = 325 * ALIGNMENT, 64 << 10
LARGEST_CALL = 1 << 30  # C back ends take lengths as `int`, and ctypes wraps 2^31 to a negative number without a word


class Region(NamedTuple):
    """A run of the caller's bytes: what it is called in messages, the bytes, and where they are."""

    name: str
    array: Bytes
    address: int

    @property
    def size(self) -> int:
        return self.array.size

    def cut(self, start: int, stop: int) -> Region:
        """Bytes [start, stop) of it. Much cheaper than asking numpy for the address again."""
        return Region(self.name, self.array[start:stop], self.address + start)


def staggered_length(nbytes: int) -> int:
    """A length from `nbytes` up at whose multiples buffers can be read side by side at full speed.

    Coding reads k fragments and writes m at the same offset, all at once. Buffers whose addresses agree in their low bits,
    as those from mmap do, compete for the same few cache sets: at (8, 2) that halves the speed (measured on a Zen 4: 11
    instead of 25 GB/s in huge pages, 17 instead of 21 in /dev/shm). 325 lines past a multiple of 64 KiB, successive
    multiples differ both in the bits within a page, which index the first cache, and in those above, which index the second.
    """
    return nbytes + (STAGGER - nbytes) % STAGGER_PERIOD


def staggered(count: int, nbytes: int) -> list[Bytes]:
    """`count` new buffers of `nbytes`, placed so that coding them together is as fast as it can be. Not zeroed."""
    step = staggered_length(nbytes)
    memory = np.empty(count * step + ALIGNMENT, np.uint8)
    first = -region(memory).address % ALIGNMENT
    return [memory[first + i * step :][:nbytes] for i in range(count)]


def readable(buffer: Buffer, name: str) -> Region:
    """The caller's memory as flat bytes, without a copy."""
    try:
        view = memoryview(buffer)
    except TypeError:
        raise ConfigError(
            f"{name} is a {type(buffer).__name__}, which offers no buffer: give bytes, a mapping, a memoryview or a "
            "numpy array (a CPU tensor through .numpy())"
        ) from None
    except ValueError as error:  # numpy dtypes that the buffer protocol cannot say, such as bfloat16; a closed mapping
        raise ConfigError(f"{name} cannot be read as bytes: {error}; give .view(numpy.uint8)") from None
    if "O" in view.format:
        raise ConfigError(f"{name} holds Python objects, whose bytes are addresses and mean nothing elsewhere")
    if not view.c_contiguous:
        raise ConfigError(f"{name} is not contiguous (strides {view.strides}): give one run of bytes")
    return region(np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8), name)


def writable(buffer: Buffer, name: str) -> Region:
    """The same for memory that is written into."""
    found = readable(buffer, name)
    if found.size and not found.array.flags.writeable:
        raise ConfigError(f"{name} is read-only and would be written into")
    return found


def region(array: Bytes, name: str = "scratch") -> Region:
    return Region(name, array, int(array.__array_interface__["data"][0]))


def is_whole(value: object, low: int, high: int) -> bool:
    """A whole number in low … high: an int or a numpy one, and nothing that only looks like it."""
    return isinstance(value, int | np.integer) and bool(low <= value <= high)


def check_length(regions: Iterable[Region], expected: int) -> None:
    for each in regions:
        if each.size != expected:
            raise ConfigError(f"{each.name} has {each.size} bytes where the others have {expected}")


def check_span(offset: int, length: int, available: int) -> None:
    if not is_whole(offset, 0, available) or not is_whole(length, 0, available - offset):
        raise ConfigError(f"offset {offset!r} and length {length!r} do not fit into {available} bytes")


def refuse_overlap(targets: Sequence[Region], sources: Sequence[Region]) -> None:
    """No target shares a byte with another target or with a source; sources may share as they like.

    In place looks tempting (parity as source and destination), and is right or wrong depending on which vector kernel
    the library picks and whether the length is a multiple of its width.
    """
    spans = [(target.address, target.size, target.name, True) for target in targets if target.size]
    spans += [(source.address, source.size, source.name, False) for source in sources if source.size]
    any_end, any_name, target_end, target_name = 0, "", 0, ""
    for start, size, name, is_target in sorted(spans):
        if start < target_end:
            raise ConfigError(f"{name} shares memory with {target_name}, which is written into")
        if is_target and start < any_end:
            raise ConfigError(f"{name} is written into and shares memory with {any_name}")
        if start + size > any_end:
            any_end, any_name = start + size, name
        if is_target:
            target_end, target_name = start + size, name
