"""Read a dataset back in full and compare it with its manifest."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format import record as schema, tfrecord
from tfrecords_builder.format.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    check_shards,
    compute_fingerprint,
    read_manifest,
)
from tfrecords_builder.format.manifest_rows import ACCEPTED, Row
from tfrecords_builder.format.sharding import is_shard_name
from tfrecords_builder.format.tfds_files import tfds_files

PlacedRows = dict[str, list[tuple[int, Row]]]


@dataclass(frozen=True, slots=True)
class VerifySummary:
    """What was found whole."""

    records: int
    shards: int
    bytes: int
    counts: dict[str, dict[str, int]]
    """Images by split, then by class."""
    rejected: int
    """Source files that the build skipped."""
    fingerprint: str


def verify_dataset(dataset: Path, progress: Callable[[int, int], None] | None = None) -> VerifySummary:
    """Check the manifest against itself, then every byte of every shard against the manifest.

    `progress` is called with (records checked, records in all).

    Raises:
        UserError: The first thing found wrong, with the shard and the record.
    """
    manifest = read_manifest(dataset)
    rows_of = _rows_by_shard(manifest)
    _check_manifest(dataset, manifest, rows_of)
    check_shards(dataset, manifest)
    known = {shard.name for shard in manifest.shards}
    for path in sorted(dataset.iterdir()):
        if is_shard_name(path.name) and path.name not in known:
            raise UserError(f"{path}: this shard is not in the manifest; remove it, or rebuild the dataset")
    total = sum(shard.records for shard in manifest.shards)
    done = 0
    for shard in manifest.shards:
        _check_shard(dataset / shard.name, manifest, shard, rows_of[shard.name])
        done += shard.records
        if progress is not None:
            progress(done, total)
    # Last, as they say of the shards only what the manifest does.
    for name, content in tfds_files(manifest).items():
        path = dataset / name
        if not path.is_file() or path.read_bytes() != content:
            raise UserError(f"{path}: is missing or was changed; rebuild the dataset in another folder")
    return VerifySummary(
        records=done,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        counts=manifest.counts,
        rejected=len(manifest.rejected),
        fingerprint=manifest.fingerprint,
    )


def _check_manifest(dataset: Path, manifest: Manifest, rows_of: PlacedRows) -> None:
    """What the manifest says of the whole agrees with its rows."""
    sources = [(row.path, row.class_name, row.sha256, row.mask_sha256) for row in manifest.rows]
    _require(
        compute_fingerprint(manifest.settings, manifest.class_names, sources) == manifest.fingerprint,
        dataset,
        "its fingerprint does not match its rows",
    )
    for row in manifest.rows:
        known = 0 <= row.label < len(manifest.class_names) and manifest.class_names[row.label] == row.class_name
        _require(known, dataset, f"the label of '{row.path}' is not that of its class")
        placed = [row.split, row.shard, row.index, row.offset, row.length]
        whole = all(value is not None for value in placed)
        empty = all(value is None for value in placed)
        _require(whole if row.status == ACCEPTED else empty, dataset, f"the row of '{row.path}' contradicts its status")
    if manifest.settings.split_rule == "leak-free":
        split_of: dict[str, str | None] = {}
        for row in manifest.rows:
            if row.status == ACCEPTED:
                together = split_of.setdefault(row.group, row.split) == row.split
                _require(together, dataset, f"the group of '{row.group}' is in two splits")
    for shard in manifest.shards:
        rows = rows_of[shard.name]
        _require(len(rows) == shard.records, dataset, f"the number of records of {shard.name} is not that of its rows")
    accepted = sum(row.status == ACCEPTED for row in manifest.rows)
    _require(
        accepted == sum(shard.records for shard in manifest.shards), dataset, "records are missing from the shards"
    )


def _check_shard(path: Path, manifest: Manifest, shard: ShardInfo, rows: list[tuple[int, Row]]) -> None:
    number = -1
    for number, (offset, payload) in enumerate(tfrecord.scan(path)):
        try:
            record = schema.decode_example(payload)
            schema.decode_image(record.image, manifest.image_size, manifest.encoding)
            if (record.mask is not None) != manifest.settings.masks:
                raise ValueError(f"it has {'a' if record.mask is not None else 'no'} mask, unlike the manifest")
            if record.mask is not None:
                schema.decode_mask(record.mask, manifest.image_size)
            if number >= len(rows):
                raise ValueError(f"the manifest has {len(rows)} records in this shard")
            row_number, row = rows[number]
            found = (record.path, record.label, record.index, number, offset, len(payload), shard.split)
            expected = (row.path, row.label, row_number, row.index, row.offset, row.length, row.split)
            if found != expected:
                raise ValueError(f"it holds {found} where the manifest says {expected}")
        except ValueError as error:
            raise tfrecord.CorruptRecordError(path, number, offset, str(error)) from error
    if number + 1 != len(rows):
        raise UserError(f"{path}: holds {number + 1} records, but the manifest lists {len(rows)}; rebuild the dataset")
    # After the records, which say more about where; this is what no rewritten checksum can fool.
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise UserError(f"{path}: is not the file that was built (SHA-256 differs); restore it, or rebuild the dataset")


def _rows_by_shard(manifest: Manifest) -> PlacedRows:
    """Each shard's rows, with their numbers, by their place in the shard."""
    placed: PlacedRows = defaultdict(list)
    for number, row in enumerate(manifest.rows):
        if row.shard is not None:
            placed[row.shard].append((number, row))
    for rows in placed.values():
        rows.sort(key=lambda item: item[1].index or 0)
    return placed


def _require(holds: bool, dataset: Path, problem: str) -> None:
    if not holds:
        raise UserError(f"{dataset / MANIFEST_NAME}: {problem}; restore the file, or rebuild the dataset")
