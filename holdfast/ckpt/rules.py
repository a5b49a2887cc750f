"""Layout rules, the universal checkpoint language: how the arrays of a trainer and those of a checkpoint belong together.

A rule file is TOML. A rule speaks of a trainer's parameter by its name there, and of its optimizer state with it; the first rule
whose `match` fits decides. Patterns are those of a shell (`*`, `?`, `[…]`); a pattern with a `/` matches the whole name of an
array. Rules are read both ways: `restore` and exports cut what is stored for a trainer, imports put it together again.

    [[rule]]
    match = "*.attention.wo.weight"
    tp = 1                          # tensor parallelism cuts dimension 1

    [[rule]]
    match = "*.qkv.weight"
    tp = 0
    blocks = [4096, 1024, 1024]     # q, k and v lie one after the other; each is cut for itself (a ratio, [4, 1, 1], is enough)
    unit = 128                      # never cut inside a head

    [[rule]]
    match = "decoder.layers.*.self_attention.linear_qkv.weight"
    tp = 0
    groups = 8                      # eight times (q, k, v): grouped-query attention as Megatron orders it
    blocks = [4, 1, 1]
    stored = ["layers.*.wq.weight", "layers.*.wk.weight", "layers.*.wv.weight"]   # one array for each block

    [[rule]]
    match = "tok_embeddings.weight"
    tp = 0
    pad = 128                       # ranks hold the vocabulary padded to a multiple of 128 × tp
    extent = 50257                  # and this many rows of it are real (only imports have to be told)
    stage = "first"                 # pipeline: on the first stage

    [[rule]]
    match = "*.experts.w?"
    ep = 0                          # stacked experts: expert parallelism cuts dimension 0

    [[rule]]
    match = "*.experts.{}.w1.weight"
    stored = ["*.experts.w1"]       # one tensor for each expert there, one stacked array here

    [[rule]]
    match = "*.norm.weight"
    average = true                  # the ranks' copies have drifted apart; what is stored is their mean

At the top of a file: `layers`, the words that a layer's number follows; `stages = [15, 17]`, how many layers each pipeline stage
has; `numbering = "local"`, where every stage (and every expert-parallel rank) counts its layers (experts) from 0.

Arrays without a rule, and optimizer state that is not shaped like its parameter, are held whole by every rank of those axes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from holdfast.ckpt.patterns import NUMBER, matched, wildcards
from holdfast.errors import ConfigError

STAGES = ("first", "last", "all")
NUMBERINGS = ("global", "local")
LAYER_WORDS = ("layers", "h", "blocks", "layer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What is said about the arrays whose names match; the words are those of a rule file."""

    match: str
    tp: int | None = None
    ep: int | None = None
    blocks: tuple[int, ...] = ()
    groups: int = 1
    unit: int = 1
    pad: int = 1
    extent: int | None = None
    average: bool = False
    stored: tuple[str, ...] = ()
    stage: str | None = None

    def __post_init__(self) -> None:
        for wrong in _mistakes(self):
            raise ConfigError(f"rule {self.match!r}: {wrong}")

    @property
    def is_stacked(self) -> bool:
        """One tensor for each expert in the trainer, one array for all of them in the checkpoint."""
        return NUMBER in self.match

    def speaks_for(self, name: str) -> bool:
        return matched(self.match, name if "/" in self.match else parameter_of(name)) is not None

    def block_extents(self, extent: int) -> tuple[int, ...] | None:
        """The blocks of a dimension of `extent`; None when it cannot be divided in their ratio."""
        total = sum(self.blocks)
        return tuple(extent // total * block for block in self.blocks) if extent % total == 0 else None


def _mistakes(rule: Rule) -> Iterator[str]:
    for name in ("tp", "ep"):
        value = getattr(rule, name)
        if value is not None and (type(value) is not int or not 0 <= value < 32):
            yield f"{name} is the dimension to cut, 0 or more; got {value!r}"
    for name, meaning in (
        ("pad", "a multiple to pad to"),
        ("groups", "how often the blocks repeat"),
        ("unit", "rows to keep together"),
    ):
        value = getattr(rule, name)
        if type(value) is not int or value < 1:
            yield f"{name} is {meaning}, 1 or more; got {value!r}"
    if rule.stage is not None and rule.stage not in STAGES:
        yield f"stage is one of {', '.join(STAGES)}; got {rule.stage!r}"
    if any(type(extent) is not int or extent < 1 for extent in rule.blocks):
        yield f"blocks are extents along the cut dimension; got {list(rule.blocks)!r}"
    if rule.blocks and rule.tp is None:
        yield "blocks need tp, the dimension that they lie along"
    if rule.blocks and (rule.pad > 1 or rule.extent is not None):
        yield "blocks and pad cannot be combined"
    if rule.groups > 1 and not rule.blocks:
        yield "groups repeat blocks; say which"
    if rule.extent is not None and (type(rule.extent) is not int or rule.extent < 1 or rule.tp is None):
        yield f"extent is the real size of dimension tp, 1 or more; got {rule.extent!r}"
    if type(rule.average) is not bool or (rule.average and (rule.tp is not None or rule.ep is not None)):
        yield "average = true is for arrays that every rank holds whole, without tp and ep"
    yield from _mistakes_in_names(rule)


def _mistakes_in_names(rule: Rule) -> Iterator[str]:
    if any(type(name) is not str or "/" in name for name in rule.stored) or (rule.stored and "/" in rule.match):
        yield "stored lists parameter names, and goes with a match that is one (without '/')"
    elif rule.stored and len(rule.stored) not in (1, len(rule.blocks)):
        yield f"stored names one array, or one for each of the {len(rule.blocks)} blocks; it has {len(rule.stored)}"
    elif any(wildcards(name) != wildcards(rule.match) or NUMBER in name for name in rule.stored):
        yield f"the names in stored need as many wildcards as match, {wildcards(rule.match)}, and no {NUMBER}"
    elif rule.is_stacked and not rule.stored:
        yield f"with {NUMBER} in match, stored names the array that all experts are stacked in"
    elif rule.is_stacked and rule.ep is not None:
        yield "experts of their own are dealt out whole, without ep"


def parameter_of(name: str) -> str:
    """The parameter an array belongs to: `layers.0.wq.weight` for both `model/…` and `optim/…/exp_avg`."""
    parts = name.split("/")
    return parts[1] if len(parts) > 1 else name


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """An ordered list of rules, and how pipeline stages share out and number the layers."""

    rules: tuple[Rule, ...] = ()
    layers: tuple[str, ...] = LAYER_WORDS
    stages: tuple[int, ...] = ()
    numbering: str = "global"
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        where = self.source or "rules"
        if self.numbering not in NUMBERINGS:
            raise ConfigError(f"{where}: numbering is one of {', '.join(NUMBERINGS)}; got {self.numbering!r}")
        if any(type(count) is not int or count < 1 for count in self.stages):
            raise ConfigError(f"{where}: stages lists how many layers each stage has; got {list(self.stages)!r}")

    def of(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.speaks_for(name)), None)


def load_rules(path: str | Path) -> Rules:
    """The rules in a TOML file; ConfigError says what is wrong with it."""
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"rules {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"rules {path}: not TOML ({error})") from error
    return rules_from(document, str(path))


def rules_from(document: Mapping[str, Any], source: str = "rules") -> Rules:
    """Rules as plain values, for those who write them in Python."""
    _only(document, {"rule", "layers", "stages", "numbering"}, source)
    listed = document.get("rule", [])
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise ConfigError(f"{source}: rules are written as [[rule]] tables")
    layers = document.get("layers", list(LAYER_WORDS))
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ConfigError(f"{source}: layers is a list of names")
    return Rules(
        rules=tuple(_rule(entry, source) for entry in listed),
        layers=tuple(layers),
        stages=_tuple(document, "stages", source),
        numbering=document.get("numbering", "global"),
        source=source,
    )


def _rule(entry: Mapping[str, Any], source: str) -> Rule:
    _only(entry, {field.name for field in fields(Rule)}, source)
    if not isinstance(entry.get("match"), str):
        raise ConfigError(f'{source}: a rule has no match = "pattern"')
    return Rule(**{**entry, "blocks": _tuple(entry, "blocks", source), "stored": _tuple(entry, "stored", source)})


def _tuple(entry: Mapping[str, Any], name: str, source: str) -> tuple[Any, ...]:
    value = entry.get(name, ())
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{source}: {name} is a list; got {value!r}")
    return tuple(value)


def _only(entry: Mapping[str, Any], known: Iterable[str], source: str) -> None:
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise ConfigError(f"{source}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _column(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(match=f"*{name}.{kind}", tp=0) for name in names for kind in ("weight", "bias"))


def _row(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(match=f"*{name}.weight", tp=1) for name in names)


CONVENTIONS = Rules(
    rules=(
        Rule(match="*experts.w?", ep=0),
        *_column("wq", "wk", "wv", "w1", "w3", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        *_row("wo", "w2", "o_proj", "down_proj"),
        *(Rule(match=f"*{name}.weight", tp=0, stage="first") for name in ("tok_embeddings", "embed_tokens")),
        *(Rule(match=f"*{name}.weight", tp=0, stage="last") for name in ("output", "lm_head")),
    ),
    source="the built-in conventions",
)
"""What is assumed without a rule file: the parameter names of Llama-like models, as torchtitan and Hugging Face spell them."""
