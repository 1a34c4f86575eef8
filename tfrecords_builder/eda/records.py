"""The images of a dataset with their rows: all in one pass, or some by their places."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tfrecords_builder.eda.shortcuts import Gray
from tfrecords_builder.format import record as schema, tfrecord
from tfrecords_builder.format.manifest import Manifest
from tfrecords_builder.format.manifest_rows import Row


def every_image(dataset: Path, manifest: Manifest) -> Iterator[tuple[Row, Gray]]:
    """Every record with its row, in the order of the shards: uint8 [S, S].

    Raises:
        CorruptRecordError: A record is damaged, or is not the one that the manifest has there.
    """
    for shard in manifest.shards:
        path = dataset / shard.name
        for number, (offset, payload) in enumerate(tfrecord.scan(path)):
            try:
                record = schema.decode_example(payload)
                gray = schema.decode_image(record.image, manifest.image_size, manifest.encoding)
                row = manifest.rows[record.index] if 0 <= record.index < len(manifest.rows) else None
                if row is None or (row.path, row.shard, row.index) != (record.path, shard.name, number):
                    raise ValueError(f"it holds '{record.path}', which the manifest has elsewhere")
            except ValueError as error:
                raise tfrecord.CorruptRecordError(path, number, offset, str(error)) from error
            yield row, gray


def some_images(dataset: Path, manifest: Manifest, rows: Iterable[Row]) -> Iterator[tuple[Row, Gray]]:
    """The records of `rows`, each of which has one, read by their places; as `every_image` gives them."""
    for row in rows:
        if row.shard is None or row.offset is None or row.length is None:
            raise ValueError(f"{row.path}: has no record")
        with (dataset / row.shard).open("rb") as file:
            payload = tfrecord.read_at(file.fileno(), row.offset, row.length)
        yield row, schema.decode_image(schema.decode_example(payload).image, manifest.image_size, manifest.encoding)
