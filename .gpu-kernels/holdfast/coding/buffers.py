"""What callers hand in, checked once: nothing below this file looks at a pointer twice.

The fast back ends are C functions that believe every length and address they are given. A view made here holds an export of
the caller's buffer, so a mapping cannot be closed while it is being read or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from holdfast.coding.field import Bytes

LARGEST_CALL = 1 << 30  # C back ends take lengths as `int`, and ctypes wraps 2^31 to a negative number without a word


def readable(buffer: Buffer, what: str) -> Bytes:
    """A flat byte view of the caller's memory, without a copy."""
    try:
        view = memoryview(buffer)
    except TypeError:
        raise ConfigError(
            f"{what} is a {type(buffer).__name__}, which offers no buffer: give bytes, a mapping, a memoryview or a "
            "numpy array (a CPU tensor through .numpy())"
        ) from None
    except ValueError as error:  # numpy dtypes that the buffer protocol cannot say, such as bfloat16; a closed mapping
        raise ConfigError(f"{what} cannot be read as bytes: {error}; give .view(numpy.uint8)") from None
    if not view.c_contiguous:
        raise ConfigError(f"{what} is not contiguous (strides {view.strides}): give one run of bytes")
    if not view.nbytes:
        return np.empty(0, np.uint8)
    return np.frombuffer(view, np.uint8)


def writable(buffer: Buffer, what: str) -> Bytes:
    """The same for memory that is written into."""
    array = readable(buffer, what)
    if array.size and not array.flags.writeable:
        raise ConfigError(f"{what} is read-only and would be written into")
    return array


def is_whole(value: object, low: int, high: int) -> bool:
    """A whole number in low … high: an int or a numpy one, and nothing that only looks like it."""
    return isinstance(value, int | np.integer) and bool(low <= value <= high)


def check_length(arrays: Iterable[tuple[str, Bytes]], expected: int) -> None:
    for what, array in arrays:
        if array.size != expected:
            raise ConfigError(f"{what} has {array.size} bytes where the others have {expected}")


def check_span(offset: int, length: int, available: int) -> None:
    if offset < 0 or length < 0 or offset + length > available:
        raise ConfigError(f"bytes [{offset}, {offset + length}) are not inside fragments of {available} bytes")


def span(array: Bytes) -> tuple[int, int]:
    """First address and the one after the last."""
    start = int(array.__array_interface__["data"][0])
    return start, start + array.size


def refuse_overlap(targets: Sequence[tuple[str, Bytes]], sources: Sequence[tuple[str, Bytes]]) -> None:
    """No target shares a byte with another target or with a source; sources may share as they like.

    In place looks tempting (parity as source and destination), and is right or wrong depending on which vector kernel
    the library picks and whether the length is a multiple of its width.
    """
    regions = [(*span(array), what, True) for what, array in targets if array.size]
    regions += [(*span(array), what, False) for what, array in sources if array.size]
    any_end, any_what, target_end, target_what = 0, "", 0, ""
    for start, end, what, is_target in sorted(regions):
        if start < target_end:
            raise ConfigError(f"{what} shares memory with {target_what}, which is written into")
        if is_target and start < any_end:
            raise ConfigError(f"{what} is written into and shares memory with {any_what}")
        if end > any_end:
            any_end, any_what = end, what
        if is_target:
            target_end, target_what = end, what
