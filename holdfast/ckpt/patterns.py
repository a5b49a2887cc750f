"""Name patterns that remember what they matched, so that one name can be turned into another.

Patterns are those of a shell (`*`, `?`, `[…]`), and `{}` stands for a whole number: that of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

NUMBER = "{}"

_TOKEN = re.compile(r"\{\}|\*|\?|\[[^\]]+\]")


def matched(pattern: str, name: str) -> tuple[tuple[str, ...], int | None] | None:
    """What the wildcards of `pattern` stand for in `name`, and the number at `{}`; None when the name does not match."""
    match = _compiled(pattern).fullmatch(name)
    if match is None:
        return None
    number = match.groupdict().get("number")
    wild = tuple(value for key, value in sorted(match.groupdict().items()) if key != "number")
    return wild, None if number is None else int(number)


def filled(pattern: str, wild: Sequence[str], number: int | None = None) -> str:
    """The name that `pattern` is when its wildcards stand for `wild`, in order, and `{}` for `number`."""
    values = iter(wild)
    return _TOKEN.sub(lambda token: str(number) if token[0] == NUMBER else next(values), pattern)


def wildcards(pattern: str) -> int:
    return sum(token != NUMBER for token in _TOKEN.findall(pattern))


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    text, end, count = "", 0, 0
    for token in _TOKEN.finditer(pattern):
        text += re.escape(pattern[end : token.start()])
        text += r"(?P<number>\d+)" if token[0] == NUMBER else f"(?P<w{count:04d}>{_wild(token[0])})"
        end, count = token.end(), count + 1
    return re.compile(text + re.escape(pattern[end:]), re.DOTALL)


def _wild(token: str) -> str:
    if token in ("*", "?"):
        return ".*" if token == "*" else "."
    inside = token[1:-1].replace("\\", r"\\")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
