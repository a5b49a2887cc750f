"""To and from the formats of others, without executing anything that they bring along.

  holdfast convert model.safetensors runs/base            into step 0 of a run
  holdfast convert hf-model-directory runs/base --step 5
  holdfast convert checkpoint.pt runs/base                torch files, loaded with weights_only
  holdfast convert dcp-directory runs/base                torch.distributed.checkpoint
  holdfast convert runs/exp1@1200 hf-out --to safetensors the model, as Hugging Face expects it

Memory stays bounded by --max-memory whatever the size.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase

from holdfast.ckpt.catalog import open_checkpoint
from holdfast.ckpt.exporting import FILE_NBYTES, export_safetensors
from holdfast.ckpt.importing import KINDS, import_checkpoint, open_source
from holdfast.ckpt.stream import DEFAULT_MEMORY_NBYTES
from holdfast.cli.talk import add_json, add_path, count, parse_size, print_json, progress, say, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "source", "what to convert: a file, a directory, or RUN@STEP")
    add_path(parser, "out", "a run (to universal) or a new directory")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="the source's format (default: recognized)")
    parser.add_argument("--to", choices=("universal", "safetensors"), default="universal", help="default: universal")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="the step to import as (default: 0)")
    parser.add_argument("--group", default="model", help="the group that names get or lose (default: model)")
    parser.add_argument("--only", metavar="PATTERN", help="only arrays whose name matches (to safetensors)")
    parser.add_argument("--file-size", type=parse_size, default=FILE_NBYTES, metavar="SIZE", help="default: 5GB a file")
    parser.add_argument("--max-memory", type=parse_size, default=DEFAULT_MEMORY_NBYTES, metavar="SIZE", help="default: 1GiB")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    return _export(arguments) if arguments.to == "safetensors" else _import(arguments)


def _import(arguments: argparse.Namespace) -> int:
    source = open_source(arguments.source, arguments.kind)
    about = f"{count(len(source.arrays), 'array')}, {size(source.nbytes)}, from {source.kind}"
    path = None
    if not arguments.dry_run:
        with progress("importing", source.nbytes) as advance:
            path = import_checkpoint(source, arguments.out, step=arguments.step, group=arguments.group, progress=advance)
    if arguments.json:
        print_json(
            {"path": path, "kind": source.kind, "arrays": len(source.arrays), "nbytes": source.nbytes, "dry_run": path is None}
        )
    elif path is not None:
        print(path)
    say(about if path is not None else f"would import {about}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(arguments.source)
    with progress("exporting", checkpoint.nbytes) as advance:
        exported = export_safetensors(
            checkpoint,
            arguments.out,
            only=(lambda name: fnmatchcase(name, arguments.only)) if arguments.only else None,
            group=arguments.group,
            file_nbytes=arguments.file_size,
            max_memory_nbytes=arguments.max_memory,
            dry_run=arguments.dry_run,
            progress=advance,
        )
    if arguments.json:
        print_json(exported)
    else:
        print("\n".join(exported.files))
        say(f"{'would write' if arguments.dry_run else 'wrote'} {count(exported.arrays, 'array')}, {size(exported.nbytes)}")
    return 0
