"""What a person reads: tables and sizes on stdout, progress and complaints on stderr, JSON for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)B?", re.IGNORECASE)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_path(parser: argparse.ArgumentParser, name: str = "path", about: str = "a run, a step directory, or RUN@STEP") -> None:
    parser.add_argument(name, metavar=name.upper(), help=about)


def print_json(value: Any) -> None:
    print(json.dumps(value, default=plain, indent=1))


def vars_of(value: Any) -> dict[str, Any]:
    """A dataclass's fields by name."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def plain(value: Any) -> Any:
    from holdfast.ckpt.storage import RemotePath  # a verb that prints one has loaded it

    if isinstance(value, RemotePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return vars_of(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def complain(message: str, kind: str = "") -> None:
    """One readable message on stderr."""
    bold, red, plain = ("\x1b[1m", "\x1b[31m", "\x1b[0m") if sys.stderr.isatty() else ("", "", "")
    print(f"{red}{bold}holdfast:{plain} {kind + ': ' if kind else ''}{message}", file=sys.stderr)


def say(message: str) -> None:
    print(message, file=sys.stderr)


def size(nbytes: float) -> str:
    """1.5 GiB, with three digits that matter."""
    for unit in _UNITS:
        if nbytes < 1024 or unit == _UNITS[-1]:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def parse_size(text: str) -> int:
    """4GiB, 512MiB, 1000000: a number of bytes; units are powers of 1024 with an i, of 1000 without."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write 4GiB or 512MiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGTP".index(unit.upper()) if unit else 0))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Aligned columns; those numbered in `right` lean to the right."""
    lines = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    lean = set(right)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in lean else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


@contextmanager
def progress(doing: str, total_nbytes: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr that counts bytes, where stderr is a terminal and the work is worth one."""
    if not sys.stderr.isatty() or total_nbytes < 64 << 20:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total_nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)
