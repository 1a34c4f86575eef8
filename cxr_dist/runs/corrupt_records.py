"""Damaged records that a run leaves out, by choice: found before it begins, counted, the same on all workers.

Which records those are is part of what the run computes, as an order of other images is another order. So they are
looked for once, by the process that prepares the run, and written into its folder; whoever trains reads them there.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cxr_dist.runs.run_folder import DAMAGED
from tfrecords_builder.common.errors import UserError, reading
from tfrecords_builder.common.files import write_json
from tfrecords_builder.format import tfrecord
from tfrecords_builder.format.manifest import Manifest

SPLITS = ("train", "validation")
"""What a run reads. An evaluation leaves nothing out."""


@dataclass(frozen=True)
class CorruptRecord:
    """A record that is not what was written."""

    path: str
    """Of the source image, as the manifest has it."""
    shard: str
    record: int
    """Its number in the shard, counted from 0."""
    offset: int
    """Byte at which its frame begins."""
    reason: str


@dataclass(frozen=True)
class ExcludedRecords:
    """The records that a run does without."""

    records: tuple[CorruptRecord, ...] = ()

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(record.path for record in self.records)

    def fingerprint(self, of_dataset: str) -> str:
        """What names the content that is left: the dataset's own fingerprint where nothing is left out."""
        if not self.records:
            return of_dataset
        return hashlib.sha256(json.dumps([of_dataset, sorted(self.paths)]).encode()).hexdigest()


def find_corrupt(dataset: Path, manifest: Manifest) -> Iterator[CorruptRecord]:
    """Read every record that a run reads, and yield those whose checksums or lengths do not match."""
    for split in SPLITS:
        index = manifest.split(split)
        for number, name in enumerate(index.shard_names):
            descriptor = os.open(dataset / name, os.O_RDONLY)
            try:
                for record, position in enumerate((index.shard == number).nonzero()[0]):
                    place = int(index.offset[position]), int(index.length[position])
                    try:
                        tfrecord.read_at(descriptor, *place, dataset / name)
                    except tfrecord.CorruptRecordError as error:
                        yield CorruptRecord(index.paths[position], name, record, error.offset, error.reason)
            finally:
                os.close(descriptor)


def exclude_corrupt(run: Path, dataset: Path, manifest: Manifest, most: int) -> ExcludedRecords:
    """Decide what the run leaves out, and write it into its folder; what was decided before stands.

    Args:
        run: The run's folder, held by this process.
        most: Records that may be left out; with 0 nothing is looked for, and the first that is read ends the run.

    Raises:
        UserError: more are damaged, or others than when the run began.
    """
    if not most:
        return ExcludedRecords()
    corrupt = ExcludedRecords(tuple(find_corrupt(dataset, manifest)))
    path = run / DAMAGED
    if not path.exists():
        if len(corrupt.records) > most:
            first = corrupt.records[0]
            raise UserError(
                f"input.max_corrupt_records {most}: {len(corrupt.records)} records are damaged, the first is record "
                f"{first.record} at byte {first.offset} of {dataset / first.shard}; restore the dataset, rebuild "
                "it, or allow more"
            )
        write_json(path, [asdict(record) for record in corrupt.records])
        return corrupt
    excluded = load_excluded(run)
    others = sorted(corrupt.paths - excluded.paths)
    if others:
        raise UserError(
            f"{dataset}: {others[0]} has been damaged since the run began, and a run cannot change its images; "
            "restore the dataset, or start again with another --out"
        )
    return excluded


def load_excluded(run: Path) -> ExcludedRecords:
    """What was decided for the run in this folder."""
    path = run / DAMAGED
    if not path.exists():
        return ExcludedRecords()
    with reading(path, "start again with another --out"):
        records = json.loads(path.read_text(encoding="utf-8"))
        return ExcludedRecords(tuple(CorruptRecord(**record) for record in records))
