"""Random changes of images that run on the device, inside the compiled step.

Rotation, shift and zoom are one affine map and one bilinear resampling, written with gathers because
`ImageProjectiveTransform`, which Keras's layers use, has no XLA kernel. A draw depends on the seed, the
step and the image's place in the global batch, so it is the same for any number of replicas.
"""

from typing import Any

from cxr_dist.config.schema import AugmentationConfig

DRAWS = 6
"""Random numbers per image: angle, two shifts, zoom, contrast, brightness."""


def draw(seed: Any, slots: Any, global_batch_size: int) -> Any:
    """Numbers in [-1, 1): float32 [B, DRAWS], one row per image of this replica.

    Args:
        seed: int32 [2], of the step.
        slots: int32 [B], the images' places in the global batch.
        global_batch_size: how many rows are drawn, of which this replica takes those of its slots.
    """
    import tensorflow as tf

    rows = tf.random.stateless_uniform([global_batch_size, DRAWS], seed, -1.0, 1.0)
    return tf.gather(rows, slots)


def augment(images: Any, draws: Any, config: AugmentationConfig) -> Any:
    """Change each image by its row of draws.

    Args:
        images: float32 [B, H, W, 1], 0 to 255.
        draws: float32 [B, DRAWS], -1 to 1; a row of zeros changes nothing.

    Returns:
        float32 [B, H, W, 1], 0 to 255. Pixels from outside the image are black, as the collimated
        border of a radiograph is.
    """
    import tensorflow as tf

    if config.rotation or config.zoom or config.shift:
        images = _affine(images, draws, config)
    if config.contrast:
        mean = tf.reduce_mean(images, axis=(1, 2, 3), keepdims=True)
        images = mean + (images - mean) * _per_image(1.0 + config.contrast * draws[:, 4])
    if config.brightness:
        images = images + _per_image(255.0 * config.brightness * draws[:, 5])
    if config.contrast or config.brightness:
        images = tf.clip_by_value(images, 0.0, 255.0)
    return images


def _per_image(values: Any) -> Any:
    return values[:, None, None, None]


def _affine(images: Any, draws: Any, config: AugmentationConfig) -> Any:
    """Resample about the centre: output pixel p shows input pixel c + R(p - c)/z - t."""
    import numpy as np
    import tensorflow as tf

    height, width = images.shape[1], images.shape[2]
    shift_y, shift_x = config.shift * height * draws[:, 1], config.shift * width * draws[:, 2]
    if not (config.rotation or config.zoom):
        # Shifts alone move by whole pixels: resampling would blur training images and no others.
        shift_y, shift_x = tf.round(shift_y), tf.round(shift_x)
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    grid_y, grid_x = np.meshgrid(
        np.arange(height, dtype=np.float32) - centre_y, np.arange(width, dtype=np.float32) - centre_x, indexing="ij"
    )
    source_y, source_x = grid_y, grid_x
    if config.rotation or config.zoom:
        angle = draws[:, 0] * float(np.deg2rad(config.rotation))
        # In a graph, TensorFlow on a CPU computes 1 / 1 as 1 - 2^-24: hence not for shifts alone.
        scale = 1.0 / (1.0 + config.zoom * draws[:, 3])
        cos, sin = (scale * tf.cos(angle))[:, None, None], (scale * tf.sin(angle))[:, None, None]
        source_y, source_x = sin * grid_x + cos * grid_y, cos * grid_x - sin * grid_y
    source_y = source_y + centre_y - shift_y[:, None, None]
    source_x = source_x + centre_x - shift_x[:, None, None]
    return _bilinear(images, source_y, source_x)


def _bilinear(images: Any, y: Any, x: Any) -> Any:
    """Sample images [B, H, W, 1] at float coordinates [B, H, W]; outside is 0."""
    import tensorflow as tf

    height, width = images.shape[1], images.shape[2]
    flat = tf.reshape(images, [-1, height * width])
    top, left = tf.floor(y), tf.floor(x)
    result = tf.zeros_like(y)
    for step_y in (0, 1):
        for step_x in (0, 1):
            at_y, at_x = top + step_y, left + step_x
            weight = (1.0 - tf.abs(y - at_y)) * (1.0 - tf.abs(x - at_x))
            inside = (at_y >= 0) & (at_y <= height - 1) & (at_x >= 0) & (at_x <= width - 1)
            index = tf.cast(
                tf.clip_by_value(at_y, 0, height - 1) * width + tf.clip_by_value(at_x, 0, width - 1), tf.int32
            )
            values = tf.gather(flat, tf.reshape(index, [-1, height * width]), batch_dims=1)
            result += tf.where(inside, weight, 0.0) * tf.reshape(values, [-1, height, width])
    return result[..., None]
