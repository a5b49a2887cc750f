"""Megatron-style checkpoints: one file for each tensor-, pipeline- and expert-parallel rank, put together by layout rules.

    iter_0001000/mp_rank_00/model_optim_rng.pt           tensor parallelism alone
    iter_0001000/mp_rank_00_000/model_optim_rng.pt       and pipeline stages
    iter_0001000/mp_rank_00_000_000/model_optim_rng.pt   and expert parallelism

A file holds `model` (or `model0`, `model1`, … where a rank has several pipeline chunks), `args` and `iteration`. Layers are counted
from 0 in every chunk. Which dimension of which parameter was cut, which blocks were fused and what is padding, the files do not
say: rules do. Without a rule file those of Megatron-Core's GPT are used.

The optimizer's state is numbered in an order that the files do not say either, so it is not brought along, and that is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.ckpt.foreign.join import Held, join
from holdfast.ckpt.foreign.source import Source, tensor_source
from holdfast.ckpt.foreign.torchfiles import field_of, load_torch
from holdfast.ckpt.rules import Rule, Rules
from holdfast.errors import LayoutMismatch, MissingData, NotACheckpoint, UnsupportedFormat

INERT = (
    "megatron",
    "argparse.Namespace",
    "numpy",
    "transformer_engine",
    "torch.distributed",
    "torch._C",
    "torch.nn.init",
    "signal",
    "pathlib",
    "types.SimpleNamespace",
    "functools.partial",
)
"""Whose objects such a file holds beside its tensors: the arguments of the run, enumerations, random states."""

FILES = ("model_optim_rng.pt", "model_rng.pt")

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_CHUNK = re.compile(r"model(\d*)")


def rules_of_megatron(vocabulary: int | None = None, gated: bool = True) -> Rules:
    """Megatron-Core's GPT: what its files leave unsaid. `gated`: linear_fc1 is two blocks (SwiGLU)."""
    fc1 = (1, 1) if gated else ()
    experts = "*.experts.local_experts.{}"
    return Rules(
        rules=(
            Rule(match=f"{experts}.linear_fc1.weight", tp=0, blocks=fc1, stored=("*.experts.linear_fc1.weight",)),
            Rule(match=f"{experts}.linear_fc2.weight", tp=1, stored=("*.experts.linear_fc2.weight",)),
            *(Rule(match=f"*{name}.{kind}", tp=0) for name in ("linear_qkv", "query_key_value") for kind in ("weight", "bias")),
            *(
                Rule(match=f"*{name}.{kind}", tp=0, blocks=fc1)
                for name in ("linear_fc1", "dense_h_to_4h")
                for kind in ("weight", "bias")
            ),
            *(Rule(match=f"*{name}.weight", tp=1) for name in ("linear_proj", "linear_fc2", "dense_4h_to_h", "*tion.dense")),
            Rule(match="*word_embeddings.weight", tp=0, extent=vocabulary, stage="first"),
            Rule(match="*output_layer.weight", tp=0, extent=vocabulary, stage="last"),
        ),
        numbering="local",
        source="the built-in rules for Megatron-Core's GPT",
    )


def find_megatron(path: Path) -> Path | None:
    """The directory with the ranks' directories: `path`, or the one that its `latest_checkpointed_iteration.txt` names."""
    if not path.is_dir():
        return None
    if any(_RANK.fullmatch(rank.name) and _file(rank) for rank in path.iterdir()):
        return path
    latest = path / "latest_checkpointed_iteration.txt"
    if latest.is_file() and (tag := latest.read_text(errors="replace").strip()):
        place = path / (f"iter_{int(tag):07d}" if tag.isdigit() else "release")
        return find_megatron(place) if place.is_dir() else None
    return None


def _file(rank: Path) -> Path | None:
    return next((rank / name for name in FILES if (rank / name).is_file()), None)


def open_megatron(path: Path, inert: Sequence[str] = (), rules: Rules | None = None, group: str = "model") -> Source:
    """All ranks' files, tensors mapped, joined by the rules. Raises MissingData when a rank's file is not there, LayoutMismatch
    when what the ranks hold does not fit the rules."""
    directory = find_megatron(path)
    if directory is None:
        raise NotACheckpoint(
            f"{path}: has no mp_rank_*/model_optim_rng.pt, and no latest_checkpointed_iteration.txt that leads there"
        )
    ranks = _ranks(directory)
    documents = {where: load_torch(file, (*INERT, *inert)) for where, file in ranks.items()}
    first = documents[min(documents)]
    tp, pp, ep = (1 + max(where[axis] for where in ranks) for axis in range(3))
    chosen = rules or _built_in(directory, first, tp)
    held = list(_held(documents, group))
    iteration = first.get("iteration")
    layout = {"megatron": {"tp": tp, "pp": pp, "ep": ep}}
    step = iteration if type(iteration) is int else None
    return Source("megatron", join(held, chosen), {}, step, layout, tuple(_left_out(first)))


def _ranks(directory: Path) -> dict[tuple[int, int, int], Path]:
    """Every rank's file by (tp, pp, ep)."""
    found: dict[tuple[int, int, int], Path] = {}
    for place in sorted(directory.iterdir()):
        match = _RANK.fullmatch(place.name)
        file = _file(place) if match else None
        if match and file:
            found[int(match[1]), int(match[2] or 0), int(match[3] or 0)] = file
    sizes = [1 + max(where[axis] for where in found) for axis in range(3)]
    for where in ((tp, pp, ep) for tp in range(sizes[0]) for pp in range(sizes[1]) for ep in range(sizes[2])):
        if where not in found:
            raise MissingData(
                f"{directory}: the file of tensor rank {where[0]}, stage {where[1]}, expert rank {where[2]} is missing"
            )
    return found


def _held(documents: Mapping[tuple[int, int, int], Any], group: str) -> Iterator[Held]:
    """What every rank holds. Pipeline chunks are stages in the order in which data runs through them."""
    stages = 1 + max(pp for _, pp, _ in documents)
    for (tp, pp, ep), document in documents.items():
        chunks = sorted((int(match[1] or 0), key) for key in document if (match := _CHUNK.fullmatch(str(key))))
        if not chunks:
            raise UnsupportedFormat(f"tensor rank {tp}, stage {pp}: its file holds no 'model'")
        for number, key in chunks:
            arrays = {
                f"{group}/{name}": tensor_source(f"{group}/{name}", tensor) for name, tensor in _tensors(document[key], ())
            }
            label = f"tensor rank {tp}, stage {pp}" + (f", expert rank {ep}" if ep else "")
            yield Held(label, arrays, tp, number * stages + pp, ep)


def _tensors(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Tensors of a module's state, nested as older versions save it, or flat. Transformer Engine's `_extra_state` is none."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, (*path, str(key).replace("/", ".")))
    elif hasattr(value, "untyped_storage") and not path[-1].endswith("_extra_state"):
        yield ".".join(path), value


def _built_in(directory: Path, document: Mapping[str, Any], tp: int) -> Rules:
    """The built-in rules, where the run's arguments say all that they need. Guesses could put rows in a wrong order."""
    arguments = document.get("args")
    gated = [field_of(arguments, name) for name in ("swiglu", "gated_linear_unit", "quick_geglu")]
    if tp > 1 and all(answer is None for answer in gated):
        raise LayoutMismatch(
            f"{directory}: its arguments do not say whether linear_fc1 is gated, which decides how {tp} tensor ranks cut it; "
            "give --rules (docs/ckpt.md)"
        )
    groups = field_of(arguments, "num_query_groups")
    if field_of(arguments, "group_query_attention") and type(groups) is int and groups % tp:
        raise LayoutMismatch(
            f"{directory}: {groups} query groups on {tp} tensor ranks: some ranks hold copies of others' keys and values, which "
            "the built-in rules do not know; save it once with fewer tensor ranks"
        )
    return rules_of_megatron(_vocabulary(document), any(gated))


def _vocabulary(document: Mapping[str, Any]) -> int | None:
    size = field_of(document.get("args"), "vocab_size")
    return size if type(size) is int and size > 0 else None


def _left_out(document: Mapping[str, Any]) -> Iterator[str]:
    if "optimizer" in document:
        yield "the optimizer's state: its files do not say which parameter is which"
    if "rng_state" in document:
        yield "random states: they belong to the layout that saved them"
