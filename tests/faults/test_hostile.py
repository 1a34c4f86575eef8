"""What somebody else sent: nothing in it is executed, nothing is written or read elsewhere, and no memory is taken.

All of it is sealed, as whoever means harm can compute a checksum.
"""

import io
import json
import os
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_dist.config.loading import read_yaml
from cxr_dist.evaluation.evaluate import evaluate_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.runs import run_folder
from cxr_dist.runs.checkpoints import load_arrays, load_state, save_arrays, seal_archive
from tests.conftest import use_small_base
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import Manifest, read_manifest, write_manifest
from tfrecords_builder.verify import verify_dataset

EXECUTED = "an-attacker-was-here"


@pytest.fixture(autouse=True)
def nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No command of the hostile content was executed, and it got no gigabytes."""
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


def npy(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def objects() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Command()], object), allow_pickle=True)
    return buffer.getvalue()


MEMBERS = {
    "object array": objects(),
    "a terabyte": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (274877906944,), }\n"),
    "more than is there": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9,), }\n", b"\0" * 8),
    "less than is there": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n", b"\0" * 8),
    "negative": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -2), }\n", b"\0" * 32),
    "code for a header": npy(f"__import__('os').system('touch {EXECUTED}')\n"),
    "nested structure": npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }\n", b"\0" * 8),
    "no array": b"#!/bin/sh\n",
}


@pytest.mark.parametrize("member", MEMBERS)
def test_checkpoints(tmp_path: Path, member: str) -> None:
    path = tmp_path / "epoch-00001.npz"
    save_arrays(path, {}, {})
    described = json.dumps({"arrays": ["a"], "state": {}}).encode()
    with zipfile.ZipFile(path, "w") as archive, io.BytesIO() as state:
        np.lib.format.write_array(state, np.frombuffer(described, np.uint8))
        archive.writestr("state.json.npy", state.getvalue())
        archive.writestr("a.npy", MEMBERS[member])
    with path.open("r+b") as file:
        seal_archive(file)
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_arrays(path)


def test_a_zip_bomb_and_deep_json(tmp_path: Path) -> None:
    path = tmp_path / "epoch-00001.npz"
    for compression, content in ((zipfile.ZIP_DEFLATED, b"\0" * (1 << 26)), (zipfile.ZIP_STORED, b"[" * 100_000)):
        with zipfile.ZipFile(path, "w", compression) as archive, io.BytesIO() as state:
            np.lib.format.write_array(state, np.frombuffer(content, np.uint8))
            archive.writestr("state.json.npy", state.getvalue())
        with path.open("r+b") as file:
            seal_archive(file)
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
    with (run / run_folder.MODEL).open("r+b") as file:
        seal_archive(file)
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
