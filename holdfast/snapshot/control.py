"""One page that a trainer and its keeper share: where the trainer is, and which step it should capture next.

Every word is an aligned 64-bit integer with a single writer, so neither side ever waits for the other. The training loop reads
one word per step; that is all a step without a snapshot costs.

`gone` says that the keeper was told to end and its memory given back: it does not come back, and is not to be brought back.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

NBYTES = 4096

# word -> who writes it
_TRAINER = {"pid": 0, "completed": 1, "finishing": 2, "capture_us": 3, "step_us": 4}
_KEEPER = {"epoch": 8, "target": 9, "committed": 10, "checkpoint": 11, "stopped": 12, "unsaved": 13, "look": 14, "gone": 15}
COUNTS = {"completed": 1, "captured": 24, "skipped": 25, "dropped": 26, "failed": 27, "stall_us": 28}  # the trainer
_GUARD = {"poisoned": 32}  # the keeper: the step at which it found parameters that are not finite, and was told to step back
_WORDS = _TRAINER | _KEEPER | COUNTS | _GUARD


class ControlPage:
    """The shared page of one rank, as named integers. All words are zero until somebody has set them."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        try:
            if create:
                os.posix_fallocate(fd, 0, NBYTES)
            self._map = mmap.mmap(fd, NBYTES)
            self._path, self._inode = path, os.fstat(fd).st_ino
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")

    def __getitem__(self, word: str) -> int:
        return self._words[_WORDS[word]]

    def __setitem__(self, word: str, value: int) -> None:
        self._words[_WORDS[word]] = value

    def is_current(self) -> bool:
        """False once the keeper has put another page in this one's place, for another process."""
        try:
            return os.stat(self._path).st_ino == self._inode
        except OSError:
            return False

    @property
    def target(self) -> tuple[int, int, int]:
        """The step to capture, the slot it goes to and the number of the order; one word, so that all change together."""
        word = self["target"]
        return word >> 17, word & 1, word >> 1 & 0xFFFF

    def set_target(self, step: int, index: int) -> None:
        """Order a capture. A step ordered once more is a new order: what was captured for the last one may be void."""
        order = (self["target"] >> 1) + 1 & 0xFFFF
        self["target"] = step << 17 | order << 1 | index

    @property
    def finished(self) -> tuple[int, bool] | None:
        """The step at which the rank's loop ended, and whether it waits for that step to be kept; None while it trains."""
        word = self["finishing"]
        return (word >> 2, bool(word & 2)) if word else None

    def set_finished(self, step: int, *, keep: bool) -> None:
        self["finishing"] = step << 2 | keep << 1 | 1

    def words(self) -> dict[str, int]:
        """All that stands on the page, for one that takes its place."""
        return {word: self[word] for word in _WORDS}

    def take_over(self, words: Mapping[str, int]) -> None:
        """Go on from another page's words; orders too, so that one which was carried out is not taken for new."""
        for word in words.keys() & _WORDS.keys():
            self[word] = words[word]

    def catch_up(self, former: ControlPage) -> None:
        """What the trainer still wrote to its former page while this one was taking that one's place."""
        for word in _TRAINER | COUNTS:
            if former[word] > self[word]:
                self[word] = former[word]

    def close(self) -> None:
        self._words.release()
        self._map.close()
