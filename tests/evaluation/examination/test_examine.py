"""Attention against hand-computed gradients, and a letter in a corner that training finds and evaluation reports."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_dist.config.loading import load_config
from cxr_dist.evaluation.evaluate import evaluate_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.evaluation.examination import attention
from cxr_dist.inference import grad_cam
from cxr_dist.launch.train import run_training
from tests.html_page import Page
from tfrecords_builder.build import BuildOptions, build_dataset

SETTINGS = [
    "global_batch_size=16",
    "precision=float32",
    "model.weights=none",
    "model.dropout=0.0",
    "stages.1.epochs=1",
    "stages.1.learning_rate=1e-3",
    "stages.2.epochs=20",
    "stages.2.unfreeze_layers=40",
    "stages.2.learning_rate=3e-3",
    "stages.2.optimizer=adam",
]


def linear_network(filters: int = 3) -> Any:
    """Convolution, mean over places, one linear layer: its Grad-CAM can be written down."""
    import keras

    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 1))
    x = keras.layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x)))


def test_grad_cam_of_a_linear_head_is_its_weights_over_the_area() -> None:
    network = linear_network()
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16)).astype(np.uint8)
    targets = np.array([0, 1, 2, 3, 0], np.int32)
    explained = grad_cam.make_explain(network)(images, targets)
    values = np.asarray(network.layers[1](images[..., None].astype("float32")))
    kernel = np.asarray(network.layers[-1].kernel)
    raw = np.maximum((values * kernel.T[targets][:, None, None, :] / 64).sum(axis=-1), 0)
    top = raw.max(axis=(1, 2), keepdims=True)
    expected = np.divide(raw, top, out=np.zeros_like(raw), where=top > 0)
    np.testing.assert_allclose(explained.maps, expected, atol=1e-4)
    np.testing.assert_allclose(explained.features, values.mean(axis=(1, 2)), rtol=1e-5)


def test_the_map_lights_up_where_the_evidence_is() -> None:
    import keras

    inputs = keras.Input((16, 16, 1))
    x = keras.layers.AveragePooling2D(2)(inputs)
    network = keras.Model(inputs, keras.layers.Dense(2, use_bias=False)(keras.layers.GlobalAveragePooling2D()(x)))
    network.layers[-1].kernel.assign([[1.0, -1.0]])
    images = np.zeros((2, 16, 16), np.uint8)
    images[:, 2:6, 8:12] = 200
    explained = grad_cam.make_explain(network)(images, np.array([0, 1], np.int32))
    assert explained.maps[0, 1:3, 4:6].min() == 1
    assert explained.maps[0].sum() == 4
    assert not explained.maps[1].any()
    masks = np.zeros(images.shape, np.bool_)
    masks[:, :8, 8:] = True
    shares = attention.lung_shares(explained.maps, masks)
    assert shares["images"] == 1
    assert shares["attention"] > 0.9
    assert shares["area"] == 0.25
    assert attention.lung_shares(explained.maps, ~masks)["attention"] < 0.1


def trained(folder: Path, phantoms: Path, letter: bool) -> Path:
    """A run on copies of the phantoms; each class has its own sign in the border (`letter`), or gray level of lungs."""
    for number, path in enumerate(sorted(phantoms.glob("*/*/*.png"))):
        pixels = np.array(Image.open(path))
        label = sorted(each.name for each in phantoms.iterdir()).index(path.parts[-3])
        if path.parts[-2] == "images":
            pixels[:4] = np.random.default_rng(number).integers(0, 40, pixels[:4].shape)
            if letter:
                pixels[:4, 12 * label : 12 * label + 12] = 255
            else:
                lungs = np.array(Image.open(path.parents[1] / "masks" / path.name)) > 0
                pixels[lungs] = pixels[lungs] // 8 + 60 * label
        (folder / "source" / Path(*path.parts[-3:-1])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "source" / Path(*path.parts[-3:]))
    build_dataset(folder / "source", folder / "dataset", BuildOptions(image_size=32, workers=1))
    run_training(load_config(None, SETTINGS), folder / "dataset", folder / "run", launcher="local")
    return folder / "run"


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("letter", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_letter_in_the_border_is_reported_and_without_it_the_border_is_not_said_to_decide(
    letter: bool, phantom_source: Path, tmp_path: Path
) -> None:
    run = trained(tmp_path, phantom_source, letter)
    out = tmp_path / "out"
    evaluate_run(EvaluationSpec(run, out, split="train", examine=48))
    tree = json.loads((out / "examination.json").read_text(), parse_constant=pytest.fail)
    alarms = {each["name"] for each in tree["findings"] if each["severity"] == "alarm"}
    page = Page((out / "report.html").read_text())
    assert tree["accuracy"] > 0.6, "a network that knows nothing shows nothing"
    assert tree["sample"]["with_mask"] == tree["sample"]["images"] == 48
    assert ("cue_conflict" in alarms) == letter
    assert ("without_border" in alarms) == letter
    assert ("Predictions follow the border" in page.text) == letter
    for title in ("Attention", "Shortcuts", "Robustness"):
        assert title in page.text
    assert (out / "examination-robustness.svg").exists()
    assert all(image["alt"] for image in page.all("img"))
    evaluate_run(EvaluationSpec(run, out))
    assert not list(out.glob("examination*")), "figures of an earlier examination do not stay"
