"""Which images a run has seen: the digests of its training and validation files, kept in its folder.

An image file is known by the first 8 bytes of its SHA-256, so two different files are taken for one with a probability
of about 1e-11 for the largest collections here. Only identical files are found: an image that was encoded or resized
again has other bytes.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from tfrecords_builder.common.errors import reading
from tfrecords_builder.common.files import write_json
from tfrecords_builder.format.manifest import Manifest

SEEN = "seen.json"
Digests: TypeAlias = npt.NDArray[np.uint64]
"""[N]: the first 8 bytes of each file's SHA-256, big-endian."""


def digests_of(sha256: Iterable[str]) -> Digests:
    """From hexadecimal SHA-256."""
    return np.array([int(text[:16], 16) for text in sha256], np.uint64)


@dataclass(frozen=True, eq=False)
class SeenImages:
    """The files that a run was trained on, and those that chose its best epoch."""

    training: Digests
    validation: Digests
    settings: dict[str, Any]
    """Of the dataset: `manifest.Settings` as a mapping."""

    def mark(self, digests: Digests) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """bool [N] each: which of these files are training images, and which of the others validation images."""
        training = np.isin(digests, self.training)
        return training, np.isin(digests, self.validation) & ~training


def write_seen(run: Path, manifest: Manifest) -> None:
    """Write the digests of what a run on this dataset sees, 11 bytes an image."""
    table = manifest.table
    content: dict[str, Any] = {"settings": asdict(manifest.settings)}
    for name, split in (("training", "train"), ("validation", "validation")):
        files = table.filter(pc.equal(table["split"], split))["sha256"]
        data = np.sort(digests_of(files.to_pylist())).astype(">u8").tobytes()
        content[name] = base64.b64encode(data).decode()
    write_json(run / SEEN, content | {"sha256": _checksum(content)})


def read_seen(run: Path) -> SeenImages | None:
    """What `write_seen` wrote; None where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = run / SEEN
    if not path.exists():
        return None
    with reading(path, "restore the file, or train the run again"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("sha256") != _checksum(content):
            raise ValueError("its checksum does not match")
        training, validation = (
            np.frombuffer(base64.b64decode(content[name], validate=True), ">u8").astype(np.uint64)
            for name in ("training", "validation")
        )
        return SeenImages(training, validation, dict(content["settings"]))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
