"""The loss scale of float16 training."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass
class LossScale:
    """Dynamic loss scale for float16 (Micikevicius et al. 2018): halved on overflow, doubled now and then."""

    scale: Any
    good_steps: Any
    dynamic: bool
    growth_interval: int = 2000

    @classmethod
    def create(cls, precision: str, initial: float = 2.0**15) -> "LossScale":
        """Outside the strategy's scope: every worker makes the same decisions on a variable of its own."""
        import tensorflow as tf

        dynamic = precision == "float16"
        scale = tf.Variable(initial if dynamic else 1.0, dtype=tf.float32, trainable=False, name="loss_scale")
        return cls(scale, tf.Variable(0, dtype=tf.int32, trainable=False, name="good_steps"), dynamic)

    def update(self, finite: Any) -> None:
        """Called once per step, outside the replicas, inside the compiled loop."""
        import tensorflow as tf

        if not self.dynamic:
            return
        good = tf.where(finite, self.good_steps + 1, 0)
        grow = good >= self.growth_interval
        changed = tf.where(finite, tf.where(grow, self.scale * 2.0, self.scale), self.scale * 0.5)
        self.scale.assign(tf.clip_by_value(changed, 1.0, 2.0**24))
        self.good_steps.assign(tf.where(grow, 0, good))

    def may_be_at_fault(self) -> Any:
        """1 where an overflow may be the scale's fault, as it can still go down, else 0: a float64 scalar."""
        import tensorflow as tf

        return tf.cast(self.scale > 1.0, tf.float64) if self.dynamic else tf.zeros([], tf.float64)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint holds of it."""
        return {"loss_scale": np.asarray(self.scale), "loss_scale_good_steps": np.asarray(self.good_steps)}

    def restore(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Assign what `arrays` gave."""
        self.scale.assign(arrays["loss_scale"])
        self.good_steps.assign(arrays["loss_scale_good_steps"])
