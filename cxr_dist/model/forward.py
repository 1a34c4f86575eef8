"""The compiled forward pass: from images to logits, or to the activations of frozen layers."""

from collections.abc import Callable, Sequence
from typing import Any

from cxr_dist.config.schema import AugmentationConfig
from cxr_dist.data import augmentation as augment
from cxr_dist.model.variables import Variables


def make_forward_step(strategy: Any, model: Any, *, xla: bool) -> Callable[[Any], Any]:
    """run(iterator) -> probabilities of the global batch in slot order, float32 [replicas * B, C], on every worker."""
    import tensorflow as tf

    variables = Variables.of(model)

    def forward(batch: dict[str, Any], trainable: list[Any], other: list[Any]) -> Any:
        inputs = tf.cast(batch["inputs"], tf.float32)
        logits, _ = model.stateless_call(trainable, other, inputs, training=False)
        return tf.nn.softmax(tf.cast(logits, tf.float32))

    inner = tf.function(forward, jit_compile=True) if xla else forward

    def replica_step(batch: dict[str, Any]) -> Any:
        outputs = inner(batch, *variables.values())
        context = tf.distribute.get_replica_context()
        return context.all_gather(outputs, axis=0) if strategy.num_replicas_in_sync > 1 else outputs

    @tf.function
    def step(iterator: Any) -> Any:
        return strategy.experimental_local_results(strategy.run(replica_step, args=(next(iterator),)))[0]

    return lambda iterator: step(iterator).numpy()


def make_feature_step(
    strategy: Any, model: Any, dtypes: Sequence[str], augmentation: AugmentationConfig | None, xla: bool
) -> Callable[[Any], list[list[Any]]]:
    """run(iterator) -> for each replica of this worker, the outputs of `model` for its batch, in inference mode.

    They are tensors, which a GPU may still be computing.

    `model` has one output or several, [B, ...], which come in `dtypes`. Involves no other worker. With an augmentation,
    batches have a row of its draws for each image as `extra`.
    """
    import tensorflow as tf

    variables = Variables.of(model)

    def forward(batch: dict[str, Any], trainable: list[Any], other: list[Any]) -> list[Any]:
        inputs = tf.cast(batch["inputs"], tf.float32)
        if augmentation is not None:
            inputs = augment.augment(inputs, batch["extra"], augmentation)
        outputs, _ = model.stateless_call(trainable, other, inputs, training=False)
        flat = tf.nest.flatten(outputs)  # Keras makes one tensor of a list of one
        return [tf.cast(output, dtype) for output, dtype in zip(flat, dtypes, strict=True)]

    inner = tf.function(forward, jit_compile=True) if xla else forward

    def replica_step(batch: dict[str, Any]) -> list[Any]:
        return inner(batch, *variables.values())

    @tf.function
    def step(iterator: Any) -> list[Any]:
        outputs = strategy.run(replica_step, args=(next(iterator),))
        return [list(strategy.experimental_local_results(output)) for output in outputs]

    def run(iterator: Any) -> list[list[Any]]:
        by_output = step(iterator)
        return [[output[replica] for output in by_output] for replica in range(len(by_output[0]))]

    return run
