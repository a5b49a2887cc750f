"""Cut a checkpoint for a mesh, and write it as files that a job can load.

  holdfast restore runs/exp1 --mesh dp=2 --out two
  holdfast restore runs/exp1@1200 --mesh dp=2,tp=4 --out out --format safetensors
  holdfast restore runs/exp1 --mesh pp=4,dp=8 --out out --rules megatron.toml --dry-run

Axes of a mesh: dp (cut by rows, as FSDP2 does), ddp (copies), tp, ep, pp. Formats: torch (rank-00000.pt …, for
torch.load(weights_only=True)), safetensors, universal, dcp. Every byte is checked on the way; OUT appears whole or not at all.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase

from holdfast.ckpt.catalog import open_checkpoint
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.restore import FORMATS, Restored, restore
from holdfast.ckpt.rules import load_rules
from holdfast.ckpt.stream import DEFAULT_MEMORY_NBYTES
from holdfast.cli.talk import add_json, add_path, parse_size, print_json, progress, say, size, table, vars_of

SHOWN = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser)
    parser.add_argument("--mesh", required=True, help="the target, like dp=2,tp=4")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument("--format", choices=FORMATS, default="torch", help="default: torch")
    parser.add_argument("--rules", metavar="FILE", help="layout rules (TOML) that say how arrays are cut")
    parser.add_argument("--only", metavar="PATTERN", help="only arrays whose name matches, like 'model/*'")
    parser.add_argument("--max-memory", type=parse_size, default=DEFAULT_MEMORY_NBYTES, metavar="SIZE", help="default: 1GiB")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    mesh = Mesh.parse(arguments.mesh)
    rules = load_rules(arguments.rules) if arguments.rules else None
    checkpoint = open_checkpoint(arguments.path)
    with progress(f"restoring step {checkpoint.step}", checkpoint.nbytes) as advance:
        restored = restore(
            checkpoint,
            mesh,
            arguments.out,
            arguments.format,
            rules=rules,
            only=(lambda name: fnmatchcase(name, arguments.only)) if arguments.only else None,
            max_memory_nbytes=arguments.max_memory,
            dry_run=arguments.dry_run,
            progress=advance,
        )
    if arguments.json:
        print_json(
            {**vars_of(restored), "read_amplification": restored.read_amplification, "estimated_s": restored.estimated_s}
        )
    else:
        _print(restored)
    return 0


def _print(restored: Restored) -> None:
    rows = [(str(rank.rank), rank.file, f"{rank.arrays:,}", size(rank.nbytes)) for rank in restored.ranks[:SHOWN]]
    print(table(("RANK", "FILE", "ARRAYS", "SIZE"), rows, right=(0, 2, 3)))
    if len(restored.ranks) > SHOWN:
        print(f"… and {len(restored.ranks) - SHOWN} more ranks")
    would = "would write" if restored.dry_run else "wrote"
    say(
        f"step {restored.step} {would} {size(restored.nbytes)} to {restored.out}, reading {size(restored.read_nbytes)} "
        f"({restored.read_amplification:.2f}×) with at most {size(restored.memory_nbytes)} of buffers"
        + ("" if restored.dry_run else f", in {restored.seconds:.1f} s")
    )
    if restored.estimated_s is not None and restored.read_nbytes_per_s is not None:
        say(
            f"reading would take {_duration(restored.estimated_s)} at {size(restored.read_nbytes_per_s)}/s, measured just now on a "
            "little of it (what is in the page cache reads faster than the disk)"
        )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "less than a second"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
