"""A finished run as a file that runs without this project: pixels in, calibrated probabilities out.

    OUT/model.onnx or OUT/saved_model    images uint8 [N, S, S, 1] -> probabilities float32 [N, C]
    OUT/metadata.json                    class names, image size, temperature, threshold

Preprocessing and calibration are inside. What was written is loaded again by its own runtime, and has to answer as the
run does, before the folder gets its name. In float32, whatever the run was trained in: a file is for any machine.
"""

import importlib.util
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cxr_dist.distributed.devices import muted_stderr, prepare_devices
from cxr_dist.inference.classifier import calibrated, load_model
from cxr_dist.model import split_point
from cxr_dist.runs.calibration_file import Calibration, read_calibration
from cxr_dist.runs.run_folder import read_finished
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import check_output_folder, read_json_object, sync, write_json
from tfrecords_builder.common.installation import install_command

Format = Literal["savedmodel", "onnx"]
METADATA = "metadata.json"
MARK = "cxr-dist export"
NAMES: dict[Format, str] = {"savedmodel": "saved_model", "onnx": "model.onnx"}
CHECKED_IMAGES = 16
TOLERANCE = 1e-4
OPSET = 17
"""Of ONNX: what runtimes since 2022 read."""
Run = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


def export_run(run: Path, out: Path, format_name: Format) -> dict[str, Any]:
    """Write the model of a finished run to the new folder `out`, or in place of an earlier export.

    Returns:
        What metadata.json holds.

    Raises:
        UserError: the run cannot be used, `out` holds something else, or ONNX's packages are missing.
        RuntimeError: what was written answers otherwise than the run; nothing is left of it.
    """
    found = read_finished(run)
    calibration = read_calibration(run) or Calibration()
    names = {METADATA, *NAMES.values()}
    check_output_folder(
        out,
        "an export",
        "OUT",
        lambda name: name in names,
        lambda: read_json_object(out / METADATA).get("made_by") == MARK,
    )
    if format_name == "onnx":
        _require_onnx()
    prepare_devices(1)
    model = load_model(found, "float32")
    size, class_names = found.info.image_size, found.info.class_names
    function = _with_channel(calibrated(split_point.whole_network(model), size, calibration.temperature), size)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    try:
        work.mkdir()
        target = work / NAMES[format_name]
        if format_name == "onnx":
            _write_onnx(function, size, target)
            loaded = _load_onnx(target)
        else:
            _write_saved_model(function, model, target)
            loaded = _load_saved_model(target)
        difference = compare(loaded, model, calibration.temperature, size)
        metadata = {
            "made_by": MARK,
            "format": format_name,
            "model": target.name,
            "input": {"name": "images", "dtype": "uint8", "shape": [None, size, size, 1]},
            "output": {"name": "probabilities", "dtype": "float32", "shape": [None, len(class_names)]},
            "class_names": list(class_names),
            "image_size": size,
            "temperature": calibration.temperature,
            "abstain_threshold": calibration.abstain_threshold if calibration.abstain_threshold <= 1 else None,
            "largest_difference": difference,
        }
        write_json(work / METADATA, metadata)
        for path in work.rglob("*"):
            sync(path)
        _publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return metadata


def compare(loaded: Run, model: Any, temperature: float, image_size: int) -> float:
    """The largest difference of any probability on `check_images`.

    Args:
        loaded: The exported model.
        model: The run's own, as it was trained: image float32 [B, S, S, 1] -> logits.

    Raises:
        RuntimeError: it is above `TOLERANCE`, or another class is the highest.
    """
    images = check_images(image_size)
    logits = np.asarray(model(images.astype(np.float32), training=False), np.float64) / temperature
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    found = loaded(images)
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
    if not difference <= TOLERANCE or (found.argmax(axis=1) != expected.argmax(axis=1)).any():
        raise RuntimeError(
            f"the exported model differs from the run by {difference:.2g}, or in its classes; nothing was written"
        )
    return difference


def check_images(image_size: int) -> npt.NDArray[np.uint8]:
    """Noise of several grains, ramps, black and white: uint8 [CHECKED_IMAGES, S, S, 1]; the same ones always."""
    rng, side = np.random.default_rng(0), image_size
    images = np.zeros((CHECKED_IMAGES, side, side), np.uint8)
    images[1] = 255
    images[2] = np.linspace(0, 255, side, dtype=np.uint8)
    images[3] = images[2].T
    for index in range(4, CHECKED_IMAGES):
        grain = 2 ** (index % 6)
        coarse = rng.integers(0, 256, (-(-side // grain),) * 2, dtype=np.uint8)
        images[index] = np.kron(coarse, np.ones((grain, grain), np.uint8))[:side, :side]
    return images[..., None]


def _with_channel(forward: Any, size: int) -> Any:
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, size, size, 1], tf.uint8, name="images")])
    def answer(images: Any) -> dict[str, Any]:
        return {"probabilities": forward(images[..., 0])}

    return answer


def _write_saved_model(function: Any, model: Any, target: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.model, module.answer = model, function  # what is saved finds its variables through the module
    with muted_stderr():
        tf.saved_model.save(module, str(target), signatures={"serving_default": function})


def _load_saved_model(target: Path) -> Run:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(target))  # held, as its signatures do not hold its variables
    return lambda images: loaded.signatures["serving_default"](images=tf.constant(images))["probabilities"].numpy()


def _require_onnx() -> None:
    for name in ("tf2onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--format onnx needs {name}; install it: {install_command('onnx')}, or use --format savedmodel"
            )


def _write_onnx(function: Any, size: int, target: Path) -> None:
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec([None, size, size, 1], tf.uint8, name="images")]
    with muted_stderr():
        tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET, output_path=str(target))


def _load_onnx(target: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def _publish(work: Path, out: Path) -> None:
    """Give the whole folder its name; an earlier export is moved away first, as a folder is not renamed onto one."""
    earlier = out.parent / f"{work.name}.old"
    if out.exists():
        out.rename(earlier)
    try:
        work.rename(out)
    except BaseException:
        if earlier.exists():
            earlier.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(earlier, ignore_errors=True)
