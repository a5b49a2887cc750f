"""To and from the formats of others, without executing anything that they bring along.

  holdfast convert model.safetensors runs/base            into step 0 of a run
  holdfast convert hf-model-directory runs/base --step 5
  holdfast convert checkpoint.pt runs/base                torch files, loaded with weights_only
  holdfast convert dcp-directory runs/base                torch.distributed.checkpoint
  holdfast convert deepspeed-directory runs/base          ZeRO 1, 2 and 3: parameters, optimizer state, masters
  holdfast convert megatron-directory runs/base --rules rules.toml
  holdfast convert runs/exp1@1200 hf-out --to safetensors the model, as Hugging Face expects it
  holdfast convert runs/exp1@1200 dcp-out --to dcp        everything, for torch.distributed.checkpoint

Memory stays bounded by --max-memory whatever the size. Rules (docs/ckpt.md) rename, split, stack and join arrays, both ways.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fnmatch import fnmatchcase

from holdfast.ckpt.catalog import open_checkpoint
from holdfast.ckpt.exporting import FILE_NBYTES, export_safetensors
from holdfast.ckpt.importing import KINDS, import_checkpoint, open_source
from holdfast.ckpt.restore import restore
from holdfast.ckpt.rules import Rules, load_rules
from holdfast.ckpt.stream import DEFAULT_MEMORY_NBYTES
from holdfast.cli.talk import add_json, add_path, count, parse_size, print_json, progress, say, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "source", "what to convert: a file, a directory, or RUN@STEP")
    add_path(parser, "out", "a run (to universal) or a new directory")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="the source's format (default: recognized)")
    parser.add_argument("--to", choices=("universal", "safetensors", "dcp"), default="universal", help="default: universal")
    parser.add_argument("--step", type=int, metavar="N", help="the step to import as (default: the source's own, or 0)")
    parser.add_argument("--rules", metavar="FILE", help="layout rules (TOML) between the other side's arrays and ours")
    parser.add_argument(
        "--inert", action="append", default=[], metavar="CLASS", help="pass over objects of this class in torch files"
    )
    parser.add_argument(
        "--dual", action="store_true", help="write large arrays as safetensors files too, to export them without a copy"
    )
    parser.add_argument("--group", default="model", help="the group that names get or lose (default: model)")
    parser.add_argument("--only", metavar="PATTERN", help="only arrays whose name matches (exports)")
    parser.add_argument("--file-size", type=parse_size, default=FILE_NBYTES, metavar="SIZE", help="default: 5GB a file")
    parser.add_argument("--max-memory", type=parse_size, default=DEFAULT_MEMORY_NBYTES, metavar="SIZE", help="default: 1GiB")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    verbs = {"universal": _import, "safetensors": _to_safetensors, "dcp": _to_dcp}
    return verbs[arguments.to](arguments)


def _import(arguments: argparse.Namespace) -> int:
    source = open_source(
        arguments.source, arguments.kind, rules=_rules(arguments), inert=arguments.inert, group=arguments.group
    )
    about = f"{count(len(source.arrays), 'array')}, {size(source.nbytes)}, from {source.kind}"
    path = None
    if not arguments.dry_run:
        with progress("importing", source.nbytes) as advance:
            path = import_checkpoint(
                source,
                arguments.out,
                step=arguments.step,
                max_memory_nbytes=arguments.max_memory,
                dual=arguments.dual,
                progress=advance,
            )
    if arguments.json:
        print_json(
            {
                "path": path,
                "kind": source.kind,
                "step": source.step if arguments.step is None else arguments.step,
                "arrays": len(source.arrays),
                "nbytes": source.nbytes,
                "left_out": source.left_out,
                "dry_run": path is None,
            }
        )
    elif path is not None:
        print(path)
    for what in source.left_out:
        say(f"left out: {what}")
    say(about if path is not None else f"would import {about}")
    return 0


def _to_safetensors(arguments: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(arguments.source)
    with progress("exporting", checkpoint.nbytes) as advance:
        exported = export_safetensors(
            checkpoint,
            arguments.out,
            only=_only(arguments),
            group=arguments.group,
            rules=_rules(arguments),
            file_nbytes=arguments.file_size,
            max_memory_nbytes=arguments.max_memory,
            dry_run=arguments.dry_run,
            progress=advance,
        )
    if arguments.json:
        print_json(exported)
    else:
        print("\n".join(exported.files))
        linked = f", {size(exported.linked_nbytes)} of it shared with the checkpoint" if exported.linked_nbytes else ""
        say(
            f"{'would write' if arguments.dry_run else 'wrote'} {count(exported.arrays, 'array')}, {size(exported.nbytes)}{linked}"
        )
    return 0


def _to_dcp(arguments: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(arguments.source)
    with progress("exporting", checkpoint.nbytes) as advance:
        exported = restore(
            checkpoint,
            "dp=1",
            arguments.out,
            "dcp",
            rules=_rules(arguments),
            only=_only(arguments),
            max_memory_nbytes=arguments.max_memory,
            dry_run=arguments.dry_run,
            progress=advance,
        )
    if arguments.json:
        print_json(exported)
    else:
        print(exported.out)
        arrays = exported.ranks[0].arrays
        say(f"{'would write' if arguments.dry_run else 'wrote'} {count(arrays, 'array')}, {size(exported.nbytes)}")
    return 0


def _rules(arguments: argparse.Namespace) -> Rules | None:
    return load_rules(arguments.rules) if arguments.rules else None


def _only(arguments: argparse.Namespace) -> Callable[[str], bool] | None:
    return (lambda name: fnmatchcase(name, arguments.only)) if arguments.only else None
