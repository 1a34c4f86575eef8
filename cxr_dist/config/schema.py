"""One validated configuration tree: a YAML preset, dotted overrides, and every field documented.

Validation happens once, here. An error names the field, the value and the fix; unknown keys fail with
the nearest known one. What is resolved is saved with the run and loads again unchanged.
"""

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

BASE_LAYERS = 175
"""Entries in `layers` of Keras's ResNet50 without top; `unfreeze_layers` counts from the last."""


class Node(BaseModel):
    """A section of a YAML file: immutable, of known keys, with finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Pydantic takes true for 1; YAML reads `yes` as true."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation in (int, float, int | None, float | None):
            raise ValueError("is a number, not true or false")
        return value


def first_problem(error: ValidationError, prefix: str = "") -> str:
    """The first field that is wrong, dotted, with its value and what is wrong with it; one line."""
    problem = error.errors(include_url=False)[0]
    parts = [str(part) for part in problem["loc"] if part != "[key]" and not str(part).startswith("function-")]
    given = problem["input"]
    value = f" {given!r}" if isinstance(given, str | int | float | bool) else " null" if given is None else ""
    field = ".".join([prefix, *parts] if prefix else parts)
    return f"{field}{value}: {problem['msg'].removeprefix('Value error, ')}".lstrip(": ")


def _switch(value: object) -> object:
    """YAML 1.1 reads a bare on and off as booleans; the switches here are words."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


class ModelConfig(Node):
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


class AugmentationConfig(Node):
    """Random changes of training images, drawn per image and epoch, applied on the device."""

    rotation: float = Field(0.0, ge=0, le=45, description="largest rotation, degrees either way")
    shift: float = Field(0.05, ge=0, le=0.5, description="largest shift, as a share of the image's side")
    zoom: float = Field(0.0, ge=0, le=0.5, description="largest change of scale, as a share")
    contrast: float = Field(
        0.15, ge=0, lt=1, description="largest change of contrast about the image's mean, as a share"
    )
    brightness: float = Field(0.1, ge=0, lt=1, description="largest change of brightness, as a share of full scale")


class StageConfig(Node):
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
    ema_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of an exponential moving average of the weights, step by step, such as 0.99; validation "
        "and the best model are then those of the average",
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


class FeaturesConfig(Node):
    """Reuse of what frozen layers compute, kept on disk; docs/design/feature-cache.md describes it."""

    cache: Switch = Field(
        "auto",
        description="compute the pooled features of each image once for a stage that trains the head alone; off turns "
        "off all reuse; auto reads images where it would save nothing (augmentation, and no more epochs than copies)",
    )
    augmented_copies: int = Field(
        4, ge=1, description="with augmentation, copies of each image, which the epochs take in turn"
    )
    cache_activations: Switch = Field(
        "auto",
        description="cache the activations below the first unfrozen layer too, for a stage that trains upper layers; "
        "auto measures whether reading them costs less than computing them (never with augmentation, or deterministic)",
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


class InputConfig(Node):
    """How images come from the dataset to the device."""

    memory_gb: float = Field(
        2.0,
        ge=0,
        description="a split that takes no more gigabytes (10^9 bytes, one a pixel) than this is read once and kept in "
        "each worker's memory for the stages that train on images; with deterministic, a stage takes as much again for "
        "a moment at its start",
    )
    max_corrupt_records: int = Field(
        0,
        ge=0,
        description="damaged records of training and validation that a run may leave out; they are looked for before "
        "it begins, and counted in result.json. 0: none, the first that is read ends the run",
    )


class CheckpointConfig(Node):
    """What a run leaves to go on from when it is interrupted, in the middle of an epoch too."""

    max_overhead: float = Field(
        0.01, gt=0, le=1, description="of the training time that writing may take: the interval follows from the cost"
    )
    every_steps: int | None = Field(
        None, ge=1, description="write after so many steps of an epoch, and at its end, whatever it costs"
    )
    keep: int = Field(2, ge=2, description="how many; the one before serves when the newest is damaged")
    background: bool = Field(True, description="write while training goes on")


class AllReduceConfig(Node):
    """How workers sum their gradients; nothing where there is one worker."""

    algorithm: Literal["auto", "nccl", "ring"] = Field("auto", description="auto: nccl on GPUs, ring on CPUs")
    bucket_mb: float = Field(
        0.0, ge=0, description="megabytes (10^6 bytes) of gradients that are sent together; 0: all of them"
    )


def _stages() -> dict[int, StageConfig]:
    return {
        1: StageConfig(epochs=3, learning_rate=1e-3),
        2: StageConfig(epochs=4, unfreeze_layers=100),
    }


class Config(Node):
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
    max_nonfinite_steps: int = Field(
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
