"""The manifest: one row per source image, and what is said of the dataset as a whole.

`manifest.parquet` is written last and in one step, so a folder that has it has all the rest: it is the mark
of a complete dataset. What concerns the whole dataset is JSON under one key of the Parquet schema's
metadata. Shards are found by it, records by their byte offset: nothing is discovered by listing folders.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tfrecords_builder.collection.file_kinds import Note, NotTaken, Reason
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import write_atomically
from tfrecords_builder.common.seal import UNSEALED, check_seal, seal
from tfrecords_builder.format.manifest_rows import (
    EXCLUDED,
    REJECTED,
    Row,
    TableRows,
    extra_of,
    table_of,
    with_extra,
)
from tfrecords_builder.format.sharding import is_shard_name
from tfrecords_builder.splitting.near_duplicates import group_of
from tfrecords_builder.splitting.splits import SPLITS

MANIFEST_NAME = "manifest.parquet"
FORMAT_VERSION = 4
MAX_IMAGE_SIZE = 4096
"""Largest side of stored images in pixels."""

_METADATA_KEY = b"cxr_dataset"
_SEAL_KEY = b"cxr_seal"


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard as it was written."""

    name: str
    split: str
    records: int
    bytes: int
    sha256: str
    """Hexadecimal, of the whole file."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What determines a dataset's content, beside its source files."""

    image_size: int
    """Side of the stored images in pixels."""
    encoding: str
    """raw, png or jpeg."""
    seed: int
    split_rule: str
    """leak-free, published, `file:` and the SHA-256 of the file that says it, or `given:` and that of the split."""
    conflicts: str
    """Near-duplicates in several classes: exclude or keep."""
    masks: bool = False
    """Whether records hold lung masks."""
    metadata: str | None = None
    """SHA-256 of what the collection's sheets say of its images; None when there are none."""


@dataclass(frozen=True)
class SplitIndex:
    """Where the N records of a split lie, ordered by shard, then by place in the shard."""

    paths: list[str]
    """Source path of each record."""
    labels: npt.NDArray[np.int32]
    """[N]: position of the class in the dataset's class names."""
    groups: pa.ChunkedArray
    """[N] strings: of each record, the name of its group; see `Row.group`."""
    shard: npt.NDArray[np.int32]
    """[N]: position in `shard_names`."""
    offset: npt.NDArray[np.int64]
    """[N]: byte at which the record's frame begins."""
    length: npt.NDArray[np.int64]
    """[N]: bytes of the record's payload."""
    shard_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Manifest:
    """A dataset's manifest; see `read_manifest`."""

    class_names: tuple[str, ...]
    settings: Settings
    fingerprint: str
    """SHA-256 over everything that determines the content; see `compute_fingerprint`."""
    shards: tuple[ShardInfo, ...]
    rows: Sequence[Row]
    """In the order of their paths; a record's `index` key is a position here."""
    duplicates: tuple[tuple[int, int, float], ...] = ()
    """Pairs of rows that are near-duplicates, and how alike they are; see `near_duplicates.find_duplicates`."""
    created_with: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that decoded the images: information, not part of the fingerprint."""
    not_taken: tuple[NotTaken, ...] = ()
    """The files of the source folder that are neither an image nor a mask of the rows: information too."""
    notes: tuple[Note, ...] = ()
    """What else was said of the source folder."""
    extra: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    """Columns of the collection's tables that are kept as they are, by name: a value for each row."""
    image_notes: tuple[Note, ...] = ()
    """Likewise of the images, when they were read."""

    @property
    def image_size(self) -> int:
        """Side of the stored images in pixels."""
        return self.settings.image_size

    @property
    def encoding(self) -> str:
        """raw, png or jpeg."""
        return self.settings.encoding

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """Images by split, then by class, in canonical order, zeros included."""
        counts = {split: dict.fromkeys(self.class_names, 0) for split in SPLITS}
        for row in self.rows:
            if row.split is not None:
                counts[row.split][row.class_name] += 1
        return counts

    @property
    def rejected(self) -> list[tuple[str, str]]:
        """Path and reason of every image that was rejected."""
        return self._with_status(REJECTED)

    @property
    def excluded(self) -> list[tuple[str, str]]:
        """Path and reason of every whole image that was left out."""
        return self._with_status(EXCLUDED)

    @cached_property
    def near_duplicates(self) -> dict[str, list[Row]]:
        """The groups of images that are near-duplicates, whoever the patients are, by the path of their first."""
        root = group_of(len(self.rows), ((first, second) for first, second, _ in self.duplicates))
        return self._several(self.rows[position].path for position in root)

    @cached_property
    def patients(self) -> dict[str, list[Row]]:
        """The patients with more than one whole image."""
        return self._several(row.patient for row in self.rows)

    def _several(self, keys: Iterable[str | None]) -> dict[str, list[Row]]:
        """The whole images by their keys (one for each row), where more than one has the same."""
        groups: dict[str, list[Row]] = {}
        for key, row in zip(keys, self.rows, strict=True):
            if key is not None and row.status != REJECTED:
                groups.setdefault(key, []).append(row)
        return {key: rows for key, rows in groups.items() if len(rows) > 1}

    def _with_status(self, status: str) -> list[tuple[str, str]]:
        return [(row.path, row.reason or "") for row in self.rows if row.status == status]

    @property
    def table(self) -> pa.Table:
        """The rows as columns: without a `Row` for each, which takes two kilobytes."""
        return self.rows.table if isinstance(self.rows, TableRows) else table_of(self.rows)

    def of_paths(self, paths: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """These columns of the rows of the source paths `paths`, in that order; a null row for an unknown path."""
        table = self.table
        known = table["path"].combine_chunks()
        return table.select(list(columns)).take(pc.index_in(pa.array(paths, pa.string()), value_set=known))

    def split(self, name: str, without: Collection[str] = ()) -> SplitIndex:
        """The records of one split, but for those of the source paths `without`; `UserError` for an unknown split."""
        if name not in SPLITS:
            raise UserError(f"split: unknown split '{name}'; known: {', '.join(SPLITS)}")
        shard_names = tuple(sorted(shard.name for shard in self.shards if shard.split == name))
        number = {shard: position for position, shard in enumerate(shard_names)}
        table = self.table
        chosen = pc.equal(table["split"], name)
        if without:
            chosen = pc.and_(chosen, pc.invert(pc.is_in(table["path"], pa.array(sorted(without), pa.string()))))
        table = table.filter(chosen).combine_chunks()
        # A look-up for each shard, and not for each of its images.
        present = table["shard"].unique()
        numbers = np.array([number[shard] for shard in present.to_pylist()], np.int32)
        shard = numbers[pc.index_in(table["shard"], present).to_numpy()]
        order = np.lexsort((table["index"].to_numpy(), shard))
        columns = {key: table[key].to_numpy()[order] for key in ("label", "offset", "length")}
        return SplitIndex(
            paths=table["path"].take(order).to_pylist(),
            labels=columns["label"].astype(np.int32),
            groups=table["group"].take(order),
            shard=shard[order],
            offset=columns["offset"].astype(np.int64),
            length=columns["length"].astype(np.int64),
            shard_names=shard_names,
        )


def compute_fingerprint(
    settings: Settings, class_names: Sequence[str], sources: Iterable[tuple[str, str, str | None, str | None]]
) -> str:
    """Hexadecimal SHA-256 over what determines a dataset: format, settings, classes, and each source file.

    Args:
        settings: Image size, encoding, seed and split rule.
        class_names: In label order.
        sources: Path, class name, SHA-256 and the mask's SHA-256 of every source image, rejected ones too, in any
            order.
    """
    content = {
        "format_version": FORMAT_VERSION,
        **asdict(settings),
        "class_names": list(class_names),
        "sources": sorted([path, name, sha256 or "", mask or ""] for path, name, sha256, mask in sources),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(dataset: Path, manifest: Manifest) -> None:
    """Write `manifest.parquet` in one step: under another name, to the disk, then renamed."""
    metadata = {
        "format_version": FORMAT_VERSION,
        "class_names": list(manifest.class_names),
        **asdict(manifest.settings),
        "fingerprint": manifest.fingerprint,
        "shards": [asdict(shard) for shard in manifest.shards],
        "duplicates": manifest.duplicates,
        "created_with": manifest.created_with,
        "not_taken": [asdict(item) for item in manifest.not_taken],
        "notes": [asdict(note) for note in manifest.notes],
    }
    if manifest.image_notes:
        metadata["image_notes"] = [asdict(note) for note in manifest.image_notes]
    table = with_extra(table_of(manifest.rows), manifest.extra)
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata), _SEAL_KEY: UNSEALED})

    def write(file: IO[bytes]) -> None:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        seal(file)

    write_atomically(dataset / MANIFEST_NAME, write)


def read_manifest(dataset: Path) -> Manifest:
    """The manifest of a complete dataset.

    Raises:
        UserError: `dataset` is missing, is not a dataset or not a complete one, its manifest is damaged,
            or another version of the format wrote it.
    """
    path = dataset / MANIFEST_NAME
    if not dataset.is_dir():
        raise UserError(f"{dataset}: no such dataset folder; build one with cxr-dist build SOURCE {dataset}")
    if not path.is_file():
        raise UserError(
            f"{dataset}: holds no {MANIFEST_NAME}, so it is not a complete dataset; build one with cxr-dist build"
        )
    try:
        with path.open("rb") as file:
            table = pq.read_table(file, page_checksum_verification=True)
        raw = (table.schema.metadata or {}).get(_METADATA_KEY)
        if raw is None:
            raise UserError(f"{path}: is not the manifest of a dataset; give a folder that cxr-dist build made")
        metadata = json.loads(raw)
        version = metadata["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: has format version {version}, but version {FORMAT_VERSION} is needed; rebuild the dataset"
            )
        check_seal(path)  # now, as an older version wrote none: page checksums leave Parquet's own footer out
        return _from_table(table, metadata)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged; restore the file, or rebuild the dataset in another folder") from error


def check_shards(dataset: Path, manifest: Manifest) -> None:
    """Check that every shard is there with its exact size: what a copy that broke off gets wrong.

    Raises:
        UserError: Names the first shard that is missing or has another size.
    """
    for shard in manifest.shards:
        path = dataset / shard.name
        if not path.is_file():
            raise UserError(f"{path}: this shard is missing; restore it, or rebuild the dataset in another folder")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(
                f"{path}: has {size:,} bytes, but the manifest says {shard.bytes:,}; "
                "restore it, or rebuild the dataset in another folder"
            )


def _from_table(table: pa.Table, metadata: dict[str, Any]) -> Manifest:
    table, extra = extra_of(table)
    settings = Settings(**{f.name: metadata[f.name] for f in fields(Settings)})
    shards = tuple(ShardInfo(**shard) for shard in metadata["shards"])
    _check_places(table, settings, shards)
    return Manifest(
        class_names=tuple(metadata["class_names"]),
        settings=settings,
        fingerprint=metadata["fingerprint"],
        shards=shards,
        rows=TableRows(table),
        duplicates=tuple((int(i), int(j), float(score)) for i, j, score in metadata["duplicates"]),
        created_with=metadata["created_with"],
        not_taken=tuple(NotTaken(**{**item, "reason": Reason(item["reason"])}) for item in metadata["not_taken"]),
        notes=tuple(Note(**note) for note in metadata["notes"]),
        extra=extra,
        image_notes=tuple(Note(**note) for note in metadata.get("image_notes", ())),
    )


def _check_places(table: pa.Table, settings: Settings, shards: Sequence[ShardInfo]) -> None:
    """Nothing that is read by the manifest lies outside of the dataset, or is larger than what is there."""
    if not 1 <= settings.image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"images of {settings.image_size} pixels")
    if not all(is_shard_name(shard.name) for shard in shards):
        raise ValueError("a shard is named otherwise than shards are")
    size_of = {shard.name: shard.bytes for shard in shards}
    placed = table.select(["shard", "offset", "length"]).drop_null()
    names = pc.dictionary_encode(placed["shard"].combine_chunks())
    sizes = np.array([size_of[name] for name in names.dictionary.to_pylist()], np.int64)[names.indices.to_numpy()]
    offset, length = placed["offset"].to_numpy(), placed["length"].to_numpy()
    if not ((offset >= 0) & (length >= 0) & (offset <= sizes) & (length <= sizes - offset)).all():
        raise ValueError("a record lies outside of its shard")
