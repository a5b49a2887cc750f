"""What is refused before a C function sees it. Nothing is ever written by a call that raises."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from holdfast.coding import ErasureCode
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


class Untouchable:
    """A back end that must not be reached."""

    name = "untouchable"

    def kernel(self, matrix: np.ndarray) -> Untouchable:
        return self

    def write(self, *arguments: object) -> None:
        raise AssertionError("the back end was called")

    add = write


CODE = ErasureCode(4, 2, Untouchable())


def fragments(count: int, length: int = 256) -> list[np.ndarray]:
    return [np.full(length, 7, np.uint8) for _ in range(count)]


@pytest.mark.parametrize(
    ("k", "m"), [(0, 1), (-1, 2), (4, -1), (200, 56), (256, 0), (1.0, 1), (4, 2.5), ("4", 2), (None, 1), (10**30, 1)]
)
def test_impossible_codes(k: Any, m: Any) -> None:
    with pytest.raises(ConfigError, match="need k >= 1, m >= 0"):
        ErasureCode(k, m)


def test_the_largest_codes_are_accepted() -> None:
    assert ErasureCode(254, 1).n == ErasureCode(1, 254).n == ErasureCode(255, 0).n == 255
    assert ErasureCode(np.int64(4), np.uint8(2)).n == 6  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["", "ISAL", "gpu", "auto "])
def test_unknown_back_ends(backend: str) -> None:
    with pytest.raises(ConfigError, match="it can be 'auto', 'isal', 'numba', 'numpy'"):
        ErasureCode(4, 2, backend)


def test_wrong_numbers_of_fragments() -> None:
    for data, parity in ((3, 2), (5, 2), (4, 1), (4, 3), (0, 0)):
        with pytest.raises(ConfigError, match=r"\d (data fragments|parities) given, [km] is"):
            CODE.encode(fragments(data), fragments(parity))
        with pytest.raises(ConfigError, match=r"\d (data fragments|parities) given, [km] is"):
            CODE.encode_chunk(fragments(data), fragments(parity), 0, 10)
    with pytest.raises(ConfigError, match="1 parities given, m is 2"):
        CODE.accumulate(fragments(1), 0, b"x")
    with pytest.raises(ConfigError, match="3 parities given, m is 2"):
        CODE.update(fragments(3), 0, old=b"x", new=b"y")


@pytest.mark.parametrize("position", range(6))
def test_unequal_lengths(position: int) -> None:
    for length in (0, 255, 257):
        buffers = fragments(6)
        buffers[position] = np.zeros(length, np.uint8)
        with pytest.raises(ConfigError, match=r"(data|parity) \d has \d+ bytes where the others have \d+"):
            CODE.encode(buffers[:4], buffers[4:])
        with pytest.raises(ConfigError, match=r"(data|parity) \d has \d+ bytes where the others have \d+"):
            CODE.encode_chunk(buffers[:4], buffers[4:], 0, 0)
        with pytest.raises(ConfigError, match=r"(fragment|out) \d has \d+ bytes where the others have \d+"):
            CODE.reconstruct(dict(enumerate(buffers[:5])), {5: buffers[5]})
        with pytest.raises(ConfigError, match=r"fragment \d has \d+ bytes where the others have \d+"):
            CODE.scrub(dict(enumerate(buffers)))
    with pytest.raises(ConfigError, match="new has 5 bytes where the others have 4"):
        CODE.update(fragments(2), 0, old=bytes(4), new=bytes(5))


def hostile_buffers() -> list[Any]:
    wide = np.zeros((256, 2), np.uint8)
    closed = mmap.mmap(-1, 256)
    closed.close()
    released = memoryview(bytearray(256))
    released.release()
    return [wide[:, 0], np.zeros(512, np.uint8)[::-2], "x" * 256, None, 256, [0] * 256, closed, released, np.zeros(256, object)]


@pytest.mark.parametrize("hostile", hostile_buffers(), ids=lambda hostile: type(hostile).__name__)
@pytest.mark.parametrize("position", [0, 5])
def test_things_that_are_no_flat_memory(hostile: Any, position: int) -> None:
    buffers: list[Any] = fragments(6)
    buffers[position] = hostile
    with pytest.raises(ConfigError, match=r"(data 0|parity 1) (is|cannot be|holds)"):
        CODE.encode(buffers[:4], buffers[4:])


@pytest.mark.parametrize("target", [bytes(256), memoryview(bytearray(256)).toreadonly(), np.broadcast_to(np.uint8(0), 256)])
def test_targets_that_cannot_be_written(target: Any) -> None:
    with pytest.raises(ConfigError, match=r"parity 1 is (read-only|not contiguous)"):
        CODE.encode(fragments(4), [*fragments(1), target])
    with pytest.raises(ConfigError, match=r"out 5 is (read-only|not contiguous)"):
        CODE.reconstruct(dict(enumerate(fragments(4))), {5: target})
    with pytest.raises(ConfigError, match=r"parity 1 is (read-only|not contiguous)"):
        CODE.accumulate([*fragments(1), target], 0, bytes(256))


OVERLAPS = [(0, 256), (1, 257), (255, 511), (100, 356)]


@pytest.mark.parametrize(("start", "stop"), OVERLAPS)
def test_a_target_that_shares_memory(start: int, stop: int) -> None:
    memory = np.zeros(1024, np.uint8)
    one, other = memory[:256], memory[start:stop]
    for first, second in ((one, other), (other, one)):
        with pytest.raises(ConfigError, match="shares memory with"):
            CODE.encode([first, *fragments(3)], [second, *fragments(1)])
        with pytest.raises(ConfigError, match="shares memory with"):
            CODE.encode(fragments(4), [first, second])
        with pytest.raises(ConfigError, match="shares memory with"):
            CODE.reconstruct(dict(enumerate([first, *fragments(3)])), {4: second})
        with pytest.raises(ConfigError, match="shares memory with"):  # a fragment that would not even be read
            ErasureCode(4, 3, Untouchable()).reconstruct(dict(enumerate([*fragments(4), first])), {5: second})
        with pytest.raises(ConfigError, match="shares memory with"):
            CODE.reconstruct(dict(enumerate(fragments(4))), {4: first, 5: second})
        with pytest.raises(ConfigError, match="shares memory with"):
            CODE.accumulate([first, *fragments(1)], 0, second)
        with pytest.raises(ConfigError, match="shares memory with"):
            CODE.update([first, *fragments(1)], 0, old=second, new=bytes(256))
        with pytest.raises(ConfigError, match="shares memory with"):
            CODE.update([first, *fragments(1)], 0, old=bytes(256), new=second)


def test_a_target_that_meets_a_source_half_way() -> None:
    memory = np.zeros(1024, np.uint8)
    with pytest.raises(ConfigError, match="shares memory with"):
        CODE.accumulate([memory[512:768], *fragments(1)], 0, memory[500:756])


def test_sources_may_share_memory_and_neighbours_may_touch(backend: str, noise: Callable[..., np.ndarray]) -> None:
    code = ErasureCode(2, 1, backend)
    memory = noise(768)
    expected = memory[256:512] ^ memory[300:556]
    code.encode([memory[256:512], memory[300:556]], [memory[:256]])
    np.testing.assert_array_equal(memory[:256], expected)


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 10), (0, -1), (0, 257), (256, 1), (250, 7), (2**63, 1), (1, 2**64), (0.0, 1), (0, None)]
)
def test_pieces_outside_the_fragments(offset: Any, length: Any) -> None:
    with pytest.raises(ConfigError, match="do not fit into 256 bytes"):
        CODE.encode_chunk(fragments(4), fragments(2), offset, length)
    if length is not None:  # which means "to the end" here
        with pytest.raises(ConfigError, match="do not fit into 256 bytes"):
            CODE.syndromes(dict(enumerate(fragments(6))), offset, length)


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, 257), (256, 1), (250, 7), (2**63, 1), (0.0, 1)])
def test_changes_outside_the_fragments(offset: Any, length: int) -> None:
    with pytest.raises(ConfigError, match="do not fit into 256 bytes"):
        CODE.accumulate(fragments(2), 0, bytes(length), offset)
    with pytest.raises(ConfigError, match="do not fit into 256 bytes"):
        CODE.update(fragments(2), 0, old=bytes(length), new=bytes(length), offset=offset)


@pytest.mark.parametrize("index", [-1, 4, 5, 255, 1.5, "0", None])
def test_fragment_numbers_that_do_not_exist(index: Any) -> None:
    with pytest.raises(ConfigError, match="not among 0 … 3"):
        CODE.accumulate(fragments(2), index, bytes(256))
    with pytest.raises(ConfigError, match="not among 0 … 3"):
        CODE.update(fragments(2), index, old=bytes(256), new=bytes(256))
    if index not in (4, 5):
        with pytest.raises(ConfigError, match="not among 0 … 5"):
            CODE.reconstruct({**dict(enumerate(fragments(4))), index: bytes(256)}, {})
        with pytest.raises(ConfigError, match="not among 0 … 5"):
            CODE.reconstruct(dict(enumerate(fragments(4))), {index: bytearray(256)})
        with pytest.raises(ConfigError, match="not among 0 … 5"):
            CODE.scrub({**dict(enumerate(fragments(4))), index: bytes(256)})


def test_a_fragment_that_is_given_and_wanted() -> None:
    with pytest.raises(ConfigError, match=r"fragments \[3\] are given and also asked for"):
        CODE.reconstruct(dict(enumerate(fragments(5))), {3: bytearray(256), 5: bytearray(256)})


@pytest.mark.parametrize("arguments", [{}, {"old": b"a"}, {"new": b"a"}, {"old": b"a", "new": b"b", "delta": b"c"}])
def test_an_update_that_does_not_say_what_changed(arguments: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match="either old= and new=, or delta="):
        CODE.update(fragments(2), 0, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_size", [0, -1, 2**30 + 1, 2**31, 2**32 + 1, 1.5, None])
def test_chunk_sizes_that_no_c_int_should_see(chunk_size: Any) -> None:
    for act in (
        lambda: CODE.encode(fragments(4), fragments(2), chunk_size=chunk_size),
        lambda: CODE.reconstruct(dict(enumerate(fragments(4))), {4: bytearray(256)}, chunk_size=chunk_size),
        lambda: CODE.scrub(dict(enumerate(fragments(6))), chunk_size=chunk_size),
    ):
        with pytest.raises(ConfigError, match="chunk_size is"):
            act()


@pytest.mark.parametrize("threads", [0, -3, 257, 1.5, "2"])
def test_impossible_numbers_of_threads(threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads is"):
        CODE.encode(fragments(4), fragments(2), threads=threads)


def test_a_mapping_cannot_be_closed_under_a_running_call() -> None:
    """The view that is made at the start holds an export until the call is over."""
    mapped = mmap.mmap(-1, 256)
    refused = []

    class Closing(Untouchable):
        def write(self, *arguments: object) -> None:
            try:
                mapped.close()
            except BufferError as error:
                refused.append(str(error))

    ErasureCode(1, 1, Closing()).encode([bytes(256)], [mapped])
    assert refused
    mapped.close()


@pytest.mark.parametrize("length", [0, 1])
def test_empty_fragments_are_no_special_case(length: int, backend: str) -> None:
    code = ErasureCode(2, 2, backend)
    parity = fragments(2, length)
    code.encode(fragments(2, length), parity)
    code.accumulate(parity, 0, bytes(length))
    code.update(parity, 0, old=bytes(length), new=bytes(length))
    code.reconstruct({2: parity[0], 3: parity[1]}, {0: bytearray(length)})
    assert code.scrub({0: bytes([7] * length), 1: bytes([7] * length), 2: parity[0], 3: parity[1]}).is_clean
