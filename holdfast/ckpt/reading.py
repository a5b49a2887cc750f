"""Carrying reads out: a few threads, each with one open file and memory of its own, and every block checked before it counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, suppress
from threading import Lock
from typing import TYPE_CHECKING

from holdfast.arrays import ITEMSIZE
from holdfast.ckpt.blocks import BLOCK_NBYTES
from holdfast.ckpt.manifest import StoredRun
from holdfast.ckpt.packing import unpack
from holdfast.ckpt.reads import DirectRead, Read, SieveRead, aligned
from holdfast.ckpt.storage import REMOTE_THREADS, OpenFile, is_remote
from holdfast.ckpt.views import box_view
from holdfast.errors import CorruptData, MissingData

if TYPE_CHECKING:
    from types import TracebackType

    from holdfast.ckpt.reader import Checkpoint

Progress = Callable[[int], None]
"""Called with the number of bytes that were just finished."""


def carry_out(
    checkpoint: Checkpoint, reads: Sequence[Read], outs: Sequence[memoryview], threads: int, progress: Progress | None
) -> None:
    """Every read's bytes are in their buffers, or the first error is raised and nothing further is begun."""
    threads = min(max(threads, REMOTE_THREADS) if is_remote(checkpoint.path) else threads, len(reads))
    queue, telling = deque(reads), Lock()

    def work() -> None:
        with ReadingThread(checkpoint) as thread:
            while read := _next(queue):
                thread.do(read, outs)
                if progress is not None:
                    with telling:
                        progress(read.stop - read.start)

    if threads <= 1:
        return work()
    with ThreadPoolExecutor(threads, "holdfast-read") as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        try:
            for worker in as_completed(workers):
                worker.result()
        finally:
            queue.clear()


class ReadingThread(AbstractContextManager["ReadingThread"]):
    """What one thread keeps from one read to the next: the file that is open, and memory for what it cuts up.

    Fresh memory costs as much as filling it, and opening a file safely some 0.1 ms.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._opened = ExitStack()
        self._file: tuple[str, OpenFile] | None = None
        self._scratch = memoryview(bytearray())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._opened.__exit__(kind, error, traceback)

    def do(self, read: Read, outs: Sequence[memoryview]) -> None:
        if isinstance(read, DirectRead):
            self._direct(read, outs[read.target])
        else:
            self._sieve(read, outs)

    def read_run(self, run: StoredRun, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a run, checked; valid until the next read of this thread."""
        if len(self._scratch) < stop - start:
            self._scratch = memoryview(bytearray(stop - start))
        data = self._scratch[: stop - start]
        self._fill(run, start, [data])
        self._check(run, start, data)
        return data

    def _direct(self, read: DirectRead, out: memoryview) -> None:
        """Bytes land in their destination; only the parts of the outermost blocks that nobody wanted pass through scratch."""
        start, stop = aligned(read)
        head, tail = memoryview(bytearray(read.start - start)), memoryview(bytearray(stop - read.stop))
        body = out[read.at : read.at + read.stop - read.start]
        self._fill(read.run, start, [head, body, tail])
        first, last = start, stop
        if len(head):
            first = min(start + BLOCK_NBYTES, stop)
            self._check(read.run, start, _joined(head, body, tail, first - start))
        if len(tail) and stop > first:
            last = max(first, (stop - 1) // BLOCK_NBYTES * BLOCK_NBYTES)
            self._check(read.run, last, memoryview(bytes(body[last - read.start :]) + bytes(tail)))
        if last > first:
            self._check(read.run, first, body[first - read.start : last - read.start])

    def _sieve(self, read: SieveRead, outs: Sequence[memoryview]) -> None:
        start, stop = aligned(read)
        data = self.read_run(read.run, start, stop)
        if read.run.is_packed:
            data = self._unpacked(read.run, data)
        for want, part in read.cuts:
            source = box_view(data, read.run.run.held, part, want.dtype, start)
            box_view(outs[want.target], want.box, part, want.dtype)[...] = source

    def _unpacked(self, run: StoredRun, data: memoryview) -> memoryview:
        path, itemsize = self._checkpoint.path / run.run.file, ITEMSIZE[self._checkpoint.specs[run.array].dtype]
        where = f"step {self._checkpoint.step}, {run.array} at {list(run.box.offset)} in {path}+{run.run.byte_offset}"
        return unpack(data, run.run.held.size * itemsize, where)

    def _fill(self, run: StoredRun, start: int, buffers: Sequence[memoryview]) -> None:
        file, at, wanted = self._open(run.run.file), run.run.byte_offset + start, sum(map(len, buffers))
        rest = [buffer for buffer in buffers if len(buffer)]
        while rest:
            got = file.read_into(rest, at)
            if got == 0:
                raise MissingData(
                    f"step {self._checkpoint.step}, {run.array} at {self._checkpoint.path / run.run.file}: the file ends at byte "
                    f"{file.size()}, expected data up to {run.run.byte_offset + start + wanted}; {self._checkpoint.advice}"
                )
            at += got
            rest = list(_after(rest, got))

    def _open(self, name: str) -> OpenFile:
        if self._file is None or self._file[0] != name:
            self._file = None
            self._opened.close()
            self._file = name, self._opened.enter_context(self._checkpoint.open_file(name))
        return self._file[1]

    def _check(self, run: StoredRun, start: int, data: memoryview) -> None:
        wrong = self._checkpoint.sums(run).wrong(data, start)
        if wrong:
            block, found = wrong[0]
            raise CorruptData(
                f"step {self._checkpoint.step}, {run.array} at {list(self._checkpoint.block_box(run, block).offset)} in "
                f"{self._checkpoint.path / run.run.file}+{run.run.byte_offset + block * BLOCK_NBYTES}: crc32c is {found:08x}, "
                f"expected {int(run.blocks[block]):08x}; {self._checkpoint.advice}"
            )


def _next(queue: deque[Read]) -> Read | None:
    with suppress(IndexError):
        return queue.popleft()
    return None


def _joined(head: memoryview, body: memoryview, tail: memoryview, nbytes: int) -> memoryview:
    return memoryview((bytes(head) + bytes(body[:nbytes]) + bytes(tail))[:nbytes])


def _after(buffers: Sequence[memoryview], done: int) -> Iterator[memoryview]:
    """What is left of `buffers` once the first `done` bytes are filled."""
    for buffer in buffers:
        if done < len(buffer):
            yield buffer[done:]
        done = max(0, done - len(buffer))
