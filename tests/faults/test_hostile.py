"""What somebody else sent: nothing in it is executed, nothing is written or read elsewhere, and no memory is taken.

All of it is sealed, as whoever means harm can compute a checksum.
"""

import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_dist.config.loading import read_yaml
from cxr_dist.evaluation.evaluate import evaluate_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.runs import run_folder
from cxr_dist.runs.checkpoint_file import load_arrays, load_state
from tests.conftest import use_small_base
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.seal import UNSEALED, seal, seal_zip
from tfrecords_builder.format.manifest import Manifest, read_manifest, write_manifest
from tfrecords_builder.verify import verify_dataset

EXECUTED = "an-attacker-was-here"


@pytest.fixture(autouse=True)
def nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No command of the hostile content was executed, and it got no gigabytes."""
    import keras  # noqa: F401 - takes 0.7 GB, in whichever test is the first to import it

    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert not list(tmp_path.rglob(EXECUTED))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "in KiB"


class Command:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {EXECUTED}",)


# Checkpoints


def tensor(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


DESCRIBED = json.dumps({"format": 1, "state": {}, "seal": UNSEALED})
HEADERS: dict[str, dict[str, object]] = {
    "a terabyte": {"a": tensor([1 << 38], 0, 1 << 40)},
    "more than is there": {"a": tensor([9], 0, 36)},
    "less than is there": {"a": tensor([1], 0, 4)},
    "another size than its shape's": {"a": tensor([3], 0, 8)},
    "a shape beyond all numbers": {"a": tensor([1 << 62, 1 << 62], 0, 8)},
    "negative": {"a": tensor([-4, -2], 0, 8)},
    "one over another": {"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)},
    "objects": {"a": tensor([1], 0, 8, "O")},
    "code for a dtype": {"a": tensor([1], 0, 8, f"__import__('os').system('touch {EXECUTED}')")},
}


def write_checkpoint(path: Path, header: str, length: int | None = None) -> None:
    """A file in the format of safetensors with eight bytes of data, sealed."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header.encode() + b"\0" * 8)
    with path.open("r+b") as file:
        seal(file)


@pytest.mark.parametrize("header", HEADERS)
def test_checkpoints(tmp_path: Path, header: str) -> None:
    path = tmp_path / "epoch-00001.safetensors"
    write_checkpoint(path, json.dumps({"__metadata__": {"cxr-dist": DESCRIBED}} | HEADERS[header]))
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_arrays(path)


def test_a_header_of_exabytes_a_pickle_and_deep_json(tmp_path: Path) -> None:
    path = tmp_path / "epoch-00001.safetensors"
    whole = {"__metadata__": {"cxr-dist": DESCRIBED}, "a": tensor([2], 0, 8)}
    write_checkpoint(path, json.dumps(whole))
    assert load_arrays(path)[0]["a"].tolist() == [0, 0], "the tests' own files are whole"
    write_checkpoint(path, json.dumps(whole), length=1 << 60)
    refused(path)
    write_checkpoint(path, json.dumps(whole | {"__metadata__": {"cxr-dist": "[" * 100_000, "seal": UNSEALED}}))
    refused(path)
    path.write_bytes(pickle.dumps([Command(), UNSEALED]))
    with path.open("r+b") as file:
        seal(file)
    refused(path)


def refused(path: Path) -> None:
    for load in (load_arrays, load_state):
        with pytest.raises(UserError, match="damaged checkpoint"):
            load(path)


# Models


def test_a_model_with_code(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras would unmarshal a Lambda's bytecode; weights alone are taken, into a network of our own."""
    import keras

    use_small_base(monkeypatch)
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    inputs = keras.Input([2])
    hostile = keras.Model(inputs, keras.layers.Lambda(lambda x: (os.system(f"touch {EXECUTED}"), x)[1])(inputs))
    (tmp_path / EXECUTED).unlink(missing_ok=True)  # building it ran it
    hostile.save(run / run_folder.MODEL)
    seal_zip(run / run_folder.MODEL)
    with pytest.raises(UserError, match=r"model\.keras: cannot be loaded"):
        evaluate_run(EvaluationSpec(run, tmp_path / "evaluation"))


# Manifests


def elsewhere(manifest: Manifest, name: str) -> Manifest:
    first = manifest.shards[0].name
    rows = [replace(row, shard=name) if row.shard == first else row for row in manifest.rows]
    return replace(manifest, shards=(replace(manifest.shards[0], name=name), *manifest.shards[1:]), rows=rows)


def placed(manifest: Manifest, **place: int) -> Manifest:
    return replace(manifest, rows=[replace(row, **place) if row.shard else row for row in manifest.rows])


HOSTILE: dict[str, Callable[[Manifest], Manifest]] = {
    "a shard above": lambda manifest: elsewhere(manifest, f"../{manifest.shards[0].name}"),
    "a shard at a path": lambda manifest: elsewhere(manifest, "/etc/passwd"),
    "a record of exabytes": lambda manifest: placed(manifest, length=1 << 60),
    "a record before the shard": lambda manifest: placed(manifest, offset=-16),
    "a record behind the shard": lambda manifest: placed(manifest, offset=(1 << 63) - 1),
    "huge images": lambda manifest: replace(manifest, settings=replace(manifest.settings, image_size=1 << 40)),
    "no images": lambda manifest: replace(manifest, settings=replace(manifest.settings, image_size=0)),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_manifests(dataset: Path, tmp_path: Path, change: str) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "in" / "dataset"))
    manifest = read_manifest(copy)
    shutil.copy(copy / manifest.shards[0].name, tmp_path / "in")
    write_manifest(copy, HOSTILE[change](manifest))
    for use in (read_manifest, verify_dataset):
        with pytest.raises(UserError, match=r"manifest\.parquet: is damaged"):
            use(copy)


def test_metadata_that_is_no_manifest(dataset: Path, tmp_path: Path) -> None:
    table = pq.read_table(dataset / "manifest.parquet")
    for content in (b"[]", b"{}", b'{"format_version": 3}', b"[" * 100_000, b"\xff", b"null"):
        pq.write_table(table.replace_schema_metadata({b"cxr_dataset": content}), tmp_path / "manifest.parquet")
        with pytest.raises(UserError, match=r"manifest\.parquet"):
            read_manifest(tmp_path)
    pq.write_table(pa.table({}), tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match="is not the manifest"):
        read_manifest(tmp_path)


# YAML


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        f"seed: !!python/object/apply:os.system ['touch {EXECUTED}']",
        f"!!python/object/new:os.system ['touch {EXECUTED}']",
        "seed: !!python/name:os.system",
        "!!python/module:this",
        LAUGHS,
        "a: &a {b: *a}",
        "a: &a [*a]",
        "a: " + "[" * 5_000,
        "a: " + "{b: " * 5_000,
    ],
    ids=lambda text: text[:30],
)
def test_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path}: ") as raised:
        read_yaml(path)
    assert "\n" not in str(raised.value)
