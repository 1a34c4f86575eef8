"""Names that Keras, TensorFlow and Ray do not document: each works, its end is said, and none is used elsewhere."""

import ast
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_dist import compat
from cxr_dist.data.arrays import weak_numpy_function
from cxr_dist.runs.versions import version_of
from tfrecords_builder.common.errors import UserError

ROOT = Path(__file__).parents[1]


def network() -> Any:
    import keras

    inputs = keras.Input((4,), name="inputs")
    return keras.Model(inputs, keras.layers.Dense(2, name="second")(keras.layers.Dense(3, name="first")(inputs)))


def test_the_nodes_of_a_model_are_in_the_order_of_computation() -> None:
    nodes = compat.functional_nodes(network())
    assert [node.operation.name for node in nodes] == ["inputs", "first", "second"]
    assert nodes[1].output_tensors[0] is nodes[2].input_tensors[0]


def test_strategies_number_their_collectives_apart() -> None:
    import tensorflow as tf

    kinds = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
    before = [kind._collective_key_base for kind in kinds]
    compat.reserve_collective_keys(7)
    assert [kind._collective_key_base for kind in kinds] == [base + 7 for base in before]


class Doubler:
    def double(self, values: Any) -> Any:
        return 2 * values


def test_a_numpy_function_works_and_lets_go_of_its_object() -> None:
    import tensorflow as tf

    def read() -> tuple["weakref.ref[Doubler]", int]:
        doubler = Doubler()

        @tf.autograph.experimental.do_not_convert
        def load(value: Any) -> Any:
            return weak_numpy_function(doubler.double, [value], tf.int64)

        assert [int(value) for value in tf.data.Dataset.range(3).map(load)] == [0, 2, 4]
        return weakref.ref(doubler), len(compat.outermost_graph()._py_funcs_used_in_graph)

    reference, count = read()
    gc.collect()
    assert reference() is None
    assert len(compat.outermost_graph()._py_funcs_used_in_graph) < count, "others may have gone with it"


def test_a_name_that_has_gone_is_said_with_library_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    model = network()
    del model._nodes_by_depth
    with pytest.raises(UserError, match=r"^keras .*Functional has no _nodes_by_depth") as caught:
        compat.functional_nodes(model)
    assert str(caught.value).startswith(f"keras {version_of('keras')}: ")
    assert "; install keras" in str(caught.value)
    monkeypatch.delattr(tf.distribute.MirroredStrategy, "_collective_key_base")
    for kind in tf.distribute.MirroredStrategy.__mro__[1:]:
        if "_collective_key_base" in vars(kind):
            monkeypatch.delattr(kind, "_collective_key_base")
    with pytest.raises(UserError, match=r"^tensorflow .*MirroredStrategy has no _collective_key_base"):
        compat.reserve_collective_keys(1)
    with pytest.raises(UserError, match=r"^tensorflow .*Graph has no _py_funcs_used_in_graph"):
        compat.forgetting_numpy_function(tf.Graph(), np.double)


# No other module uses one

PUBLIC = ("_exit", "_replace")
"""Documented, of `os` and of named tuples."""


def private_names(source: str) -> Iterator[str]:
    """Uses of a private attribute of another object, and imports of a private module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner, name = ast.unparse(node.value), node.attr
            hidden = name.startswith("_") and not name.endswith("__") and name not in PUBLIC
            if (hidden and owner not in ("self", "cls", "other")) or (owner, name) == ("Image", "core"):
                yield f"{owner}.{name}"
        modules = []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(FOREIGN):
            modules = [node.value]
        for module in modules:
            own = module.startswith(("cxr_dist", "tfrecords_builder", "__future__"))
            if not own and ("._" in module or module.startswith(("_", "keras.src", "tensorflow.python"))):
                yield module


FOREIGN = ("ray.", "keras.", "tensorflow.", "PIL.")


def test_no_private_name_outside_compat() -> None:
    used = {}
    for package in ("cxr_dist", "tfrecords_builder"):
        for path in sorted((ROOT / package).rglob("*.py")):
            names = sorted(set(private_names(path.read_text(encoding="utf-8"))))
            module = path.relative_to(ROOT).as_posix()
            if names and module != "cxr_dist/compat.py":
                used[module] = names
    assert used == {}


@pytest.mark.parametrize(
    "source",
    [
        "model._flatten_layers()",
        "self._client._do_request()",
        "from ray._private import services",
        "import tensorflow.python.ops",
        "from PIL import Image\nImage.core.set_blocks_max(1)",
        "name = 'ray._private.runtime_env'",
    ],
)
def test_the_search_finds_private_names(source: str) -> None:
    assert list(private_names(source))
    assert not list(private_names("self._own = cls._other\nfrom cxr_dist.x import _y\nos._exit(1)"))
