"""How fast parity and checksums are, beside memcpy and beside the libraries one would otherwise use.

    python benchmarks/coding.py [--json] [--quick]

GB/s counts the data that is protected: k fragments for encode and reconstruct (m data fragments lost), the one changed
fragment for update, the buffer for CRC32C. memcpy copies the same k fragments, or the same one, in the same round. Time is the
CPU time of the thread, which leaves out being descheduled and keeps the fight for memory; more threads are on the wall clock.
`slots` are mappings of files in /dev/shm, where snapshots live; all else is ordinary memory. Fragments are staggered as in a
snapshot's stripes; `aligned alike` are fragments that begin at the same place of a page and compete for the same cache sets.
"""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
from _harness import Report, arguments, machine, ratios, rounds, say

from holdfast.coding import ErasureCode, crc32c, staggered
from holdfast.coding.buffers import staggered_length
from holdfast.coding.isal import Isal, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Systems = dict[str, Callable[[], object]]

SHAPES = [(2, 1), (4, 2), (8, 2), (8, 4)]
CHECKSUMMED = 64 << 20  # with --quick too: a smaller copy would be one from cache to cache
PYECLIB_KINDS = ("isa_l_rs_vand", "isa_l_rs_cauchy")
PACKAGES = ["numpy", "pyeclib", "zfec", "numba", "google-crc32c"]
REPORT = Report()


def main() -> None:
    options = arguments(__doc__)
    size, count = (16 << 20, 3) if options.quick else (64 << 20, 9)
    memory = staggered(2 * 8 + 4, size)
    fill(memory)
    for k, m in SHAPES:
        say(f"({k}, {m}) in ordinary memory")
        fragments, spare = memory[: k + m], memory[k + m : 2 * k + m]
        encode_all(k, m, fragments, spare, count)
        reconstruct_all(k, m, fragments, spare, count)
        update_all(k, m, fragments, spare, count)
    threads_all(4, 2, memory[:6], memory[6:10], count)
    del memory, fragments, spare
    buffers = staggered(2, CHECKSUMMED)
    fill(buffers)
    checksum_all(buffers[0], buffers[1], count)
    del buffers
    for k, m in [(4, 2), (8, 2)]:
        aligned_all(k, m, size, count)
    for k, m in [(3, 1), *SHAPES]:
        say(f"({k}, {m}) in /dev/shm")
        slots_all(k, m, size, count)
    goals()
    REPORT.show(as_json=options.json, packages=PACKAGES)


# -- cases ---------------------------------------------------------------------------------------------------------------


def encode_all(k: int, m: int, fragments: list[np.ndarray], spare: list[np.ndarray], count: int) -> None:
    data, parity = fragments[:k], fragments[k:]
    systems: Systems = {"memcpy": partial(copy, data, spare)}
    for name, code in ours(k, m).items():
        systems[name] = partial(code.encode, data, parity)
    missing = peers_encode(k, m, data, systems)
    measure(f"encode ({k},{m})", systems, missing, k * data[0].size, count)


def reconstruct_all(k: int, m: int, fragments: list[np.ndarray], spare: list[np.ndarray], count: int) -> None:
    ErasureCode(k, m).encode(fragments[:k], fragments[k:])
    here = dict(list(enumerate(fragments))[m:])
    systems: Systems = {"memcpy": partial(copy, fragments[:k], spare)}
    for name, code in ours(k, m).items():
        systems[name] = partial(code.reconstruct, here, dict(enumerate(spare[:m])))
    missing = peers_reconstruct(k, m, fragments, systems)
    measure(f"reconstruct ({k},{m})", systems, missing, k * fragments[0].size, count)


def update_all(k: int, m: int, fragments: list[np.ndarray], spare: list[np.ndarray], count: int) -> None:
    code, parity = ErasureCode(k, m), fragments[k:]
    systems: Systems = {
        "memcpy": partial(copy, fragments[:1], spare[:1]),
        "holdfast, delta": partial(code.update, parity, 1, delta=fragments[0]),
        "holdfast, old and new": partial(code.update, parity, 1, old=fragments[0], new=fragments[1]),
    }
    missing = dict.fromkeys((*(f"pyeclib {kind}" for kind in PYECLIB_KINDS), "zfec"), "its API has no update")
    measure(f"update ({k},{m})", systems, missing, fragments[0].size, count)


def threads_all(k: int, m: int, fragments: list[np.ndarray], spare: list[np.ndarray], count: int) -> None:
    data, parity, code = fragments[:k], fragments[k:], ErasureCode(k, m)
    systems: Systems = {"memcpy": partial(copy, data, spare)}
    for threads in (1, 2):
        systems[f"holdfast, {threads} threads"] = partial(code.encode, data, parity, threads=threads)
    measure(f"encode ({k},{m}), wall clock", systems, {}, k * data[0].size, count, clock=time.perf_counter)


def aligned_all(k: int, m: int, size: int, count: int) -> None:
    memory = list(np.empty((2 * k + m, size), np.uint8))
    fill(memory)
    data, parity = memory[:k], memory[k : k + m]
    systems: Systems = {"memcpy": partial(copy, data, memory[k + m :])}
    systems |= {name: partial(code.encode, data, parity) for name, code in ours(k, m).items() if "num" not in name}
    measure(f"encode ({k},{m}), aligned alike", systems, {}, k * size, count)


def checksum_all(data: np.ndarray, spare: np.ndarray, count: int) -> None:
    systems: Systems = {
        "memcpy": partial(copy, [data], [spare]),
        "holdfast": partial(crc32c, data),
        "google-crc32c": partial(google_crc32c.value, data),
    }
    measure("crc32c", systems, {}, data.size, count)


def slots_all(k: int, m: int, size: int, count: int) -> None:
    with slots(2 * k + m, size) as memory:
        data, parity, spare = memory[:k], memory[k : k + m], memory[k + m :]
        code = ErasureCode(k, m)
        encode: Systems = {"memcpy": partial(copy, data, spare), "holdfast": partial(code.encode, data, parity)}
        measure(f"encode ({k},{m}) in slots", encode, {}, k * size, count)
        here = dict(list(enumerate(data + parity))[m:])
        rebuild: Systems = {
            "memcpy": partial(copy, data, spare),
            "holdfast": partial(code.reconstruct, here, dict(enumerate(spare[:m]))),
        }
        measure(f"reconstruct ({k},{m}) in slots", rebuild, {}, k * size, count)
        if (k, m) == (8, 4):
            several = CHECKSUMMED // size
            check: Systems = {
                "memcpy": partial(copy, memory[:several], memory[several : 2 * several]),
                "holdfast": lambda: [crc32c(each) for each in memory[:several]],
            }
            measure("crc32c in slots", check, {}, CHECKSUMMED, count)


def goals() -> None:
    """The goals depend on the processor: without GFNI a product costs several instructions, and memory is not the limit."""
    gfni = "gfni" in machine().features
    target = 1.3 if gfni else 0.8
    REPORT.goal("encode_4_2_vs_memcpy", target, ratio("encode (4,2)", "holdfast"))
    REPORT.goal("encode_4_2_vs_pyeclib", 10, REPORT.median("encode (4,2)", "holdfast", "vs pyeclib") or 0.0)
    REPORT.goal("reconstruct_4_2_vs_memcpy", target, ratio("reconstruct (4,2)", "holdfast"))
    REPORT.goal("crc32c_vs_memcpy", 1.3, ratio("crc32c", "holdfast"))
    REPORT.goal("encode_2_1_numpy_vs_memcpy", 1.2, ratio("encode (2,1)", "holdfast numpy"))
    if "holdfast, AVX2 only" in {row["system"] for row in REPORT.rows}:
        REPORT.goal("encode_4_2_avx2_vs_memcpy", 0.8, ratio("encode (4,2)", "holdfast, AVX2 only"))


# -- systems -------------------------------------------------------------------------------------------------------------


def ours(k: int, m: int) -> dict[str, ErasureCode]:
    """What a user gets, and what they would get with less: the kernels of older processors, and no native library at all."""
    codes = {"holdfast": ErasureCode(k, m)}
    library = load()
    if library is not None and "avx2" in machine().features:
        codes["holdfast, AVX2 only"] = ErasureCode(k, m, Isal(library.path, "_avx2"))
    codes["holdfast numpy"] = ErasureCode(k, m, "numpy")
    if (k, m) == (4, 2):
        try:
            codes["holdfast numba"] = ErasureCode(k, m, "numba")
        except Exception as error:
            say(f"no numba: {error}")
    return codes


def peers_encode(k: int, m: int, data: list[np.ndarray], systems: Systems) -> dict[str, str]:
    """Adds the libraries that are here to the systems; returns those that are not, and why."""
    missing = {}
    whole = b"".join(fragment.tobytes() for fragment in data)
    for kind in PYECLIB_KINDS:
        try:
            from pyeclib.ec_iface import ECDriver

            systems[f"pyeclib {kind}"] = partial(ECDriver(k=k, m=m, ec_type=kind).encode, whole)
        except Exception as error:
            missing[f"pyeclib {kind}"] = str(error)
    try:
        import zfec

        systems["zfec"] = partial(zfec.Encoder(k, k + m).encode, data)
    except ImportError as error:
        missing["zfec"] = str(error)
    return missing


def peers_reconstruct(k: int, m: int, fragments: list[np.ndarray], systems: Systems) -> dict[str, str]:
    missing = {}
    data = fragments[:k]
    whole = b"".join(fragment.tobytes() for fragment in data)
    for kind in PYECLIB_KINDS:
        try:
            from pyeclib.ec_iface import ECDriver

            driver = ECDriver(k=k, m=m, ec_type=kind)
            systems[f"pyeclib {kind}"] = partial(driver.decode, driver.encode(whole)[m:])
        except Exception as error:
            missing[f"pyeclib {kind}"] = str(error)
    try:
        import zfec

        coded = zfec.Encoder(k, k + m).encode(data)
        systems["zfec"] = partial(zfec.Decoder(k, k + m).decode, coded[m:], list(range(m, k + m)))
    except ImportError as error:
        missing["zfec"] = str(error)
    return missing


# -- measuring -----------------------------------------------------------------------------------------------------------


def measure(
    case: str,
    systems: Systems,
    missing: dict[str, str],
    nbytes: int,
    count: int,
    clock: Callable[[], float] = time.thread_time,
) -> None:
    seconds = rounds(systems, count, clock)
    for name, times in seconds.items():
        REPORT.row(case, name, "speed", "GB/s", [nbytes / t / 1e9 for t in times])
        if name != "memcpy":
            REPORT.row(case, name, "vs memcpy", "x", ratios(seconds["memcpy"], times))
    if peers := [times for name, times in seconds.items() if name.startswith("pyeclib")]:
        best = [min(times) for times in zip(*peers, strict=True)]  # of its two codes, whichever was faster in the round
        REPORT.row(case, "holdfast", "vs pyeclib", "x", ratios(best, seconds["holdfast"]))
    for name, reason in missing.items():
        REPORT.absent(case, name, "speed", "GB/s", reason)


def ratio(case: str, system: str) -> float:
    return REPORT.median(case, system, "vs memcpy") or 0.0


def copy(sources: list[np.ndarray], targets: list[np.ndarray]) -> None:
    for source, target in zip(sources, targets, strict=True):
        ctypes.memmove(target.ctypes.data, source.ctypes.data, source.size)


@contextmanager
def slots(count: int, size: int) -> Iterator[list[np.ndarray]]:
    """Fragments in a mapping of a file in /dev/shm, populated and filled."""
    step = staggered_length(size)
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryFile(dir=place) as file:
        file.truncate(count * step)
        whole = np.frombuffer(mmap.mmap(file.fileno(), count * step), np.uint8)
        memory = [whole[i * step :][:size] for i in range(count)]
        fill(memory)
        yield memory


def fill(memory: list[np.ndarray]) -> None:
    noise = np.random.default_rng(0)
    for each in memory:
        each.view(np.uint64)[:] = noise.integers(0, 2**64, each.size // 8, dtype=np.uint64)


if __name__ == "__main__":
    main()
