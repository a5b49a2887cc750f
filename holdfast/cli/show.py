"""What is in a checkpoint: its arrays as a tree with sizes, and where it came from.

holdfast show runs/exp1              the newest step
holdfast show runs/exp1@1200         a certain step
holdfast show runs/exp1 --depth 2    only the first levels
holdfast show runs/exp1 --only 'optim/*/exp_avg'
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from holdfast.arrays import ArraySpec
from holdfast.ckpt.catalog import open_checkpoint
from holdfast.ckpt.reader import Checkpoint
from holdfast.cli.talk import add_json, add_path, count, print_json, size
from holdfast.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument("--depth", type=int, default=0, metavar="N", help="show N levels (default: all)")
    parser.add_argument("--only", metavar="PATTERN", help="only arrays whose name matches, like 'model/*.weight'")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(arguments.path)
    specs = [spec for name, spec in checkpoint.specs.items() if fnmatchcase(name, arguments.only or "*")]
    if not specs and arguments.only:
        raise ConfigError(f"{checkpoint.path}: no array is named like {arguments.only!r}")
    if arguments.json:
        print_json(_document(checkpoint, specs))
        return 0
    about = f"step {checkpoint.step}, {count(len(checkpoint.specs), 'array')}, {size(checkpoint.nbytes)}"
    print(f"{checkpoint.path}: {about}{_origin(checkpoint)}")
    for line in _lines(_tree(specs), arguments.depth):
        print(line)
    for line in _objects(checkpoint):
        print(line)
    return 0


def _origin(checkpoint: Checkpoint) -> str:
    mesh = checkpoint.layout.get("mesh")
    ranks = f", saved by {count(len(checkpoint.objects), 'rank')}" if checkpoint.objects else ""
    shape = ",".join(f"{axis}={extent}" for axis, extent in mesh.items()) if isinstance(mesh, dict) else ""
    return f"{ranks}{f' ({shape})' if shape else ''}"


def _objects(checkpoint: Checkpoint) -> Iterator[str]:
    """The names of the objects, ranks that have the same ones together."""
    ranks: dict[tuple[str, ...], list[int]] = {}
    for rank, objects in sorted(checkpoint.objects.items()):
        ranks.setdefault(tuple(sorted(objects)), []).append(rank)
    for names, who in ranks.items():
        label = f"rank {who[0]}" if len(who) == 1 else f"{len(who)} ranks"
        yield f"objects of {label}: {', '.join(names) or 'none'}"


def _document(checkpoint: Checkpoint, specs: Iterable[ArraySpec]) -> dict[str, object]:
    return {
        "path": checkpoint.path,
        "step": checkpoint.step,
        "nbytes": checkpoint.nbytes,
        "created_s": checkpoint.record.created_s,
        "layout": checkpoint.layout,
        "arrays": [{"name": spec.name, "dtype": spec.dtype, "shape": spec.shape, "nbytes": spec.nbytes} for spec in specs],
        "objects": {str(rank): sorted(objects) for rank, objects in sorted(checkpoint.objects.items())},
    }


@dataclass
class _Node:
    """A group with what is below it, or an array."""

    nbytes: int = 0
    arrays: int = 0
    spec: ArraySpec | None = None
    below: dict[str, _Node] = field(default_factory=dict)


def _tree(specs: Iterable[ArraySpec]) -> _Node:
    """Names are cut at '/' and at '.', so that a layer's parameters stand together."""
    root = _Node()
    for spec in specs:
        node = root
        for part in _parts(spec.name):
            node.nbytes, node.arrays = node.nbytes + spec.nbytes, node.arrays + 1
            node = node.below.setdefault(part, _Node())
        node.nbytes, node.arrays, node.spec = node.nbytes + spec.nbytes, node.arrays + 1, spec
    return root


def _parts(name: str) -> list[str]:
    return re.findall(r"[/.]?[^/.]+", name)


def _lines(node: _Node, depth: int, indent: str = "") -> Iterator[str]:
    level = len(indent) // 2 + 1
    for name, below in sorted(node.below.items(), key=lambda item: _natural(item[0])):
        name, below = _joined(name, below)
        label = indent + name.lstrip("/.")
        if below.spec is not None:
            shape = "×".join(map(str, below.spec.shape)) or "scalar"
            yield f"{label:<48} {size(below.spec.nbytes):>10}  {below.spec.dtype} {shape}"
        if below.below:
            yield f"{label:<48} {size(below.nbytes):>10}  {count(below.arrays, 'array')}"
            if not depth or level < depth:
                yield from _lines(below, depth, indent + "  ")


def _joined(name: str, node: _Node) -> tuple[str, _Node]:
    """A chain of groups with one child each on one line."""
    while node.spec is None and len(node.below) == 1:
        part, node = next(iter(node.below.items()))
        name += part
    return name, node


def _natural(name: str) -> tuple[int, int | str]:
    word = name.lstrip("/.")
    return (0, int(word)) if word.isdigit() else (1, word)
