"""The configuration tree: presets, overrides, and errors that name the field, the value and the fix."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st

import tune_configs
from cxr_dist.config.loading import known_keys, load_config, resolve_preset
from cxr_dist.config.schema import BASE_LAYERS, Config
from tfrecords_builder.common.errors import UserError

Write = Callable[[str], Path]
PRESETS = sorted(
    path for path in Path(tune_configs.__file__).parent.glob("*.yaml") if not path.stem.startswith("search")
)


def error_of(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


# Presets


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_set_what_they_say(path: Path) -> None:
    config = load_config(path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written, "an empty preset would load, too"
    for key in ("seed", "global_batch_size", "precision", "xla"):
        if key in written:
            assert config.tree()[key] == written[key]
    for number, stage in written["stages"].items():
        assert config.stages[number].epochs == stage["epochs"]
    assert all(stage.learning_rate for stage in config.stages.values())


def test_the_promised_presets_are_there() -> None:
    assert {"published", "cpu", "smoke", "demo"} <= {path.stem for path in PRESETS}
    published = load_config(resolve_preset(Path("published")))
    assert published.model.weights == "imagenet"
    assert published.stages[1].unfreeze_layers == 0
    assert published.stages[2].unfreeze_layers == 100
    first, second = published.stages[1].learning_rate, published.stages[2].learning_rate
    assert first is not None
    assert second == pytest.approx(first / 10)
    smoke = load_config(resolve_preset(Path("smoke")))
    assert (smoke.model.weights, smoke.model.image_size) == ("none", None)


def test_presets_by_name_and_files_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    smoke = next(path for path in PRESETS if path.stem == "smoke")
    for name in ("smoke", "smoke.yaml", "tune_configs/smoke.yaml"):
        assert resolve_preset(Path(name)) == smoke
    assert resolve_preset(None) is None
    own = Path("smoke.yaml")
    own.write_text("seed: 7")
    assert resolve_preset(own) == own, "the user's own file comes before a preset"
    for missing in ("smok", "elsewhere/smoke.yaml"):
        with pytest.raises(UserError, match=rf"^--config {missing}: .*published.*smoke"):
            resolve_preset(Path(missing))


# Round trip


@pytest.mark.parametrize("path", [None, *PRESETS], ids=lambda path: path.stem if path else "defaults")
def test_the_resolved_tree_loads_again_unchanged(path: Path | None, tmp_path: Path) -> None:
    config = load_config(path, ["xla=on", "stages.3.learning_rate=1e-5", "stages.3.clip_norm=1"])
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config
    assert Config.model_validate(config.tree()) == config


@given(
    rate=st.floats(1e-12, 10),
    angle=st.floats(0, 45),
    layers=st.integers(0, BASE_LAYERS),
    xla=st.sampled_from(["off", "on", "auto"]),
    clip=st.one_of(st.just("null"), st.floats(1e-6, 1e6)),
)
def test_any_values_survive_the_file(rate: float, angle: float, layers: int, xla: str, clip: str | float) -> None:
    values = {
        "stages.1.learning_rate": rate,
        "augmentation.rotation": angle,
        "stages.1.unfreeze_layers": layers,
        "xla": xla,
        "stages.2.clip_norm": clip,
    }
    config = load_config(overrides=[f"{key}={value}" for key, value in values.items()])
    assert (config.stages[1].learning_rate, config.augmentation.rotation, config.xla) == (rate, angle, xla)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(path) == config


def test_every_known_key_can_be_set_to_its_own_default(tmp_path: Path) -> None:
    keys = known_keys()
    promised = {
        "seed", "deterministic", "global_batch_size", "precision", "xla", "model.weights", "model.image_size",
        "model.dropout", "stages.1.epochs", "stages.1.learning_rate", "features.cache", "stages.2.epochs",
        "stages.2.learning_rate", "stages.2.unfreeze_layers",
    }  # fmt: skip
    assert promised <= set(keys)
    overrides = [f"{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in keys.items()]
    assert load_config(overrides=overrides) == load_config()


# Values


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("xla: on", "xla", "on"),
        ("xla: off", "xla", "off"),
        ("xla: 'off'", "xla", "off"),
        ("xla: auto", "xla", "auto"),
        ("features: {cache: no}", "features.cache", "off"),
        ("deterministic: on", "deterministic", True),
        ("model: {weights: none}", "model.weights", "none"),
        ("model: {image_size: null}", "model.image_size", None),
        ("model: {image_size: ~}", "model.image_size", None),
        ("stages: {1: {learning_rate: 1e-3}}", "stages.1.learning_rate", 1e-3),
        ("stages: {'1': {learning_rate: 2.E-3}}", "stages.1.learning_rate", 2e-3),
        ("stages: {1: {learning_rate: 1}}", "stages.1.learning_rate", 1.0),
        ("stages: {2: {clip_norm: .5e+1}}", "stages.2.clip_norm", 5.0),
        ("stages: {2: {early_stopping: null}}", "stages.2.early_stopping", None),
    ],
)
def test_yaml_forms(text: str, key: str, value: object, write: Write) -> None:
    def at(config: Config) -> object:
        node = config.tree()
        for part in key.split("."):
            node = node.get(part, node.get(int(part))) if part.isdigit() else node[part]
        return node

    assert at(load_config(write(text))) == value
    written = text.rsplit(": ", 1)[1].rstrip("}")
    assert at(load_config(overrides=[f"{key}={written}"])) == value


def test_an_empty_file_is_the_defaults(write: Write) -> None:
    assert load_config(write("")) == load_config() == load_config(write("# only a comment\n"))


@pytest.mark.parametrize("rate", ["1e-3", "0.05", "3e-4", "1", "7.77e-5"])
def test_stage_2_learns_at_a_tenth(rate: str) -> None:
    config = load_config(overrides=[f"stages.1.learning_rate={rate}"])
    assert config.stages[2].learning_rate == pytest.approx(float(rate) / 10, rel=1e-6)
    given = load_config(overrides=[f"stages.1.learning_rate={rate}", "stages.2.learning_rate=0.02"])
    assert given.stages[2].learning_rate == 0.02


def test_overrides_come_after_the_file_and_the_last_wins(write: Write) -> None:
    path = write("seed: 1\nglobal_batch_size: 8\nstages: {1: {epochs: 5}}")
    config = load_config(path, ["seed=2", "stages.1.learning_rate=0.5", "seed=3"])
    assert (config.seed, config.global_batch_size) == (3, 8)
    assert (config.stages[1].epochs, config.stages[1].learning_rate) == (5, 0.5)
    mapped = load_config(path, ["stages={1: {epochs: 9}}", "model={weights: none}"])
    assert (mapped.stages[1].epochs, mapped.stages[2].epochs) == (9, load_config().stages[2].epochs)
    assert mapped.model.weights == "none"


def test_a_third_stage(write: Write) -> None:
    overrides = ["stages.3.learning_rate=1e-5", "stages.3.unfreeze_layers=175", "stages.3.epochs=2"]
    config = load_config(overrides=overrides)
    assert sorted(config.stages) == [1, 2, 3]
    assert config.stages[3].model_dump(include={"learning_rate", "unfreeze_layers", "epochs"}) == {
        "learning_rate": 1e-5, "unfreeze_layers": 175, "epochs": 2,
    }  # fmt: skip
    path = write("stages: {3: {learning_rate: 1.0e-5, unfreeze_layers: 175, epochs: 2}}")
    assert load_config(path) == config
    assert "stages.3.learning_rate" in error_of("stages.3.epochs=2")
    assert "stages" in error_of("stages.4.learning_rate=1e-5")


# Errors


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("seed=-1", "seed"),
        ("seed=2147483648", "seed"),
        ("seed=yes", "seed"),
        ("seed=1.5", "seed"),
        ("seed=[1]", "seed"),
        ("deterministic=maybe", "deterministic"),
        ("global_batch_size=0", "global_batch_size"),
        ("global_batch_size=true", "global_batch_size"),
        ("global_batch_size=many", "global_batch_size"),
        ("precision=fp16", "precision"),
        ("precision=off", "precision"),
        ("xla=always", "xla"),
        ("xla=1", "xla"),
        ("model.weights=null", "model.weights"),
        ("model.weights=", "model.weights"),
        ("model.weights=3", "model.weights"),
        ("model.image_size=31", "model.image_size"),
        ("model.image_size=on", "model.image_size"),
        ("model.dropout=1", "model.dropout"),
        ("model.dropout=-0.1", "model.dropout"),
        ("model.dropout=false", "model.dropout"),
        ("model.batch_norm=frozen", "model.batch_norm"),
        ("model.batch_norm_momentum=1", "model.batch_norm_momentum"),
        ("augmentation.rotation=46", "augmentation.rotation"),
        ("augmentation.shift=0.6", "augmentation.shift"),
        ("augmentation.zoom=-0.1", "augmentation.zoom"),
        ("augmentation.contrast=1", "augmentation.contrast"),
        ("augmentation.brightness=.nan", "augmentation.brightness"),
        ("features.cache=sometimes", "features.cache"),
        ("stages.1.epochs=-1", "stages.1.epochs"),
        ("stages.1.epochs=0.5", "stages.1.epochs"),
        ("stages.1.epochs=null", "stages.1.epochs"),
        ("stages.2.unfreeze_layers=176", "stages.2.unfreeze_layers"),
        ("stages.1.learning_rate=0", "stages.1.learning_rate"),
        ("stages.1.learning_rate=-0.1", "stages.1.learning_rate"),
        ("stages.1.learning_rate=.inf", "stages.1.learning_rate"),
        ("stages.1.learning_rate=fast", "stages.1.learning_rate"),
        ("stages.1.learning_rate=on", "stages.1.learning_rate"),
        ("stages.1.optimizer=lion", "stages.1.optimizer"),
        ("stages.1.momentum=1", "stages.1.momentum"),
        ("stages.1.weight_decay=-1", "stages.1.weight_decay"),
        ("stages.1.schedule=linear", "stages.1.schedule"),
        ("stages.1.warmup_epochs=-1", "stages.1.warmup_epochs"),
        ("stages.1.clip_norm=0", "stages.1.clip_norm"),
        ("stages.1.clip_norm=none", "stages.1.clip_norm"),
        ("stages.1.label_smoothing=1", "stages.1.label_smoothing"),
        ("stages.1.class_weights=heavy", "stages.1.class_weights"),
        ("stages.1.early_stopping=0", "stages.1.early_stopping"),
    ],
)
def test_bad_values_name_field_and_value(override: str, field: str) -> None:
    message = error_of(override)
    assert message.startswith(f"config {field}"), message
    value = yaml.safe_load(override.partition("=")[2])
    if not isinstance(value, list):
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        assert shown in message.removeprefix(f"config {field}"), message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("global_batchsize", "global_batch_size"),
        ("batch_size", "global_batch_size"),
        ("model.dropot", "model.dropout"),
        ("dropout", "model.dropout"),
        ("stages.1.epoch", "stages.1.epochs"),
        ("stages.2.unfreeze", "stages.2.unfreeze_layers"),
        ("stages.1.learning-rate", "stages.1.learning_rate"),
        ("feature.cache", "features.cache"),
        ("model.weights.path", None),
        ("qqqqqqqq", None),
        ("stages.first", None),
    ],
)
def test_unknown_keys_name_the_nearest(key: str, nearest: str | None, write: Write) -> None:
    text = "1"
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    for message in (error_of(f"{key}=1"), error_of(path=write(text))):
        first, _, _ = key.partition(".")
        if nearest:
            assert first in message
            assert f": unknown config key; did you mean {nearest}?" in message
        else:
            assert first in message.partition(";")[0], message
    assert str(write(text)) in error_of(path=write(text)), "the file is named"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.epochs=x", "config stages.1.epochs 'x': must be an integer"),
        ("stages.1.epochs=1.5", "config stages.1.epochs 1.5: must be an integer"),
        ("stages.1.epochs=-1", "config stages.1.epochs -1: must be greater than or equal to 0"),
        ("stages.1.epochs=true", "config stages.1.epochs true: must be a number, not true or false"),
        ("stages.1.epochs=null", "config stages.1.epochs null: must be an integer"),
        ("stages.1.epochs=[1, 2]", "config stages.1.epochs (a list): must be an integer"),
        ("stages.1.epochs={a: 1}", "--set stages.1.epochs: is a value, not a mapping"),
        ("stages.1.epoch=5", "--set stages.1.epoch: unknown config key; did you mean stages.1.epochs?"),
        ("stages.1.learning_rate=fast", "config stages.1.learning_rate 'fast': must be a number"),
        ("seed=2026-01-01", "config seed 2026-01-01: must be an integer"),
        ("seed=9999999999", "config seed 9999999999: must be less than 2147483648"),
        ("model.dropout=.nan", "config model.dropout nan: must be a finite number"),
        ("model.batch_norm=frozen", "config model.batch_norm 'frozen': must be 'train' or 'inference'"),
        ("xla=maybe", "config xla 'maybe': must be 'auto', 'on' or 'off'"),
        ("model.weights=3", "config model.weights 3: must be text"),
        ("deterministic=perhaps", "config deterministic 'perhaps': must be true or false"),
        ("augmentation.rotation=90", "config augmentation.rotation 90: must be less than or equal to 45"),
        (
            "input.shared_folder=here",
            "config input.shared_folder 'here': must be an absolute path, such as /dev/shm/cxr-dist",
        ),
        (
            "stages.1.weight_decay=0.1",
            "config stages.1: weight_decay is decoupled and needs optimizer adamw or sgd, not adam",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_in_our_own_words(override: str, message: str) -> None:
    """With the key, the value and what is allowed; and without the validator's own words."""
    found = error_of(override)
    assert found == message
    for word in ("pydantic", "validation error", "Input should", "unable to", "http"):
        assert word not in found


@pytest.mark.parametrize("number", [3, 7])
def test_unknown_keys_of_a_new_stage_fail_too(number: int) -> None:
    assert "unknown config key" in error_of(f"stages.{number}.epoch=1")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed"], ["--set seed", "key=value"]),
        (["=3"], ["--set =3", "key=value"]),
        (["model=3"], ["model", "model.weights"]),
        (["stages=null"], ["stages"]),
        (["stages.1=5"], ["stages.1", "stages.1.epochs"]),
        (["seed={a: 1}"], ["seed", "not a mapping"]),
        (["model.weights=["], ["--set model.weights=[", "YAML"]),
        (["stages.1.epochs=0", "stages.2.epochs=0"], ["stages", "0 epochs"]),
        (["stages.1.weight_decay=0.1"], ["stages.1", "weight_decay", "adamw"]),
        (["xla=on", "model.synchronize_batch_norm=true"], ["xla", "model.synchronize_batch_norm"]),
        (["stages.1.learning_rate=null"], ["stages.1.learning_rate", "not given"]),
    ],
)
def test_what_does_not_fit_together(overrides: list[str], words: list[str]) -> None:
    message = error_of(*overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "a: [", "seed: 1\n\tmodel: 2", "\0"])
def test_files_that_are_no_mapping(text: str, write: Write) -> None:
    path = write(text)
    assert str(path) in error_of(path=path)


def test_a_key_that_is_there_twice(write: Write) -> None:
    """YAML libraries take the last one in silence."""
    assert "seed" in error_of(path=write("seed: 1\nprecision: auto\nseed: 2"))
    assert "epochs" in error_of(path=write("stages: {1: {epochs: 1, epochs: 2}}"))
    merged = load_config(write("stages: {1: &one {epochs: 3, augment: true}, 2: {<<: *one, epochs: 4}}"))
    assert (merged.stages[2].epochs, merged.stages[2].augment) == (4, True)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"# \xe9\nseed: 1")
    for name in ("missing.yaml", "latin.yaml", "."):
        assert error_of(path=tmp_path / name).startswith(f"{tmp_path / name}: ")


def test_a_resolved_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().stages[1].epochs = 9  # type: ignore[misc]
