"""Back ends: equal bytes, no byte outside the targets, and none that computes wrongly is ever used."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from holdfast.coding import ErasureCode, backend, crc, isal
from holdfast.coding.buffers import region
from holdfast.coding.field import matmul, parity_matrix
from holdfast.coding.tables import Tables
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Noise = Callable[..., np.ndarray]

LIBRARY = isal.load()


@pytest.fixture
def fresh() -> Iterator[None]:
    """Back ends are chosen anew, inside the test and after it."""
    caches = (backend._best, backend._checked, isal.load, crc._engine)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


# -- equal ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2), (3, 5), (9, 8)])
def test_lengths_from_0_to_257_give_the_same_bytes(k: int, m: int, backend: str, noise: Noise) -> None:
    code, data = ErasureCode(k, m, backend), noise(k, 257)
    expected = matmul(parity_matrix(k, m), data)
    for length in range(258):
        parity = noise(m, length)
        code.encode([row[:length] for row in data], list(parity))
        np.testing.assert_array_equal(parity, expected[:, :length])


@pytest.mark.parametrize("shift", [1, 2, 3, 7, 8, 31, 63])
def test_addresses_that_are_not_aligned_give_the_same_bytes(shift: int, backend: str, noise: Noise) -> None:
    code, data, target = ErasureCode(4, 2, backend), noise(4, 9000), noise(2, 9000)
    expected = matmul(parity_matrix(4, 2), data)
    for length in (1, 8, 130, 5001, 8900):
        sources = [row[j * shift % 90 :][:length] for j, row in enumerate(data)]
        targets = [row[(r + 1) * shift % 90 :][:length] for r, row in enumerate(target)]
        code.encode(sources, targets)
        np.testing.assert_array_equal(np.stack(targets), matmul(parity_matrix(4, 2), np.stack(sources)))
    code.encode([row[:8000] for row in data], [row[:8000] for row in target])
    np.testing.assert_array_equal(target[:, :8000], expected[:, :8000])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 4097])
def test_bytes_beside_the_targets_are_left_alone(length: int, backend: str, noise: Noise) -> None:
    guard = 96
    code, data = ErasureCode(3, 2, backend), noise(3, length)
    for shift in (0, 1, 5):
        memory = noise(2, length + 2 * guard + shift)
        before = memory.copy()
        targets = [row[guard + shift : guard + shift + length] for row in memory]
        for act in (
            lambda targets=targets: code.encode(list(data), targets),
            lambda targets=targets: code.accumulate(targets, 1, data[0]),
            lambda targets=targets: code.update(targets, 2, old=data[0], new=data[1]),
            lambda targets=targets: code.reconstruct(dict(enumerate(data)), dict(enumerate(targets, 3))),
        ):
            act()
            np.testing.assert_array_equal(memory[:, : guard + shift], before[:, : guard + shift])
            np.testing.assert_array_equal(memory[:, guard + shift + length :], before[:, guard + shift + length :])


def kernels_of_the_library() -> list[str]:
    """The vector kernels of the library that this processor can run."""
    with open("/proc/cpuinfo") as file:
        flags = set(next((line for line in file if line.startswith(("flags", "Features"))), "").split())
    needed = {"_base": set(), "_sse": {"ssse3"}, "_avx": {"avx"}, "_avx2": {"avx2"}, "_avx512": {"avx512bw", "avx512vl"}}
    return [kernel for kernel, needs in needed.items() if needs <= flags and (flags or kernel == "_base")]


@pytest.mark.skipif(LIBRARY is None, reason="no ISA-L")
@pytest.mark.parametrize("kernel", kernels_of_the_library())
def test_kernels_for_older_processors_give_the_same_bytes(kernel: str, noise: Noise) -> None:
    assert LIBRARY is not None
    try:
        pinned = isal.Isal(LIBRARY.path, kernel)
    except ConfigError:
        pytest.skip(f"this libisal has no {kernel}")
    assert backend.wrong_answer(pinned) is None
    code, data = ErasureCode(5, 3, pinned), noise(5, 300)
    for length in range(301):  # updates of short and odd lengths have been wrong in a past release
        expected = matmul(parity_matrix(5, 3), data[:, :length])
        added = np.zeros((3, length), np.uint8)
        for j in range(5):
            code.accumulate(list(added), j, data[j, :length])
        np.testing.assert_array_equal(added, expected)


# -- chosen --------------------------------------------------------------------------------------------------------------


class Broken(Tables):
    """Right but for one bit of one long parity."""

    name = "isal"

    def kernel(self, matrix: np.ndarray) -> Any:
        honest = super().kernel(matrix)

        class Kernel:
            add = staticmethod(honest.add)

            @staticmethod
            def write(sources: Any, targets: Any) -> None:
                honest.write(sources, targets)
                if sources[0].size > 1030:
                    targets[-1].array[1029] ^= 1

        return Kernel


class Spilling(Tables):
    """Writes one byte more than it was asked to."""

    def __init__(self, act: str) -> None:
        self.act = act

    def kernel(self, matrix: np.ndarray) -> Any:
        kernel = SimpleNamespace(write=(honest := super().kernel(matrix)).write, add=honest.add)
        careful = getattr(kernel, self.act)

        def spill(*arguments: Any) -> None:
            careful(*arguments)
            (target, *_) = arguments[-1]
            base = target.array.base.reshape(-1)
            base[target.address - region(base).address + target.size] += 1

        setattr(kernel, self.act, spill)
        return kernel


def test_a_back_end_with_one_wrong_bit_is_found_out() -> None:
    assert "parity at k=4, m=2" in (backend.wrong_answer(Broken()) or "")


@pytest.mark.parametrize(("act", "message"), [("write", "parity at k=4, m=2"), ("add", "update at k=4, m=2")])
def test_a_back_end_that_writes_too_far_is_found_out(act: str, message: str) -> None:
    assert message in (backend.wrong_answer(Spilling(act)) or "")


def test_a_wrong_library_is_passed_over_with_a_warning(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = backend._make
    monkeypatch.setattr(backend, "_make", lambda name: Broken() if name == "isal" else make(name))
    assert ErasureCode(4, 2).backend == ("numba" if find_spec("numba") else "numpy")
    assert "is not used: it computes a wrong parity" in caplog.text
    with pytest.raises(ConfigError, match="replace the library"):
        ErasureCode(4, 2, "isal")


def test_one_log_line_says_which_back_end_is_used(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="holdfast"):
        for _ in range(3):
            code = ErasureCode(4, 2)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.INFO] == [
        f"erasure coding by {code._backend}"
    ]


@pytest.mark.skipif(LIBRARY is None, reason="no ISA-L")
def test_the_users_own_library_comes_first(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert LIBRARY is not None
    link = tmp_path / "libisal-of-mine.so"
    link.symlink_to(LIBRARY.path)
    monkeypatch.setenv("HOLDFAST_ISAL", str(link))
    assert str(ErasureCode(4, 2)._backend) == f"ISA-L ({link})"


def test_an_override_that_is_no_library_is_passed_over(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for content in (None, b"", b"not ELF"):
        path = tmp_path / "libisal.so"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match="is no usable libisal"):
            isal.Isal(str(path))
    monkeypatch.setenv("HOLDFAST_ISAL", str(tmp_path / "libisal.so"))
    if LIBRARY is not None:
        assert ErasureCode(4, 2).backend == "isal"


def test_without_any_library_everything_still_works(fresh: None, monkeypatch: pytest.MonkeyPatch, noise: Noise) -> None:
    monkeypatch.setattr(isal, "candidates", lambda: iter(()))
    code, data, parity = ErasureCode(4, 2), noise(4, 99), noise(2, 99)
    assert code.backend != "isal"
    code.encode(list(data), list(parity))
    np.testing.assert_array_equal(parity, matmul(parity_matrix(4, 2), data))
    assert crc._engine() is crc.google
    with pytest.raises(ConfigError, match="no usable libisal"):
        ErasureCode(4, 2, "isal")


def test_without_numba_the_numpy_back_end_is_used(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isal, "candidates", lambda: iter(()))
    monkeypatch.setitem(sys.modules, "numba", None)
    backend._checked.cache_clear()
    from holdfast.coding import swar

    swar._compile.cache_clear()
    assert ErasureCode(4, 2).backend == "numpy"
    with pytest.raises(ConfigError, match="needs numba"):
        ErasureCode(4, 2, "numba")


def test_coding_loads_nothing_heavy_and_starts_nothing() -> None:
    program = """
import sys, threading
import holdfast.coding as coding
assert not {"torch", "ray", "zarr", "pyarrow", "numba"} & set(sys.modules), sorted(sys.modules)
assert threading.active_count() == 1
assert not any("libisal" in line for line in open("/proc/self/maps")), "a library is loaded on import"
code = coding.ErasureCode(4, 2)
data, parity = [bytes([j]) * 100 for j in range(4)], [bytearray(100), bytearray(100)]
code.encode(data, parity)
assert code.scrub(dict(enumerate([*data, *parity]))).is_clean
coding.HeaderCodec().decode(coding.HeaderCodec().encode(b"x"))
assert not {"torch", "ray", "zarr", "pyarrow"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
