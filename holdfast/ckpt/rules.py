"""Layout rules, the universal checkpoint language: which part of an array each rank of a mesh holds, by name patterns.

A rule file is TOML. The first rule whose pattern matches decides. Patterns are those of a shell (`*`, `?`, `[…]`) and match the
parameter's name, so that one rule speaks for a weight and for its optimizer state alike; a pattern with a `/` matches the whole
name of the array.

    [[rule]]
    match = "*.attention.wo.weight"
    tp = 1                          # tensor parallelism cuts dimension 1

    [[rule]]
    match = "*.qkv.weight"
    tp = 0
    blocks = [4096, 1024, 1024]     # q, k and v lie one after the other; each is cut for itself

    [[rule]]
    match = "tok_embeddings.weight"
    tp = 0
    pad = 128                       # ranks hold the vocabulary padded to a multiple of 128 × tp
    stage = "first"                 # pipeline: on the first stage

    [[rule]]
    match = "*.experts.w?"
    ep = 0                          # stacked experts: expert parallelism cuts dimension 0

Arrays without a rule, and optimizer state that is not shaped like its parameter, are held whole by every rank of those axes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError

STAGES = ("first", "last", "all")
LAYER_WORDS = ("layers", "h", "blocks", "layer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What is said about the arrays whose names match."""

    match: str
    tp: int | None = None
    ep: int | None = None
    blocks: tuple[int, ...] = ()
    pad: int = 1
    stage: str | None = None

    def __post_init__(self) -> None:
        where = f"rule {self.match!r}"
        for name in ("tp", "ep"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value < 32):
                raise ConfigError(f"{where}: {name} is the dimension to cut, 0 or more; got {value!r}")
        if self.stage is not None and self.stage not in STAGES:
            raise ConfigError(f"{where}: stage is one of {', '.join(STAGES)}; got {self.stage!r}")
        if type(self.pad) is not int or self.pad < 1:
            raise ConfigError(f"{where}: pad is a multiple to pad to, 1 or more; got {self.pad!r}")
        if any(type(extent) is not int or extent < 1 for extent in self.blocks):
            raise ConfigError(f"{where}: blocks are extents along the cut dimension; got {list(self.blocks)!r}")
        if self.blocks and self.tp is None:
            raise ConfigError(f"{where}: blocks need tp, the dimension that they lie along")
        if self.blocks and self.pad > 1:
            raise ConfigError(f"{where}: blocks and pad cannot be combined")

    def speaks_for(self, name: str) -> bool:
        return fnmatchcase(name if "/" in self.match else parameter_of(name), self.match)


def parameter_of(name: str) -> str:
    """The parameter an array belongs to: `layers.0.wq.weight` for both `model/…` and `optim/…/exp_avg`."""
    parts = name.split("/")
    return parts[1] if len(parts) > 1 else name


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """An ordered list of rules, and the name of the sequence of layers that pipeline stages share out."""

    rules: tuple[Rule, ...] = ()
    layers: tuple[str, ...] = LAYER_WORDS
    source: str = field(default="", compare=False)

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
    _only(document, {"rule", "layers"}, source)
    listed = document.get("rule", [])
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise ConfigError(f"{source}: rules are written as [[rule]] tables")
    layers = document.get("layers", list(LAYER_WORDS))
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ConfigError(f"{source}: layers is a list of names")
    return Rules(rules=tuple(_rule(entry, source) for entry in listed), layers=tuple(layers), source=source)


def _rule(entry: Mapping[str, Any], source: str) -> Rule:
    _only(entry, {field.name for field in fields(Rule)}, source)
    if not isinstance(entry.get("match"), str):
        raise ConfigError(f'{source}: a rule has no match = "pattern"')
    return Rule(**{**entry, "blocks": tuple(entry.get("blocks", ()))})


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
