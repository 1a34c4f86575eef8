"""The keys of a configuration as rows of text, for `cxr-dist config --describe` and docs/configuration.md. Pure."""

import difflib
import re
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from cxr_dist.config.schema import Config, Node
from tfrecords_builder.common.errors import UserError

_TYPES: dict[object, str] = {bool: "true or false", int: "integer", float: "number", str: "text", tuple: "list"}
_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
_NUMBERED = {"stages": "N", "search.parameters": "KEY"}
"""Sections whose keys the user names, and what stands for such a name."""


@dataclass(frozen=True)
class KeyRow:
    """One config key."""

    key: str
    """Dotted; stages.N for every stage, search.parameters.KEY for every key that varies."""
    kind: str
    """Type, and choices or range."""
    default: str
    """As YAML; "required" where there is none."""
    description: str

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]


def describe_keys(model: type[Node] = Config, prefix: str = "") -> list[KeyRow]:
    """A row for every key of `model` and of the sections in it, in their order; `prefix` ends with a dot."""
    return _rows(model, [] if model is not Config else [Config().tree()], prefix)


def section_titles(model: type[Node] = Config, prefix: str = "") -> dict[str, str]:
    """The sentence about each section, by its dotted name; that of `model` itself by `prefix` without its dot."""
    titles = {prefix.rstrip("."): " ".join((model.__doc__ or "").split())}
    for name, field in model.model_fields.items():
        inner, numbered = _section_of(field)
        if inner is not None:
            place = f".{_NUMBERED[prefix + name]}" if numbered else ""
            titles |= section_titles(inner, f"{prefix}{name}{place}.")
    return titles


def select(rows: Sequence[KeyRow], name: str) -> list[KeyRow]:
    """The row of one key, or those of a section; all where `name` is empty.

    Raises:
        UserError: There is no such key or section; names the nearest.
    """
    wanted = re.sub(r"^stages\.\d+", "stages.N", name)
    if wanted.startswith("search.parameters."):
        wanted = re.sub(
            r"^search\.parameters\..+?(\.(choices|low|high|log|step))?$", r"search.parameters.KEY\1", wanted
        )
    found = [row for row in rows if not name or row.key == wanted or row.key.startswith(f"{wanted}.")]
    if not found:
        raise UserError(f"--describe {name}: unknown config key{nearest(wanted, [row.key for row in rows])}")
    return found


def key_lines(rows: Iterable[KeyRow]) -> Iterator[str]:
    """For a terminal: each key with its type and default, and its description below."""
    for row in rows:
        yield f"{row.key}: {row.kind}; default: {row.default}"
        yield from textwrap.wrap(row.description, 100, initial_indent="    ", subsequent_indent="    ")


def nearest(name: str, keys: Sequence[str]) -> str:
    """The end of an error about the unknown key `name`: the key that was meant, if one is near."""
    leaf, leaves = name.rsplit(".", 1)[-1], {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    if not near:
        near = [leaves[close] for close in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.5)]
    return f"; did you mean {near[0]}?" if near else "; cxr-dist config --describe lists all keys"


def _rows(model: type[Node], trees: Sequence[Mapping[str, Any]], prefix: str) -> list[KeyRow]:
    """`trees`: the defaults, one tree for each numbered section; none where the fields' own defaults hold."""
    rows = []
    for name, field in model.model_fields.items():
        inner, numbered = _section_of(field)
        values = [tree[name] for tree in trees]
        if inner is None:
            rows.append(KeyRow(prefix + name, _kind(field), _default(field, values), field.description or ""))
        elif numbered:
            below = list(values[0].values()) if values else []
            rows += _rows(inner, below, f"{prefix}{name}.{_NUMBERED[prefix + name]}.")
        else:
            rows += _rows(inner, values, f"{prefix}{name}.")
    return rows


def _section_of(field: FieldInfo) -> tuple[type[Node] | None, bool]:
    """The model of the section that the field holds, if it does, and whether there is one for each of several names."""
    annotation = field.annotation
    numbered = get_origin(annotation) is dict
    inner = get_args(annotation)[1] if numbered else annotation
    return (inner, numbered) if isinstance(inner, type) and issubclass(inner, Node) else (None, False)


def _kind(field: FieldInfo) -> str:
    parts = (
        get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else [field.annotation]
    )
    kinds = [part for part in parts if part is not types.NoneType]
    if float in kinds and int in kinds:
        kinds.remove(int)
    if get_origin(kinds[0]) is Literal:
        text = " or ".join(", ".join(map(str, get_args(kinds[0]))).rsplit(", ", 1))
    else:
        text = " or ".join(_TYPES[get_origin(kind) or kind] for kind in kinds)
    bounds = [
        f"{sign}{limit:g}" if limit < 10**6 else f"{sign}2^31"
        for name, sign in _BOUNDS
        for limit in (getattr(part, name, None) for part in field.metadata)
        if limit is not None
    ]
    return text + (f" {', '.join(bounds)}" if bounds else "")


def _default(field: FieldInfo, values: Sequence[Any]) -> str:
    """One default; or that of each stage, where they differ."""
    if field.is_required():
        return "required"
    shown = [_yaml(value) for value in values or [field.get_default(call_default_factory=True)]]
    if len(set(shown)) == 1:
        return shown[0]
    return ", ".join(f"{text} in stage {number}" for number, text in enumerate(shown, start=1))


def _yaml(value: object) -> str:
    return yaml.safe_dump(value).removesuffix("\n...\n").strip()
