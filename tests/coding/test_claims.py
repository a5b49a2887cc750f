"""Threads that change the same bytes take turns; those that change different bytes do not wait."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from holdfast.coding.buffers import region
from holdfast.coding.claims import Claims


def test_a_second_holder_of_a_shared_byte_waits_for_the_first() -> None:
    claims, memory = Claims(), region(np.zeros(100, np.uint8))
    entered = threading.Event()

    def second() -> None:
        with claims.hold([memory.cut(49, 60)]):
            entered.set()

    thread = threading.Thread(target=second)
    with claims.hold([memory.cut(0, 10), memory.cut(40, 50)]):
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(30)
    thread.join()


def test_holders_of_neighbouring_bytes_do_not_wait() -> None:
    claims, memory = Claims(), region(np.zeros(100, np.uint8))
    both = threading.Barrier(2, timeout=30)

    def other() -> None:
        with claims.hold([memory.cut(50, 100)]):
            both.wait()

    thread = threading.Thread(target=other)
    with claims.hold([memory.cut(0, 50)]):
        thread.start()
        both.wait()
    thread.join()


def test_a_holder_that_fails_lets_go() -> None:
    claims, memory = Claims(), region(np.zeros(100, np.uint8))
    with pytest.raises(RuntimeError), claims.hold([memory]):
        raise RuntimeError
    with claims.hold([memory]):
        pass


def test_many_holders_never_meet() -> None:
    claims, memory = Claims(), region(np.zeros(64, np.uint8))
    inside = np.zeros(64, np.int64)
    met = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(200):
            start, stop = sorted(generator.integers(0, 65, 2).tolist())
            with claims.hold([memory.cut(start, stop)]):
                inside[start:stop] += 1
                met.extend(inside[start:stop][inside[start:stop] != 1].tolist())
                inside[start:stop] -= 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met
