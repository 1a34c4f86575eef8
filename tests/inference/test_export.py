"""An exported model answers as the run does, in its own runtime, or is not there."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from cxr_dist.cli import main
from cxr_dist.inference import export
from cxr_dist.inference.classifier import load_classifier
from tests.inference.test_classifier import calibrated_run, phantoms  # noqa: F401 - the first is a fixture
from tfrecords_builder.common.errors import UserError

pytestmark = pytest.mark.usefixtures("small_network")


def load_elsewhere(out: Path, format_name: str) -> export.Run:
    """As a user would, without this project."""
    if format_name == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out / "model.onnx"))
        assert [(value.name, value.type) for value in session.get_inputs()] == [("images", "tensor(uint8)")]
        assert [(value.name, value.type) for value in session.get_outputs()] == [("probabilities", "tensor(float)")]
        return lambda images: session.run(None, {"images": images})[0]
    import tensorflow as tf

    loaded = tf.saved_model.load(str(out / "saved_model"))
    return lambda images: loaded.signatures["serving_default"](images=images)["probabilities"].numpy()


@pytest.mark.parametrize("format_name", ["savedmodel", "onnx"])
def test_what_is_exported_answers_as_the_run_does(
    format_name: str,
    calibrated_run: Path,  # noqa: F811
    phantom_source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "exports" / "out"
    for _ in range(2):  # the second time in place of the first
        main.main(["export", str(calibrated_run), str(out), "--format", format_name])
    assert "uint8 [None, 32, 32, 1] -> 4 probabilities" in capsys.readouterr().out
    _, images = phantoms(phantom_source, 20)
    expected = load_classifier(calibrated_run, "float32").probabilities(images)
    answer = load_elsewhere(out, format_name)
    for count in (20, 1):
        found = answer(images[:count, ..., None])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:count], atol=1e-4)
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["class_names"] == ["COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia"]
    assert (metadata["image_size"], metadata["temperature"], metadata["abstain_threshold"]) == (32, 2.5, 0.4)
    assert 0 <= metadata["largest_difference"] <= 1e-4
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing else is left"


@pytest.mark.nightly
def test_a_model_that_answers_otherwise_is_removed(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_write_onnx", lambda _function, _size, target: target.write_bytes(b"no model"))
    out = tmp_path / "exports" / "out"
    for wrong in (0.0, 2e-4, np.nan):
        original = export._load_saved_model

        def load(target: Path, wrong: float = wrong, original: object = original) -> export.Run:
            answer = original(target)  # type: ignore[operator]

            def answer_wrongly(images: np.ndarray) -> np.ndarray:
                return answer(images)[:, ::-1] if wrong == 0.0 else answer(images) + np.float32(wrong)

            return answer_wrongly

        with monkeypatch.context() as patch:
            patch.setattr(export, "_load_saved_model", load)
            with pytest.raises(RuntimeError, match="differs from the run"):
                export.export_run(finished_run, out, "savedmodel")
        assert list(out.parent.iterdir()) == []
    with pytest.raises(Exception, match="model"):
        export.export_run(finished_run, out, "onnx")
    assert list(out.parent.iterdir()) == []


def test_what_is_in_the_way_stays(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "metadata.json").write_text('{"made_by": "somebody else"}')
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "folder", "like"):
        with pytest.raises(UserError, match=f"^{tmp_path / name}: "):
            export.export_run(finished_run, tmp_path / name, "savedmodel")
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(UserError, match=r"tf2onnx.*\[onnx\]"):
        export.export_run(finished_run, tmp_path / "new", "onnx")


def test_the_images_of_the_check_are_many_kinds() -> None:
    images = export.check_images(37)
    assert images.shape == (16, 37, 37, 1)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 16
