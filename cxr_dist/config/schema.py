"""One validated configuration tree: a YAML preset, dotted overrides, and every field documented.

Validation happens once, here. An error names the field, the value and the fix; unknown keys fail with
the nearest known one. What is resolved is saved with the run and loads again unchanged.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tfrecords_builder.common.errors import UserError

BASE_LAYERS = 175
"""Entries in `layers` of Keras's ResNet50 without top; `unfreeze_layers` counts from the last."""


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Pydantic takes true for 1; YAML reads `yes` as true."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation in (int, float, int | None, float | None):
            raise ValueError("is a number, not true or false")
        return value


def _switch(value: object) -> object:
    """YAML 1.1 reads a bare on and off as booleans; the switches here are words."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


class ModelConfig(_Node):
    """The network: ResNet50 without top, and the head."""

    weights: str = Field("imagenet", description="imagenet (downloaded once by Keras), none, or a path to a .h5 file")
    image_size: int | None = Field(None, ge=32, description="pixels; must be the dataset's, which is also the default")
    dropout: float = Field(0.3, ge=0, lt=1, description="rate of both dropout layers of the head")
    batch_norm: Literal["train", "inference"] = Field(
        "inference", description="BatchNorm of unfrozen base layers; always trains with weights none"
    )
    batch_norm_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of all BatchNorm statistics that train")
    synchronize_batch_norm: bool = Field(
        False, description="batch statistics over all replicas instead of each replica's own (needs xla off)"
    )


class AugmentationConfig(_Node):
    """Random changes of training images, drawn per image and epoch, applied on the device."""

    rotation: float = Field(0.0, ge=0, le=45, description="largest rotation, degrees either way")
    shift: float = Field(0.05, ge=0, le=0.5, description="largest shift, as a share of the image's side")
    zoom: float = Field(0.0, ge=0, le=0.5, description="largest change of scale, as a share")
    contrast: float = Field(
        0.15, ge=0, lt=1, description="largest change of contrast about the image's mean, as a share"
    )
    brightness: float = Field(0.1, ge=0, lt=1, description="largest change of brightness, as a share of full scale")


class StageConfig(_Node):
    """One stage of training: what trains, for how long, and how."""

    epochs: int = Field(3, ge=0, description="0 leaves the stage out")
    unfreeze_layers: int = Field(0, ge=0, le=BASE_LAYERS, description="upper layers of the base that train")
    learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate; stage 2 defaults to a tenth of stage 1's"
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="sgd has momentum")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; needs adamw or sgd")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="after the warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="linear warm-up from zero")
    clip_norm: float | None = Field(None, gt=0, description="largest global norm of the reduced gradient")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    weight_average: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of a moving average of the weights, step by step, such as 0.99; validation and the best "
        "model are then those of the average",
    )
    class_weights: bool = Field(False, description="weight the loss against the class imbalance (mean weight 1)")
    augment: bool = Field(False, description="apply the augmentation in this stage")
    early_stopping: int | None = Field(
        None, ge=1, description="end the stage after so many epochs without a better validation"
    )

    @model_validator(mode="after")
    def _weight_decay_has_an_optimizer(self) -> "StageConfig":
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("weight_decay is decoupled and needs optimizer adamw or sgd, not adam")
        return self


class FeaturesConfig(_Node):
    """Reuse of what frozen layers compute, kept on disk; see the feature cache in ARCHITECTURE.md."""

    cache: Switch = Field(
        "auto",
        description="compute the pooled features of each image once for a stage that trains the head alone; off turns "
        "off all reuse; auto reads images where it would save nothing (augmentation, and no more epochs than views)",
    )
    views: int = Field(
        4, ge=1, description="with augmentation, augmented views of each image, which the epochs take in turn"
    )
    cut: Switch = Field(
        "auto",
        description="keep the tensors below the first unfrozen layer too, for a stage that trains upper layers; auto "
        "measures whether reading them costs less than computing them (never with augmentation, or deterministic)",
    )
    folder: str | None = Field(
        None,
        description="where; all workers must see it, and all runs may share it. Default: feature-cache beside the run",
    )
    limit_gb: float = Field(
        50.0,
        gt=0,
        description="gigabytes (10^9 bytes) beyond which what was not used for longest leaves the folder, unless a run "
        "uses it",
    )


class InputConfig(_Node):
    """How images come from the dataset to the device."""

    memory_gb: float = Field(
        2.0,
        ge=0,
        description="a split that takes no more gigabytes (10^9 bytes, one a pixel) than this is read once and kept in "
        "each worker's memory for the stages that train on images; with deterministic, a stage takes as much again for "
        "a moment at its start",
    )
    max_damaged: int = Field(
        0,
        ge=0,
        description="damaged records of training and validation that a run may leave out; they are looked for before "
        "it begins, and counted in result.json. 0: none, the first that is read ends the run",
    )


class CheckpointConfig(_Node):
    """What a run leaves to go on from when it is interrupted, in the middle of an epoch too."""

    share: float = Field(
        0.01, gt=0, le=1, description="of the training time that writing may take: the interval follows from the cost"
    )
    every_steps: int | None = Field(
        None, ge=1, description="write after so many steps of an epoch, and at its end, whatever it costs"
    )
    keep: int = Field(2, ge=2, description="how many; the one before serves when the newest is damaged")
    background: bool = Field(True, description="write while training goes on")


class AllReduceConfig(_Node):
    """How workers sum their gradients; nothing where there is one worker."""

    algorithm: Literal["auto", "nccl", "ring"] = Field("auto", description="auto: nccl on GPUs, ring on CPUs")
    pack_mb: float = Field(
        0.0, ge=0, description="megabytes (10^6 bytes) of gradients that are sent together; 0: all of them"
    )


def _stages() -> dict[int, StageConfig]:
    return {
        1: StageConfig(epochs=3, learning_rate=1e-3),
        2: StageConfig(epochs=4, unfreeze_layers=100),
    }


class Config(_Node):
    """Everything that decides what a run computes."""

    seed: int = Field(0, ge=0, lt=2**31, description="of weights, order, dropout and augmentation")
    deterministic: bool = Field(False, description="bit-identical repeats on the same hardware, somewhat slower")
    global_batch_size: int = Field(32, ge=1, description="images in a step, over all replicas")
    accumulation_steps: int = Field(
        1,
        ge=1,
        description="parts in which each replica takes its share of the batch, where the whole does not fit in its "
        "memory; their gradients are summed",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: by device (float16 or bfloat16 on a GPU, bfloat16 on a CPU that computes in it)"
    )
    xla: Switch = Field("auto", description="compile forward and gradient with XLA; auto: on a GPU")
    model: ModelConfig = Field(default_factory=ModelConfig)
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    input: InputConfig = Field(default_factory=InputConfig)
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    all_reduce: AllReduceConfig = Field(default_factory=AllReduceConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    max_skipped_steps: int = Field(
        20,
        ge=0,
        description="steps of an epoch whose loss or gradient may be non-finite (they change nothing) before the run "
        "ends; overflows that a float16 loss scale can still mend are not counted here",
    )
    worker_timeout_s: float = Field(
        900.0,
        gt=0,
        description="seconds without progress after which one of several workers is ended, as another one must hang",
    )
    stages: dict[int, StageConfig] = Field(default_factory=_stages, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        numbers = sorted(self.stages)
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"stages are numbered 1, 2, ... without a gap, not {numbers}")
        if not any(stage.epochs for stage in self.stages.values()):
            raise ValueError("stages: every stage has 0 epochs, so nothing would be trained")
        if self.xla == "on" and self.model.synchronize_batch_norm:
            raise ValueError(
                "xla on and model.synchronize_batch_norm true exclude each other: collectives do not compile"
            )
        return self

    def tree(self) -> dict[str, Any]:
        """The tree as plain data, as it is written to YAML."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.tree(), sort_keys=False)


def load_config(
    path: Path | None = None, overrides: list[str] | None = None, layers: Sequence[tuple[str, Mapping[str, Any]]] = ()
) -> Config:
    """Defaults, then the YAML file at `path`, then `layers`, then `key=value` overrides with dotted keys.

    Args:
        layers: Trees of keys, each with the words that an error about one of them begins with.

    Raises:
        UserError: the file is missing or no YAML mapping, or a key or value is not valid.
    """
    tree = _plain(Config().tree())
    if path is not None:
        written = read_yaml(path)
        if "search" in written:
            raise UserError(f"{path}: is a search space; give it to tune, or a recipe")
        _merge(tree, written, f"{path}: ")
    for where, layer in layers:
        _merge(tree, _plain(layer), where)
    for override in overrides or []:
        _merge(tree, parse_override(override), "--set ")
    return _validated(tree)


def parse_override(override: str) -> dict[str, Any]:
    """`a.b=value` as the tree {a: {b: value}}; the value is YAML."""
    key, found, value = override.partition("=")
    if not found or not key:
        raise UserError(f"--set {override}: expected key=value, such as stages.1.epochs=5")
    return nested(key.strip(), _plain(_parse_value(override, value)))


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
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        message = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        shown = f" {given!r}" if isinstance(given, str | int | float | bool) else " null" if given is None else ""
        raise UserError(f"config {field}{shown}: {message}".replace("config :", "config:")) from None
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
        raise UserError(f"{path}: is nested too deeply; give a mapping of config keys") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a mapping of config keys")
    if _is_larger(loaded, MOST_VALUES):
        raise UserError(f"{path}: holds more than {MOST_VALUES} values, aliases written out; give fewer")
    return _plain(loaded)


def _is_larger(node: Any, most: int) -> bool:
    """Whether a tree has more nodes; aliases make a few bytes many, or endless."""
    pending, count = [node], 0
    while pending and count <= most:
        current = pending.pop()
        count += 1
        children = current.values() if isinstance(current, dict) else current if isinstance(current, list) else ()
        pending.extend(children)
    return count > most


class _Loader(yaml.SafeLoader):
    """As people mean it: 1e-3 is a number, where YAML 1.1 reads a string, and a key is there once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # Before keys are merged in from elsewhere (`<<`), which may be repeated: the mapping's own take precedence.
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                reason = f"the key {key} is there more than once; keep one"
                raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse_value(override: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--set {override}: the value is not YAML; quote it") from None


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
            meant = _first_leaf(name, value)
            raise UserError(f"{where}{meant}: unknown config key{_nearest(meant)}")
        if isinstance(tree[key], dict):
            if not isinstance(value, dict):
                inner = ", ".join(f"{name}.{child}" for child in tree[key])
                raise UserError(f"{where}{name}: holds keys of its own ({inner}), not a value")
            _merge(tree[key], value, where, f"{name}.")
        elif isinstance(value, dict):
            raise UserError(f"{where}{name}: is a value, not a mapping")
        else:
            tree[key] = value


def _first_leaf(name: str, value: Any) -> str:
    """The dotted name of the first value below `name`: it tells better than a section's what was meant."""
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    return name


def known_keys() -> dict[str, Any]:
    """Every dotted key with its default value."""

    def walk(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.items():
            found |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    return walk(_plain(Config().tree()), "")


def _nearest(name: str) -> str:
    keys = list(known_keys())
    by_leaf = [key for key in keys if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.5) or by_leaf[:1]
    if not near:
        leaves = {key.rsplit(".", 1)[-1]: key for key in keys}
        close = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), n=1, cutoff=0.5)
        near = [leaves[close[0]]] if close else []
    return f"; did you mean {near[0]}?" if near else "; cxr-dist config prints them all"
