"""The code: any k fragments give back the rest, in agreement with reedsolo, on every back end."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, permutations
from typing import TYPE_CHECKING

import numpy as np
import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.coding import ErasureCode
from holdfast.errors import MissingData

if TYPE_CHECKING:
    from collections.abc import Callable

    Fragments = Callable[[ErasureCode, int], list[np.ndarray]]
    Noise = Callable[..., np.ndarray]


def equal(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


# -- encode ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "m"), [(1, 1), (2, 1), (4, 2), (8, 4), (5, 3), (12, 3), (60, 4), (223, 32), (254, 1), (1, 254), (100, 155)]
)
def test_every_byte_column_is_a_codeword_of_reedsolo(k: int, m: int, fragments_of: Fragments) -> None:
    fragments = np.stack(fragments_of(ErasureCode(k, m), 12))
    oracle = reedsolo.RSCodec(m)
    for column in range(fragments.shape[1]):
        assert bytes(oracle.encode(fragments[:k, column].tobytes())) == fragments[:, column].tobytes()


def test_the_parity_is_the_parity_matrix_times_the_data(backend: str, fragments_of: Fragments) -> None:
    code = ErasureCode(7, 3, backend)
    fragments = np.stack(fragments_of(code, 50))
    from holdfast.coding.field import matmul

    np.testing.assert_array_equal(matmul(code.generator_matrix, fragments[:7]), fragments)
    np.testing.assert_array_equal(matmul(code.parity_matrix, fragments[:7]), fragments[7:])


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000, 4095, 4096, 4097, 1 << 20])
def test_chunks_make_no_difference(chunk_size: int, backend: str, fragments_of: Fragments, noise: Noise) -> None:
    code = ErasureCode(3, 2, backend)
    fragments = fragments_of(code, 4096 if chunk_size > 60 else 200)
    parity = list(noise(2, fragments[0].size))
    code.encode(fragments[:3], parity, chunk_size=chunk_size)
    assert equal(parity, fragments[3:])


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_make_no_difference(threads: int, backend: str, fragments_of: Fragments, noise: Noise) -> None:
    code = ErasureCode(4, 2, backend)
    fragments = fragments_of(code, 300_001)
    parity = list(noise(2, 300_001))
    code.encode(fragments[:4], parity, chunk_size=10_000, threads=threads)
    assert equal(parity, fragments[4:])
    out = dict(enumerate(noise(2, 300_001)))
    code.reconstruct(dict(list(enumerate(fragments))[2:]), out, chunk_size=10_000, threads=threads)
    assert equal([out[0], out[1]], fragments[:2])


def test_pieces_may_come_in_any_order_and_touch_nothing_else(backend: str, fragments_of: Fragments, noise: Noise) -> None:
    code = ErasureCode(4, 2, backend)
    fragments = fragments_of(code, 1000)
    parity = list(noise(2, 1000))
    before = [p.copy() for p in parity]
    code.encode_chunk(fragments[:4], parity, 300, 450)
    assert equal([p[300:750] for p in parity], [f[300:750] for f in fragments[4:]])
    assert equal([p[:300] for p in parity], [b[:300] for b in before])
    assert equal([p[750:] for p in parity], [b[750:] for b in before])
    code.encode_chunk(fragments[:4], parity, 750, 250)
    code.encode_chunk(fragments[:4], parity, 0, 300)
    assert equal(parity, fragments[4:])


def test_sources_are_not_changed(backend: str, fragments_of: Fragments, noise: Noise) -> None:
    code = ErasureCode(4, 2, backend)
    fragments = fragments_of(code, 777)
    kept = [f.copy() for f in fragments]
    code.reconstruct(dict(list(enumerate(fragments))[2:]), dict(enumerate(noise(2, 777))))
    code.scrub(dict(enumerate(fragments)))
    parity = [f.copy() for f in fragments[4:]]
    code.update(parity, 1, old=fragments[1], new=fragments[2])
    code.accumulate(parity, 0, fragments[3])
    assert equal(fragments, kept)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 200), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_code_is_linear(k: int, m: int, length: int, random: object) -> None:
    code = ErasureCode(k, m)
    generator = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    a, b = generator.integers(0, 256, (2, k, length), dtype=np.uint8)
    parities = [[np.empty(length, np.uint8) for _ in range(m)] for _ in range(3)]
    for data, parity in zip((a, b, a ^ b), parities, strict=True):
        code.encode(list(data), parity)
    assert equal([x ^ y for x, y in zip(parities[0], parities[1], strict=True)], parities[2])


def test_many_kinds_of_buffers_are_taken(fragments_of: Fragments) -> None:
    code = ErasureCode(4, 2)
    fragments = fragments_of(code, 4096)
    with mmap.mmap(-1, 4096) as mapped, mmap.mmap(-1, 3 * 4096) as larger:
        mapped[:] = fragments[1].tobytes()
        data = [
            fragments[0].tobytes(),
            mapped,
            memoryview(bytearray(fragments[2].tobytes())).cast("I"),
            fragments[3].view(np.float64).reshape(8, 64),
        ]
        parity = [memoryview(larger)[4096:8192], bytearray(4096)]
        code.encode(data, parity)
        assert bytes(parity[0]) == fragments[4].tobytes()
        assert bytes(parity[1]) == fragments[5].tobytes()
        parity[0].release()
        del data


def test_cpu_tensors_come_through_numpy(fragments_of: Fragments) -> None:
    torch = pytest.importorskip("torch")
    code = ErasureCode(2, 2)
    fragments = fragments_of(code, 64)
    tensors = [torch.from_numpy(f.view(np.float32).copy()) for f in fragments[:2]]
    parity = [torch.zeros(64, dtype=torch.uint8) for _ in range(2)]
    code.encode([t.numpy() for t in tensors], [p.numpy() for p in parity])
    assert equal([p.numpy() for p in parity], fragments[2:])


def test_no_parity_is_a_code_that_does_nothing(noise: Noise) -> None:
    code = ErasureCode(3, 0)
    data = list(noise(3, 100))
    code.encode(data, [])
    code.accumulate([], 1, data[1])
    code.update([], 1, old=data[1], new=data[2])
    code.reconstruct(dict(enumerate(data)), {})
    assert code.generator_matrix.tolist() == np.eye(3, dtype=np.uint8).tolist()


# -- reconstruct -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 13))
def test_any_loss_of_m_fragments_is_rebuilt(n: int, fragments_of: Fragments) -> None:
    for m in range(1, n):
        code = ErasureCode(n - m, m)
        fragments = fragments_of(code, 19)
        for lost in combinations(range(n), m):
            out = {j: np.zeros(19, np.uint8) for j in lost}
            code.reconstruct({j: fragments[j] for j in range(n) if j not in lost}, out)
            assert equal(list(out.values()), [fragments[j] for j in lost]), (m, lost)


@pytest.mark.parametrize(("k", "m"), [(4, 2), (3, 3), (2, 1)])
def test_smaller_losses_are_rebuilt_on_every_back_end(k: int, m: int, backend: str, fragments_of: Fragments) -> None:
    code = ErasureCode(k, m, backend)
    fragments = fragments_of(code, 131)
    for count in range(m + 1):
        for lost in combinations(range(k + m), count):
            out = {j: np.zeros(131, np.uint8) for j in lost}
            code.reconstruct({j: fragments[j] for j in range(k + m) if j not in lost}, out)
            assert equal(list(out.values()), [fragments[j] for j in lost]), lost


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_large_codes_are_rebuilt_too(data: st.DataObject) -> None:
    n = data.draw(st.integers(13, 255))
    m = data.draw(st.integers(1, min(n - 1, 40)))
    length = data.draw(st.integers(1, 300))
    code = ErasureCode(n - m, m, data.draw(st.sampled_from(["isal", "numpy"])))
    fragments = list(np.random.default_rng(n * m).integers(0, 256, (n, length), dtype=np.uint8))
    code.encode(fragments[: n - m], fragments[n - m :])
    lost = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=m))
    wanted = data.draw(st.sets(st.sampled_from(sorted(lost)), min_size=1))
    out = {j: np.zeros(length, np.uint8) for j in wanted}
    code.reconstruct({j: fragments[j] for j in range(n) if j not in lost}, out)
    assert all(np.array_equal(out[j], fragments[j]) for j in wanted)


def test_only_the_wanted_fragments_are_rebuilt_from_k_of_those_given(fragments_of: Fragments) -> None:
    code = ErasureCode(4, 3)
    fragments = fragments_of(code, 100)
    out = {2: np.zeros(100, np.uint8)}
    code.reconstruct({j: fragments[j] for j in (6, 0, 5, 3)}, out)
    assert np.array_equal(out[2], fragments[2])


@pytest.mark.parametrize("given", [[0, 1, 2], [3, 4, 5], []])
def test_losing_more_than_m_is_said_and_nothing_is_written(given: list[int], backend: str, fragments_of: Fragments) -> None:
    code = ErasureCode(4, 2, backend)
    fragments = fragments_of(code, 64)
    lost = [j for j in range(6) if j not in given]
    out = {j: np.full(64, 170, np.uint8) for j in lost}
    with pytest.raises(MissingData, match=r"are left and 4 are needed .*k=4, m=2"):
        code.reconstruct({j: fragments[j] for j in given}, out)
    assert all((buffer == 170).all() for buffer in out.values())


# -- accumulate and update ---------------------------------------------------------------------------------------------


def test_adding_all_fragments_in_any_order_is_encoding(backend: str, fragments_of: Fragments) -> None:
    code = ErasureCode(4, 2, backend)
    fragments = fragments_of(code, 333)
    for order in permutations(range(4)):
        parity = [np.zeros(333, np.uint8) for _ in range(2)]
        for j in order:
            code.accumulate(parity, j, fragments[j])
        assert equal(parity, fragments[4:]), order


def test_adding_a_fragment_piece_by_piece_is_adding_it(backend: str, fragments_of: Fragments) -> None:
    code = ErasureCode(4, 2, backend)
    fragments = fragments_of(code, 333)
    parity = [np.zeros(333, np.uint8) for _ in range(2)]
    for j in range(4):
        for start in range(0, 333, 50):
            code.accumulate(parity, j, fragments[j][start : start + 50], start)
    assert equal(parity, fragments[4:])


@pytest.mark.parametrize("length", [0, 1, 31, 1000, (512 << 10) + 13])
def test_an_update_is_the_same_as_encoding_again(length: int, backend: str, fragments_of: Fragments, noise: Noise) -> None:
    code = ErasureCode(3, 2, backend)
    fragments = fragments_of(code, length)
    new = noise(length)
    expected = [np.empty(length, np.uint8) for _ in range(2)]
    code.encode([fragments[0], new, fragments[2]], expected)
    by_both, by_delta = [f.copy() for f in fragments[3:]], [f.copy() for f in fragments[3:]]
    code.update(by_both, 1, old=fragments[1], new=new)
    code.update(by_delta, 1, delta=fragments[1] ^ new)
    assert equal(by_both, expected)
    assert equal(by_delta, expected)
    code.update(by_delta, 1, delta=fragments[1] ^ new)  # the same change twice is no change
    assert equal(by_delta, fragments[3:])


def test_an_update_of_a_part_is_the_same_as_encoding_again(backend: str, fragments_of: Fragments, noise: Noise) -> None:
    code = ErasureCode(3, 2, backend)
    fragments = fragments_of(code, 1000)
    parity = [f.copy() for f in fragments[3:]]
    new = fragments[2].copy()
    new[100:400] = noise(300)
    code.update(parity, 2, old=fragments[2][100:400], new=new[100:400], offset=100)
    expected = [np.empty(1000, np.uint8) for _ in range(2)]
    code.encode([*fragments[:2], new], expected)
    assert equal(parity, expected)


def test_threads_that_change_the_same_parity_lose_no_change(backend: str, fragments_of: Fragments, noise: Noise) -> None:
    code = ErasureCode(4, 2, backend)
    length = 200_000
    fragments = fragments_of(code, length)
    changes = noise(16, length)
    parity = [f.copy() for f in fragments[4:]]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ErasureCode(4, 2, backend).update(parity, i % 4, delta=changes[i]), range(16)))
    data = [fragments[j] ^ np.bitwise_xor.reduce(changes[j::4], axis=0) for j in range(4)]
    expected = [np.empty(length, np.uint8) for _ in range(2)]
    code.encode(data, expected)
    assert equal(parity, expected)


@pytest.mark.parametrize("change", [{"delta": bytes(100)}, {"old": bytes(100), "new": bytes(100)}])
def test_changes_of_the_same_parity_take_turns(change: dict[str, bytes]) -> None:
    inside, met = [], []

    class Slow(Recorder):
        def add(self, column: int, source: object, targets: list) -> None:
            inside.append(column)
            time.sleep(0.02)
            met.extend(inside[1:])
            inside.pop()

    parity = bytearray(100)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda j: ErasureCode(4, 1, Slow()).update([parity], j, **change), range(4)))
    assert not met


# -- large and in parallel ---------------------------------------------------------------------------------------------


class Recorder:
    """A back end that only writes down how much it was asked to do at a time."""

    name = "recorder"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def kernel(self, matrix: np.ndarray) -> Recorder:
        return self

    def write(self, sources: list, targets: list) -> None:
        assert {each.size for each in [*sources, *targets]} == {sources[0].size}
        self.sizes.append(sources[0].size)

    def add(self, column: int, source: object, targets: list) -> None:
        self.write([source], targets)


def test_no_call_is_longer_than_a_c_int() -> None:
    """Lengths are `int` in C, and ctypes wraps 2^31 silently. The mappings are never touched, so they cost no memory."""
    length = 2**31 + 4099
    with mmap.mmap(-1, length) as data, mmap.mmap(-1, length) as parity:
        for act in (
            lambda code: code.encode([data], [parity], chunk_size=1 << 30),
            lambda code: code.encode_chunk([data], [parity], 0, length),
            lambda code: code.accumulate([parity], 0, data),
            lambda code: code.reconstruct({0: data}, {1: parity}, chunk_size=1 << 30),
        ):
            recorder = Recorder()
            act(ErasureCode(1, 1, recorder))
            assert sum(recorder.sizes) == length
            assert max(recorder.sizes) <= 2**30


def test_bytes_beyond_2_gib_are_reached(backend: str, noise: Noise) -> None:
    length, offset = 2**31 + 8192, 2**31 + 100
    piece = noise(500)
    with mmap.mmap(-1, length) as data, mmap.mmap(-1, length) as parity:
        data[offset : offset + 500] = piece.tobytes()
        code = ErasureCode(1, 2, backend)
        second = np.zeros(length, np.uint8)  # zeros are not touched either
        code.encode_chunk([data], [parity, second], offset - 10, 520)
        expected = [np.empty(500, np.uint8) for _ in range(2)]
        code.encode([piece], expected)
        assert parity[offset : offset + 500] == expected[0].tobytes()
        assert np.array_equal(second[offset : offset + 500], expected[1])
        assert parity[100:600] == bytes(500)


def test_the_gil_is_released_while_bytes_are_coded(backend: str) -> None:
    """With a huge switch interval another thread runs during the call only if the call gives the GIL away."""
    code = ErasureCode(2, 2, backend)
    length = 1 << 20 if backend == "numpy" else 16 << 20
    data, parity = np.ones((2, length), np.uint8), np.ones((2, length), np.uint8)
    code.encode(list(data), list(parity))  # compiled, loaded, pages touched
    inside = threading.Event()
    seen = False

    def work() -> None:
        inside.set()
        code.encode(list(data), list(parity), chunk_size=length)
        inside.clear()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        for _ in range(50):
            worker = threading.Thread(target=work)
            worker.start()
            while worker.is_alive() and not seen:
                seen = inside.is_set()
                time.sleep(0)
            worker.join()
            if seen:
                break
    finally:
        sys.setswitchinterval(interval)
    assert seen


def test_threads_really_work_at_the_same_time() -> None:
    class Meeting(Recorder):
        both = threading.Barrier(2, timeout=30)

        def write(self, sources: list, targets: list) -> None:
            self.both.wait()  # passes only when two chunks are in work at once

    code = ErasureCode(1, 1, Meeting())
    code.encode([bytes(400)], [bytearray(400)], chunk_size=100, threads=2)
    code.reconstruct({0: bytes(400)}, {1: bytearray(400)}, chunk_size=100, threads=2)


def test_what_fails_in_a_thread_fails_the_call() -> None:
    class Failing(Recorder):
        def write(self, sources: list, targets: list) -> None:
            raise OSError("no luck")

    with pytest.raises(OSError, match="no luck"):
        ErasureCode(1, 1, Failing()).encode([bytes(400)], [bytearray(400)], chunk_size=100, threads=2)
