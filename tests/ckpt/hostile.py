"""Makes the folder of hostile checkpoints that stays in the repository: `python -m tests.ckpt.hostile`.

Each folder in tests/ckpt/hostile is one attack or one kind of rot, as small as it can be; `expected.json` says which error has to
name it. The files are kept, and not made by the tests, so that what was refused once stays refused by every later release.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from holdfast import ckpt
from holdfast.ckpt.parity import add_parity
from tests.ckpt.saving import Sample, save
from tests.ckpt.test_damage import HOSTILE as CHECKPOINTS
from tests.ckpt.test_parity import hostile as parity_header

KEPT = Path(__file__).with_name("hostile")
STEP = "step-00000004"

LARGER_THAN_KEPT = {"a document of 5 GiB"}
"""What only a sparse file can be; `test_damage.py` makes it."""


class Payload:
    """What an attacker would pickle."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch deceived",)


def checkpoint(place: Path) -> Path:
    """The sound checkpoint that is then spoiled: one array that is read from its file, one that is small."""
    large = Sample.random("model/large.weight", "int8", (900, 100))
    flat = Sample(large.spec, bytes(byte % 7 for byte in range(100)) * 900)
    return save(
        place, [flat, Sample.random("model/norm.weight", "float32", (4,))], {large.spec.name: ((0, 2),)}, step=4, world=1
    )


def spoiled(spoil: Callable[[Path], None]) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        step = checkpoint(place)
        spoil(step)
        data = step / "model/large.weight/c/0/0"
        if data.exists() and not data.is_symlink() and not data.parents[2].is_symlink():
            data.write_bytes(b"")  # refused before it is read, so nobody has to keep it
        for path in [*place.rglob("*")]:
            if path.is_symlink():
                target = os.path.relpath(path.readlink(), path.parent)
                path.unlink()
                path.symlink_to(target)
        return step

    return make


def file(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        place.mkdir(parents=True)
        (place / name).write_bytes(data)
        return place / name

    return make


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> Callable[[Path], Path]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return file("model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text + data)


def torch_file(place: Path) -> Path:
    place.mkdir(parents=True)
    torch.save({"w": torch.ones(3), "x": Payload()}, place / "evil.pt")
    return place / "evil.pt"


def dcp_directory(metadata: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        dcp.save({"w": torch.ones(3)}, checkpoint_id=place, no_dist=True)
        (place / ".metadata").write_bytes(metadata)
        return place

    return make


def deepspeed(place: Path) -> Path:
    place.mkdir(parents=True)
    torch.save({"optimizer_state_dict": Payload()}, place / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"module": {}}, place / "mp_rank_00_model_states.pt")
    return place


def megatron(place: Path) -> Path:
    (place / "mp_rank_00").mkdir(parents=True)
    torch.save({"model": {"w": torch.ones(3)}, "args": Payload()}, place / "mp_rank_00/model_optim_rng.pt")
    return place


def parity(place: Path) -> Path:
    step = checkpoint(place)
    add_parity(step, ckpt.Parity(data=2))
    (step / "_holdfast/parity/000.parity").write_bytes(parity_header("../../outside").to_bytes() + bytes(32768))
    (step / "model/large.weight/c/0/0").write_bytes(b"")
    return step


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

FOREIGN: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "safetensors whose header is longer than the file": (
        safetensors({"w": ENTRY}, bytes(8), 10**12),
        "UnsupportedFormat",
        "its header would be",
    ),
    "safetensors that leave the directory": (safetensors({"../../w": ENTRY}, bytes(8)), "UnsupportedFormat", "is broken"),
    "safetensors that overlap": (
        safetensors({"w": ENTRY, "v": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
        "UnsupportedFormat",
        "share bytes",
    ),
    "safetensors that are truncated": (safetensors({"w": ENTRY}, bytes(3)), "CorruptData", "truncated"),
    "a torch file that runs a command": (torch_file, "UnsupportedFormat", "without executing code"),
    "a torch file that is none": (file("model.pt", b"\x80\x02nonsense"), "UnsupportedFormat", "no torch file"),
    "DCP metadata that runs a command": (
        dcp_directory(pickle.dumps(Payload())),
        "UnsupportedFormat",
        r"asks for posix\.system",
    ),
    "DCP metadata that is nonsense": (dcp_directory(b"nonsense"), "CorruptData", "not DCP's metadata"),
    "DeepSpeed files that run a command": (deepspeed, "UnsupportedFormat", "without executing code"),
    "Megatron files that run a command": (megatron, "UnsupportedFormat", "without executing code"),
}


def main() -> None:
    shutil.rmtree(KEPT, ignore_errors=True)
    expected: dict[str, dict[str, str]] = {}

    def keep(what: str, make: Callable[[Path], Path], kind: str, error: str, words: str) -> None:
        folder = what.replace(" ", "-").replace("/", "-").replace("^", "")
        path = make(KEPT / folder)
        place = path.relative_to(KEPT).as_posix()
        expected[what] = {"path": place, "kind": kind, "error": error, "words": words}

    for what, (spoil, error, words) in CHECKPOINTS.items():
        if what not in LARGER_THAN_KEPT:
            keep(what, spoiled(spoil), "checkpoint", error.__name__, words)
    for what, (make, name, words) in FOREIGN.items():
        keep(what, make, "foreign", name, words)
    keep("parity that leaves the directory", parity, "parity", "ConfigError", "has no sound parity")
    (KEPT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
