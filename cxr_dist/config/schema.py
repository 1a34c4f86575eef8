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
            raise ValueError("must be a number, not true or false")
        return value


_MUST_BE = {
    "int": "must be an integer",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
    "dict": "must be a mapping of keys to values",
    "model": "must be a mapping of keys to values",
    "list": "must be a list",
    "tuple": "must be a list",
    "missing": "is required",
    "extra": "is an unknown key",
}
"""By the first word of the validator's name for an error: what is allowed."""


def first_problem(error: ValidationError, prefix: str = "") -> str:
    """The first field that is wrong, dotted, with its value and what is allowed; one line."""
    problem = error.errors(include_url=False)[0]
    parts = [str(part) for part in problem["loc"] if part != "[key]" and not str(part).startswith("function-")]
    kind = problem["type"].partition("_")[0]
    said = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    field = ".".join([prefix, *parts] if prefix else parts)
    text = f"{field}{_shown(problem['input'], kind)}: {_MUST_BE.get(kind, said)}".lstrip(": ")
    return " ".join(text.split())


def _shown(given: object, kind: str) -> str:
    """A wrong value as YAML has it, behind a space; nothing where the value is a section."""
    if isinstance(given, bool):
        return f" {str(given).lower()}"
    if isinstance(given, dict | BaseModel) or kind in ("missing", "extra"):
        return ""
    if isinstance(given, list | tuple):
        return " (a list)"
    return " null" if given is None else f" {given!r}" if isinstance(given, str | int | float) else f" {given}"


def _switch(value: object) -> object:
    """YAML 1.1 reads a bare on and off as booleans; the switches here are words."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


class ModelConfig(Node):
    """The network: ResNet50 without its top, and a classification head."""

    weights: str = Field(
        "imagenet",
        description="Initial weights: imagenet (Keras downloads them once), none (random), or the path of a .h5 file.",
    )
    image_size: int | None = Field(
        None, ge=32, description="Side of the images in pixels, which must be the dataset's. null: the dataset's."
    )
    dropout: float = Field(0.3, ge=0, lt=1, description="Dropout rate of both dropout layers of the head.")
    batch_norm: Literal["train", "inference"] = Field(
        "inference",
        description="Mode of BatchNorm in unfrozen layers: train updates its parameters and statistics, inference "
        "keeps them. With weights none, always train.",
    )
    batch_norm_momentum: float = Field(
        0.9, ge=0, lt=1, description="Momentum of the moving statistics of all BatchNorm layers that train."
    )
    synchronize_batch_norm: bool = Field(
        False,
        description="Compute batch statistics over all replicas, not each replica's own. It excludes xla on and "
        "fused_batch_norm on.",
    )
    fused_batch_norm: Switch = Field(
        "auto",
        description="Compute BatchNorm that trains as one operation, with the same result but for rounding. auto: on "
        "GPUs.",
    )


class AugmentationConfig(Node):
    """Random changes of training images, drawn for each image and epoch."""

    rotation: float = Field(0.0, ge=0, le=45, description="Largest rotation in either direction, in degrees.")
    shift: float = Field(0.05, ge=0, le=0.5, description="Largest shift, as a fraction of the image's side.")
    zoom: float = Field(0.0, ge=0, le=0.5, description="Largest change of scale, as a fraction.")
    contrast: float = Field(0.15, ge=0, lt=1, description="Largest relative change of contrast, as a fraction.")
    brightness: float = Field(
        0.1, ge=0, lt=1, description="Largest change of brightness, as a fraction of the full gray scale."
    )


class StageConfig(Node):
    """One stage of training. Stage 1 trains the head; stage 2 also trains the upper layers of the base."""

    epochs: int = Field(3, ge=0, description="Number of epochs. 0 skips the stage.")
    unfreeze_layers: int = Field(
        0, ge=0, le=BASE_LAYERS, description="Number of layers of the base that train, counted from the last."
    )
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate. null: a tenth of stage 1's.")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="Optimizer of the stage; sgd has momentum.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of optimizer sgd.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay. It needs optimizer adamw or sgd.")
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="Course of the learning rate after warm-up: constant, or half a cosine to zero."
    )
    warmup_epochs: float = Field(0.0, ge=0, description="Length of the linear warm-up from zero, in epochs.")
    clip_norm: float | None = Field(None, gt=0, description="Largest global norm of the gradient. null: no clipping.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Probability mass of the target that is spread evenly over all classes."
    )
    ema_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Decay per step of a moving average of the weights, such as 0.99. Validation and the best model "
        "then use the average. null: none.",
    )
    class_weights: bool = Field(
        False, description="Weight the loss by the inverse class frequency, with a mean weight of 1."
    )
    augment: bool = Field(False, description="Apply the section augmentation to the training images of this stage.")
    early_stopping: int | None = Field(
        None, ge=1, description="Number of epochs without a better validation that end the stage. null: never."
    )

    @model_validator(mode="after")
    def _weight_decay_has_an_optimizer(self) -> "StageConfig":
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("weight_decay is decoupled and needs optimizer adamw or sgd, not adam")
        return self


class FeaturesConfig(Node):
    """The feature cache: activations of frozen layers, computed once and kept on disk."""

    cache: Switch = Field(
        "auto",
        description="Cache the pooled features of the images for a stage that trains the head alone. auto: unless the "
        "stage augments, and for no more epochs than copies. off also disables cache_activations.",
    )
    augmented_copies: int = Field(
        4, ge=1, description="Number of augmented copies of each image that are cached; epochs use them in turn."
    )
    cache_activations: Switch = Field(
        "auto",
        description="Cache the activations below the first unfrozen layer for a stage that trains upper layers. auto: "
        "if reading is faster than computing, and never with augmentation or deterministic.",
    )
    folder: str | None = Field(
        None,
        description="Folder of the cache. All workers must see it; runs may share it. null: feature-cache beside "
        "the run.",
    )
    limit_gb: float = Field(
        50.0,
        gt=0,
        description="Largest size of the folder in gigabytes. Beyond it, the least recently used features "
        "are removed, except those in use.",
    )


class InputConfig(Node):
    """Reading of images from the dataset."""

    memory_gb: float = Field(
        2.0,
        ge=0,
        description="Largest split that each worker keeps in memory, in gigabytes (10^9 bytes, one per pixel). A "
        "larger one is read in each epoch. deterministic briefly needs twice that.",
    )
    shared_folder: str | None = Field(
        None,
        description="Folder of each machine, where its workers share one copy of a split in memory. null: none.",
    )
    device_memory_gb: float | None = Field(
        None,
        ge=0,
        description="Largest split that each device keeps, in gigabytes, if the worker keeps it in memory. Its batches "
        "need no transfer. null: 2 on GPUs, 0 on CPUs.",
    )
    max_corrupt_records: int = Field(
        0,
        ge=0,
        description="Largest number of corrupt records to leave out. Above 0, all are checked first, and result.json "
        "counts the corrupt ones. With 0, the first ends the run.",
    )

    @field_validator("shared_folder")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        """A worker of a cluster works in a folder of its own."""
        if value is not None and not value.startswith("/"):
            raise ValueError("must be an absolute path, such as /dev/shm/cxr-dist")
        return value


class SelectionConfig(Node):
    """Choice of the best epoch and the best trial, on validation images."""

    metric: Literal["accuracy", "f1_macro", "balanced_accuracy", "log_loss"] = Field(
        "accuracy",
        description="Metric of the validation images by which the best epoch, early stopping and the best trial are "
        "decided; of equal ones, the lower loss. With classes of very different sizes, f1_macro or balanced_accuracy.",
    )


class CheckpointConfig(Node):
    """Checkpoints, from which an interrupted run resumes."""

    max_overhead: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Largest fraction of training time that is spent on checkpoints; it sets their interval.",
    )
    every_steps: int | None = Field(
        None,
        ge=1,
        description="Number of steps between checkpoints; one more is written at each epoch's end. null: max_overhead "
        "decides.",
    )
    keep: int = Field(
        2, ge=2, description="Number of checkpoints to keep. If the newest is damaged, the one before is used."
    )
    background: bool = Field(True, description="Write checkpoints while training continues.")


class AllReduceConfig(Node):
    """Sum of the gradients over several workers."""

    algorithm: Literal["auto", "nccl", "ring"] = Field(
        "auto", description="Algorithm of the all-reduce. auto: nccl on GPUs, ring on CPUs."
    )
    bucket_mb: float = Field(
        0.0, ge=0, description="Size of the buckets of gradients in megabytes (10^6 bytes). 0: one bucket for all."
    )


def _stages() -> dict[int, StageConfig]:
    return {
        1: StageConfig(epochs=3, learning_rate=1e-3),
        2: StageConfig(epochs=4, unfreeze_layers=100),
    }


class Config(Node):
    """Settings of the whole run."""

    seed: int = Field(0, ge=0, lt=2**31, description="Random seed of weights, data order, dropout and augmentation.")
    deterministic: bool = Field(
        False, description="Repeat bit for bit on the same hardware and software, at some cost in speed."
    )
    global_batch_size: int = Field(32, ge=1, description="Number of images in a step, over all replicas.")
    accumulation_steps: int = Field(
        1,
        ge=1,
        description="Number of microbatches of each replica's batch, to save memory. Their gradients are summed.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of the arithmetic; variables are float32. auto: bfloat16 or float16 where the "
        "device computes in it natively, else float32.",
    )
    xla: Switch = Field(
        "auto",
        description="Compile forward and backward pass with XLA. auto: off, as compilation takes minutes on a GPU.",
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    input: InputConfig = Field(default_factory=InputConfig)
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    all_reduce: AllReduceConfig = Field(default_factory=AllReduceConfig)
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    max_nonfinite_steps: int = Field(
        20,
        ge=0,
        description="Largest number of steps in an epoch that are skipped for a non-finite loss or gradient. One "
        "more ends the run. Overflows that a lower float16 loss scale can avoid do not count.",
    )
    worker_timeout_s: float = Field(
        900.0,
        gt=0,
        description="Time in seconds without progress after which a run of several workers ends.",
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
        if self.model.fused_batch_norm == "on" and self.model.synchronize_batch_norm:
            raise ValueError(
                "model.fused_batch_norm on and model.synchronize_batch_norm true exclude each other: the operation "
                "sees one replica's batch"
            )
        return self

    def tree(self) -> dict[str, Any]:
        """The tree as plain data, as it is written to YAML."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.tree(), sort_keys=False)
