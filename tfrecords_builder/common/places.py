"""Where a dataset is: a local folder, or an address on object storage. Imports nothing that is slow to import."""

from pathlib import Path

Place = str | Path


def parse_place(text: str) -> Place:
    """An address as it stands, anything else as a path."""
    return text if "://" in text else Path(text)


def absolute(place: Place) -> str:
    """What names the place from any working folder."""
    return place if isinstance(place, str) else str(place.resolve())
