"""A universal checkpoint as Hugging Face safetensors: files of bounded size with an index, streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from holdfast.arrays import ArraySpec, Box
from holdfast.ckpt.durable import check_room, sync_files
from holdfast.ckpt.reader import Checkpoint, Progress
from holdfast.ckpt.reshard import LocalArray, Part
from holdfast.ckpt.restore import fresh_directory
from holdfast.ckpt.safetensors import write_skeleton
from holdfast.ckpt.stream import DEFAULT_MEMORY_NBYTES, Destination, stream
from holdfast.errors import ConfigError

FILE_NBYTES = 5_000_000_000
"""What Hugging Face calls a shard is at most this large, unless one tensor alone is larger."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    out: str
    step: int
    files: tuple[str, ...]
    arrays: int
    nbytes: int


def export_safetensors(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    only: Callable[[str], bool] | None = None,
    group: str = "model",
    file_nbytes: int = FILE_NBYTES,
    max_memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """`out` holds `model.safetensors`, or several files and `model.safetensors.index.json`; names lose `group/`.

    Without `only`, the arrays of `group` are exported: a model without its optimizer.
    """
    chosen = only or (lambda name: name.startswith(f"{group}/"))
    specs = {_short(name, group): spec for name, spec in checkpoint.specs.items() if chosen(name)}
    if not specs:
        raise ConfigError(f"{checkpoint.path}: no array is in group {group!r}; it has {', '.join(_groups(checkpoint))}")
    files = _files(specs, file_nbytes)
    nbytes = sum(spec.nbytes for spec in specs.values())
    out = Path(out)
    if not dry_run:
        with fresh_directory(out) as place:
            check_room(out, nbytes)
            for file, names in files.items():
                _write(checkpoint, place / file, {name: specs[name] for name in names}, max_memory_nbytes, progress)
            if len(files) > 1:
                weights = {name: file for file, names in files.items() for name in names}
                index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weights.items()))}
                (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
            sync_files(place.iterdir())
    return Exported(str(out), checkpoint.step, tuple(files), len(specs), nbytes)


def _short(name: str, group: str) -> str:
    return name.removeprefix(f"{group}/")


def _groups(checkpoint: Checkpoint) -> list[str]:
    return sorted({name.split("/", 1)[0] for name in checkpoint.specs})


def _files(specs: dict[str, ArraySpec], file_nbytes: int) -> dict[str, list[str]]:
    """Names by file, filled in order of name."""
    groups: list[list[str]] = [[]]
    held = 0
    for name in sorted(specs):
        if groups[-1] and held + specs[name].nbytes > file_nbytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += specs[name].nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _write(checkpoint: Checkpoint, path: Path, specs: dict[str, ArraySpec], memory: int, progress: Progress | None) -> None:
    named = [ArraySpec(name, spec.dtype, spec.shape) for name, spec in specs.items()]
    begins = write_skeleton(path, named, {"format": "pt"})
    destinations = []
    for name, spec in specs.items():
        part = Part(spec.name, Box.whole(spec.shape), (0,) * len(spec.shape))
        if spec.nbytes:
            destinations.append(Destination(LocalArray(name, spec.dtype, spec.shape, (part,)), path, begins[name]))
    stream(checkpoint, destinations, max_memory_nbytes=memory, progress=progress)
