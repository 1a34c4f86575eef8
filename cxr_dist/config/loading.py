"""A configuration from a preset, a file and overrides, checked once."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cxr_dist.config.describe import nearest
from cxr_dist.config.schema import Config, StageConfig, first_problem
from tfrecords_builder.common.errors import UserError

Overrides = Mapping[str, Any] | Sequence[str]
"""Values by dotted key; or `key=value` texts, as --set takes them, whose values are YAML."""
Layer = tuple[str, Mapping[str, Any]]
"""A tree of keys, with the words that an error about one of them begins with."""


def load_config(
    base: Path | Config | None = None, overrides: Overrides | None = None, layers: Sequence[Layer] = ()
) -> Config:
    """Defaults, then `base` (a YAML file, or a whole configuration), then `layers`, then `overrides`.

    Raises:
        UserError: the file is missing or no YAML mapping, or a key or value is not valid.
    """
    tree = _plain(base.tree() if isinstance(base, Config) else Config().tree())
    if isinstance(base, Path):
        written = read_yaml(base)
        if "search" in written:
            raise UserError(f"{base}: is a search space, not a training config; use it with cxr-dist tune")
        _merge(tree, written, f"{base}: ")
    for where, layer in (*layers, *override_layers(overrides)):
        _merge(tree, _plain(layer), where)
    return _validated(tree)


def override_layers(overrides: Overrides | None) -> list[Layer]:
    """Each override as a layer.

    Raises:
        UserError: one is no `key=value`, or its value is no YAML.
    """
    if isinstance(overrides, Mapping):
        return [("overrides ", nested(str(key), value)) for key, value in overrides.items()]
    return [("--set ", parse_override(text)) for text in overrides or ()]


def parse_override(override: str) -> dict[str, Any]:
    """`a.b=value` as the tree {a: {b: value}}; the value is YAML."""
    key, found, value = override.partition("=")
    if not found or not key:
        raise UserError(f"--set {override}: expected key=value, such as stages.1.epochs=5")
    try:
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--set {override}: the value is not YAML; quote it") from None
    return nested(key.strip(), _plain(parsed))


def nested(key: str, value: Any) -> dict[str, Any]:
    """The tree in which `value` stands at the dotted `key`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def resolve_preset(path: Path | None) -> Path | None:
    """A file as it is; a bare name that is no file is that preset of `tune_configs`.

    Raises:
        UserError: neither a file nor a preset.
    """
    if path is None or path.is_file():
        return path
    import tune_configs

    folder = Path(tune_configs.__file__).parent
    preset = folder / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent.name in ("", "tune_configs") and preset.is_file():
        return preset
    names = ", ".join(sorted(item.stem for item in folder.glob("*.yaml")))
    raise UserError(f"--config {path}: no such file, and no preset of that name ({names})")


def _validated(tree: dict[str, Any]) -> Config:
    first = tree["stages"].get("1", {})
    second = tree["stages"].get("2")
    rate = first.get("learning_rate")
    is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if second is not None and second.get("learning_rate") is None and is_number:
        second["learning_rate"] = float(f"{rate / 10:.6g}")
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"config {first_problem(error)}") from None
    for number, stage in config.stages.items():
        if stage.learning_rate is None:
            raise UserError(f"config stages.{number}.learning_rate: not given; give a peak learning rate, such as 1e-4")
    return config


MOST_VALUES = 10_000
"""In a YAML file: far more than there are keys."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the file, keys as strings; `UserError` when there is none."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no date though it looks like one
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply; give a mapping of keys to values") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: contains a {type(loaded).__name__}, not a mapping of keys to values")
    pending: list[Any] = [loaded]
    for _ in range(MOST_VALUES + 1):  # aliases make a few bytes many values, or endlessly many
        if not pending:
            break
        current = pending.pop()
        pending.extend(current.values() if isinstance(current, dict) else current if isinstance(current, list) else ())
    if pending:
        raise UserError(f"{path}: contains more than {MOST_VALUES} values, with aliases expanded; give fewer")
    return _plain(loaded)


class _Loader(yaml.SafeLoader):
    """As people mean it: 1e-3 is a number, where YAML 1.1 reads a string, and a key is there once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # Before keys are merged in from elsewhere (`<<`), which may be repeated: the mapping's own take precedence.
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                reason = f"the key {key} occurs more than once; keep one"
                raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _plain(node: Any) -> Any:
    """Keys as strings, so that stages.1 from YAML and from the command line are the same key."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    return node


def _merge(tree: dict[str, Any], update: dict[str, Any], where: str, prefix: str = "") -> None:
    for key, value in update.items():
        name = f"{prefix}{key}"
        if prefix == "stages." and key not in tree and key.isdigit():
            tree[key] = _plain(StageConfig().model_dump(mode="json"))
        if key not in tree:
            meant = next(iter(flat({name: value})), name)  # a leaf tells better than a section what was meant
            raise UserError(f"{where}{meant}: unknown config key{nearest(meant, list(known_keys()))}")
        if isinstance(tree[key], dict):
            if not isinstance(value, dict):
                inner = ", ".join(f"{name}.{child}" for child in tree[key])
                raise UserError(f"{where}{name}: is a section with keys of its own ({inner}), not a value")
            _merge(tree[key], value, where, f"{name}.")
        elif isinstance(value, dict):
            raise UserError(f"{where}{name}: is a value, not a mapping")
        else:
            tree[key] = value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def known_keys() -> dict[str, Any]:
    """Every dotted key with its default value."""
    return flat(_plain(Config().tree()))
