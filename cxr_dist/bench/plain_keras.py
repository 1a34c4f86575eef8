"""The baseline: what a careful notebook does, in plain Keras, with none of this project's code.

`image_dataset_from_directory`, float32, `fit`, the same model, the same images in the same split, the
same batch size, and the published learning rates. Best weights by validation accuracy, as a `ModelCheckpoint`
callback keeps them. It prints one JSON line of times and figures.

    python -m cxr_dist.bench.plain_keras SOURCE DATASET/manifest.parquet --weights PATH --out result.json
"""

import argparse
import atexit
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def link_splits(source: Path, manifest: Path, target: Path) -> list[str]:
    """Lay out SPLIT/CLASS/FILE as links, the form that `image_dataset_from_directory` reads."""
    import pyarrow.parquet as pq

    rows = pq.read_table(manifest, columns=["path", "class_name", "split"]).to_pylist()
    for row in rows:
        if row["split"] is None:
            continue
        folder = target / row["split"] / row["class_name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / row["path"].replace("/", "__")).symlink_to((source / row["path"]).resolve())
    return sorted({row["class_name"] for row in rows})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--weights", required=True, help="ImageNet weights without the top, 'imagenet' or 'none'")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, nargs=2, default=(3, 4), metavar=("STAGE1", "STAGE2"))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--unfreeze-layers", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of an epoch, for its speed alone; no more is validated, none tested")
    return parser.parse_args()


def build_model(options: argparse.Namespace, classes: int) -> tuple[Any, Any]:
    """The whole model, and the base in it, which is frozen."""
    import keras

    size = (options.image_size, options.image_size)
    weights = None if options.weights == "none" else options.weights
    base = keras.applications.ResNet50(include_top=False, weights=weights, input_shape=(*size, 3))
    base.trainable = False
    inputs = keras.Input((*size, 3))
    x = keras.applications.resnet50.preprocess_input(inputs)
    x = base(x, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(options.dropout)(x)
    x = keras.layers.Dense(256, activation="relu")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(options.dropout)(x)
    return keras.Model(inputs, keras.layers.Dense(classes, activation="softmax")(x)), base


def make_clock(times: list[float]) -> Any:
    """A callback that notes, of each epoch, when its training begins, and when its validation begins and ends."""
    import keras

    def note(*_arguments: Any) -> None:
        times.append(time.perf_counter())

    return keras.callbacks.LambdaCallback(on_epoch_begin=note, on_test_begin=note, on_test_end=note)


def fit_stages(
    options: argparse.Namespace, model: Any, base: Any, data: tuple[Any, Any], best: Path, started: float
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Rows of all epochs, and the seconds of each stage. The best weights are left in the file `best`."""
    import keras

    train, validation = data
    history, seconds = [], {"start": time.perf_counter() - started}
    keep = keras.callbacks.ModelCheckpoint(
        str(best), monitor="val_accuracy", mode="max", save_best_only=True, save_weights_only=True
    )
    for stage, epochs in enumerate(options.epochs, start=1):
        stage_started = time.perf_counter()
        if stage == 2:
            base.trainable = True
            for layer in base.layers[: -options.unfreeze_layers]:
                layer.trainable = False
        rate = options.learning_rate * (0.1 if stage == 2 else 1.0)
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
        times: list[float] = []
        log = model.fit(
            train.repeat() if options.steps else train,
            validation_data=validation,
            epochs=epochs,
            steps_per_epoch=options.steps,
            validation_steps=options.steps,
            callbacks=[keep, make_clock(times)],
            verbose=2,
        )
        for epoch in range(epochs):
            trained, tested, ended = times[3 * epoch : 3 * epoch + 3]
            taken = {"train_seconds": tested - trained, "validation_seconds": ended - tested}
            figures = {key: float(values[epoch]) for key, values in log.history.items()}
            history.append({"stage": stage, **taken, "elapsed_seconds": ended - started} | figures)
        seconds[f"stage_{stage}"] = time.perf_counter() - stage_started
    return history, seconds


def main() -> None:
    options = parse_options()
    started = time.perf_counter()
    import keras

    keras.utils.set_random_seed(options.seed)
    work = Path(tempfile.mkdtemp(prefix="plain-keras-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    classes = link_splits(options.source, options.manifest, work)

    def load(split: str, shuffle: bool) -> Any:
        return keras.utils.image_dataset_from_directory(
            work / split,
            class_names=classes,
            batch_size=options.batch_size,
            image_size=(options.image_size, options.image_size),
            shuffle=shuffle,
            seed=options.seed,
            verbose=False,
        ).prefetch(2)

    train, validation, test = load("train", True), load("validation", False), load("test", False)
    model, base = build_model(options, len(classes))
    best = work / "best.weights.h5"
    history, seconds = fit_stages(options, model, base, (train, validation), best, started)
    result: dict[str, Any] = {"parameters": model.count_params(), "seconds": seconds, "history": history}
    if not options.steps:
        model.load_weights(str(best))
        result |= test_scores(model, test) | {"best_val_accuracy": max(row["val_accuracy"] for row in history)}
        seconds["total"] = time.perf_counter() - started
    options.out.write_text(json.dumps(result | {"cpu_seconds": sum(os.times()[:2])}, indent=2))
    print(json.dumps(result))


def test_scores(model: Any, test: Any) -> dict[str, float]:
    """Accuracy and macro F1 on the batches of `test`, which are in a fixed order."""
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score

    labels = np.concatenate([label for _, label in test.as_numpy_iterator()])
    predicted = model.predict(test, verbose=0).argmax(axis=1)
    return {
        "test_accuracy": float(accuracy_score(labels, predicted)),
        "test_f1_macro": float(f1_score(labels, predicted, average="macro")),
    }


if __name__ == "__main__":
    main()
