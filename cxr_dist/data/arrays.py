"""Rows that are read by position: the protocol, rows in memory, and functions of Python that read for a graph."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cxr_dist import compat
from cxr_dist.data.batch_sampler import Positions


class Source(Protocol):
    """Labelled inputs that are read by position."""

    @property
    def count(self) -> int: ...

    @property
    def labels(self) -> npt.NDArray[np.int32]: ...

    def batches(self, positions: Any) -> Any:
        """TensorFlow ops from positions int64 [B] (all valid) to inputs [B, ...] of static shape."""


class Indexed(Protocol):
    """What NumPy arrays do, and rows on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Positions) -> npt.NDArray[Any]: ...


def weak_numpy_function(method: Callable[..., Any], inputs: Sequence[Any], dtypes: Any) -> Any:
    """As `tf.numpy_function` of a bound method, whose object TensorFlow would else keep for ever.

    The object must be kept by who reads: the function of one that is gone raises RuntimeError. Call it while a graph
    is built.
    """
    import tensorflow as tf

    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Any:
        alive = reference()
        if alive is None:
            raise RuntimeError("the source of these batches is gone")
        return alive(*arguments)

    tensors = tf.numpy_function(call, inputs, dtypes)
    forget = compat.forgetting_numpy_function(compat.outermost_graph(), call)
    finalizer = weakref.finalize(method.__self__, forget)  # type: ignore[attr-defined]  # bound: WeakMethod
    finalizer.atexit = False  # iterators may still read then
    return tensors


class ArraySource:
    """Inputs in memory or on disk: `inputs` [N, ...], taken by an array of positions, and `labels` int32 [N]."""

    failure: Exception | None = None

    def __init__(self, inputs: Indexed, labels: npt.NDArray[np.int32]) -> None:
        if len(inputs) != len(labels):
            raise ValueError(f"{len(inputs)} inputs and {len(labels)} labels")
        self._inputs, self._labels = inputs, labels

    @property
    def count(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self._labels

    @property
    def nbytes(self) -> int:
        """Of all inputs."""
        return int(np.prod(self._inputs.shape)) * int(np.dtype(self._inputs.dtype).itemsize)

    def array(self) -> npt.NDArray[Any]:
        """All inputs, [N, ...]."""
        inputs = self._inputs
        return inputs if isinstance(inputs, np.ndarray) else inputs[np.arange(len(inputs))]

    def batches(self, positions: Any) -> Any:
        rows = weak_numpy_function(self._take, [positions], self._inputs.dtype)
        rows.set_shape([positions.shape[0], *self._inputs.shape[1:]])
        return rows

    def _take(self, positions: Positions) -> npt.NDArray[Any]:
        return self._inputs[positions]


class MemorySource(ArraySource):
    """Inputs in memory, [N, ...], of which TensorFlow takes rows itself, without a call into Python for each batch."""

    _ALIGNMENT = 64
    """Bytes; TensorFlow ends the process where it finds other memory (`EIGEN_MAX_ALIGN_BYTES`)."""

    def __init__(self, inputs: npt.NDArray[Any], labels: npt.NDArray[np.int32]) -> None:
        """Args:
        inputs: Made by `empty`; not copied.
        """
        import tensorflow as tf

        super().__init__(inputs, labels)
        if inputs.ctypes.data % self._ALIGNMENT:
            raise ValueError(f"inputs at {inputs.ctypes.data:#x}: not aligned to {self._ALIGNMENT} bytes")
        self._tensor = tf.experimental.dlpack.from_dlpack(inputs.__dlpack__())

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array for what is to come."""
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.empty(size + cls._ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % cls._ALIGNMENT
        return memory[first : first + size].view(dtype).reshape(shape)

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        return tf.gather(self._tensor, positions)


class Slice:
    """Some of a source's inputs, from `first` up to `last`."""

    def __init__(self, source: Source, first: int, last: int) -> None:
        self._source, self._first, self._last = source, first, last

    @property
    def count(self) -> int:
        return self._last - self._first

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self._source.labels[self._first : self._last]

    def batches(self, positions: Any) -> Any:
        """As the source, from positions in the slice."""
        return self._source.batches(positions + self._first)
