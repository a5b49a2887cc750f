"""A universal checkpoint as Hugging Face safetensors: files of bounded size with an index, streamed, or shared without a copy.

Arrays whose shard was written as a safetensors file at the same time (`dual.py`) are hard-linked: their bytes are checked, and not
copied. All others are streamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.arrays import ArraySpec, Box
from holdfast.ckpt import storage
from holdfast.ckpt.cuts import LocalArray, Part
from holdfast.ckpt.dual import can_be_dual, tensor_name
from holdfast.ckpt.durable import check_room, sync_files
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.reading import Progress
from holdfast.ckpt.reshard import plan_reshard
from holdfast.ckpt.restore import fresh_directory
from holdfast.ckpt.rules import Rules
from holdfast.ckpt.safetensors import write_skeleton
from holdfast.ckpt.stream import DEFAULT_MEMORY_NBYTES, Destination, stream
from holdfast.ckpt.verify import verify_array
from holdfast.errors import ConfigError, CorruptData

FILE_NBYTES = 5_000_000_000
"""What Hugging Face calls a shard is at most this large, unless one tensor alone is larger."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written; `linked_nbytes` of it without copying, as files shared with the checkpoint."""

    out: str
    step: int
    files: tuple[str, ...]
    arrays: int
    nbytes: int
    linked_nbytes: int = 0


def export_safetensors(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    only: Callable[[str], bool] | None = None,
    group: str = "model",
    rules: Rules | None = None,
    file_nbytes: int = FILE_NBYTES,
    max_memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """`out` holds `model.safetensors`, or several files and `model.safetensors.index.json`; names lose `group/`.

    Without `only`, the arrays of `group` are exported: a model without its optimizer. `rules` give it the other side's names and
    shapes: blocks fused, experts apart.
    """
    chosen = only or (lambda name: name.startswith(f"{group}/"))
    picked = {name: spec for name, spec in checkpoint.specs.items() if chosen(name)}
    if not picked:
        raise ConfigError(f"{checkpoint.path}: no array is in group {group!r}; it has {', '.join(_groups(checkpoint))}")
    tensors = _tensors(picked, group, rules)
    out = Path(out)
    linked = _linkable(checkpoint, tensors, out)
    files = _files({name: tensor for name, tensor in tensors.items() if name not in linked}, file_nbytes, len(linked))
    streamed, nbytes = list(files), sum(tensor.nbytes for tensor in tensors.values())
    files |= {_numbered(len(streamed) + 1 + number, len(streamed) + len(linked)): [name] for number, name in enumerate(linked)}
    linked_nbytes = sum(tensors[name].nbytes for name in linked)
    if not dry_run:
        with fresh_directory(out) as place:
            check_room(out, nbytes - linked_nbytes)
            for file in streamed:
                chosen_here = {name: tensors[name] for name in files[file]}
                _write(checkpoint, place / file, chosen_here, max_memory_nbytes, progress)
            for file, name in zip(list(files)[len(streamed) :], linked, strict=True):
                _link(checkpoint, linked[name], place / file, progress)
            if len(files) > 1:
                _write_index(place, files, nbytes)
            sync_files(place.iterdir())
    return Exported(str(out), checkpoint.step, tuple(files), len(tensors), nbytes, linked_nbytes)


def _linkable(checkpoint: Checkpoint, tensors: Mapping[str, LocalArray], out: Path) -> dict[str, str]:
    """Tensors whose shard is a safetensors file of exactly them, on the filesystem that they go to: array by tensor."""
    above = next(place for place in out.absolute().parents if place.exists())
    if not isinstance(checkpoint.path, Path) or os.stat(above).st_dev != os.stat(checkpoint.path).st_dev:
        return {}
    found = {}
    for name, tensor in sorted(tensors.items()):
        array = tensor.parts[0].array if tensor.parts else ""
        layout = checkpoint.layouts.get(array)
        whole = layout is not None and tensor.parts[0].box == Box.whole(layout.spec.shape) and tensor.shape == layout.spec.shape
        if layout is not None and whole and layout.head_nbytes and can_be_dual(layout) and tensor_name(layout) == name:
            found[name] = array
    return found


def _link(checkpoint: Checkpoint, array: str, path: Path, progress: Progress | None) -> None:
    """The file is the checkpoint's own, after every byte of it has been checked."""
    directory = storage.local(checkpoint.path, "a link")
    damage = next(iter(verify_array(checkpoint, array, progress)), None)
    if damage is not None:
        raise CorruptData(f"step {checkpoint.step}, {damage}; nothing of it was exported")
    os.link(directory / checkpoint.layouts[array].file(0), path)


def _tensors(specs: Mapping[str, ArraySpec], group: str, rules: Rules | None) -> dict[str, LocalArray]:
    """The other side's tensors by name."""
    if rules is not None:
        (locals_,) = plan_reshard(specs, Mesh.parse("dp=1"), rules=rules).ranks
    else:
        locals_ = tuple(
            LocalArray(name, spec.dtype, spec.shape, (Part(name, Box.whole(spec.shape), (0,) * len(spec.shape)),))
            for name, spec in specs.items()
        )
    return {local.name.removeprefix(f"{group}/"): local for local in locals_}


def _groups(checkpoint: Checkpoint) -> list[str]:
    return sorted({name.split("/", 1)[0] for name in checkpoint.specs})


def _files(tensors: Mapping[str, LocalArray], file_nbytes: int, others: int) -> dict[str, list[str]]:
    """Names by file, filled in order of name; `others` is how many files there are besides."""
    if not tensors:
        return {}
    groups: list[list[str]] = [[]]
    held = 0
    for name in sorted(tensors):
        if groups[-1] and held + tensors[name].nbytes > file_nbytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += tensors[name].nbytes
    if len(groups) + others == 1:
        return {"model.safetensors": groups[0]}
    return {_numbered(number, len(groups) + others): names for number, names in enumerate(groups, 1)}


def _numbered(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write(
    checkpoint: Checkpoint, path: Path, tensors: Mapping[str, LocalArray], memory: int, progress: Progress | None
) -> None:
    specs = [ArraySpec(name, tensor.dtype, tensor.tensor_shape) for name, tensor in tensors.items()]
    begins = write_skeleton(path, specs, {"format": "pt"})
    destinations = [Destination(tensor, ((path, begins[name]),)) for name, tensor in tensors.items() if tensor.nbytes]
    stream(checkpoint, destinations, max_memory_nbytes=memory, progress=progress)


def _write_index(place: Path, files: Mapping[str, Sequence[str]], nbytes: int) -> None:
    weights = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weights.items()))}
    (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
