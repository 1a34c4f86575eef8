"""Files in a folder of an object storage (S3, GCS), through `pyarrow.fs`: sent, read back and tried again."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs

from tfrecords_builder.common.errors import UserError, one_line

PAUSES_S = (0.3, 1.0, 3.0)
"""Between attempts at what a storage failed to do."""

P = ParamSpec("P")
R = TypeVar("R")

_CHUNK_BYTES = 4 * 1024 * 1024


class StorageError(UserError):
    """A storage or the network did not do what was asked; it may the next time."""


def patiently(move: Callable[P, R]) -> Callable[P, R]:
    """`move`, done again after a pause when the storage fails: one of many machines does now and then.

    Arrow tries a request of S3 again by itself, but not one that breaks off in the middle.
    """

    @functools.wraps(move)
    def again(*args: P.args, **kwargs: P.kwargs) -> R:
        for pause in PAUSES_S:
            try:
                return move(*args, **kwargs)
            except StorageError:
                time.sleep(pause)
        return move(*args, **kwargs)

    return again


class StorageFolder:
    """A folder on a storage, and one-line errors for what goes wrong there."""

    def __init__(self, scheme: str, filesystem: pyarrow.fs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path.rstrip("/")
        self.name = f"{scheme}://{self._path}"
        """For messages: without options."""

    @classmethod
    def open(cls, url: str) -> "StorageFolder":
        try:
            if urlsplit(url).password is not None:
                raise UserError(
                    f"{urlsplit(url).scheme}://: addresses are recorded in runs and reports, so leave credentials out; "
                    "give them in the cloud's own variables or files"
                )
            filesystem, path = pyarrow.fs.FileSystem.from_uri(url)
            if not path.strip("/"):
                raise ValueError("the folder is missing")
            return cls(url.partition("://")[0], filesystem, path)
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{url}: is not the address of an object storage ({one_line(error)}); give s3://... or gs://..."
            ) from error

    @contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Turn what the storage or the network does into an error that says where."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise StorageError(
                f"{self.name}/{name}: the storage cannot be used ({one_line(error)}); check the address, the "
                "credentials and the network, and start the same command again"
            ) from error

    @patiently
    def read(self, name: str) -> bytes | None:
        """A small file; None when there is none."""
        with self.explained(name):
            if self._size(name) is None:
                return None
            with self._filesystem.open_input_stream(f"{self._path}/{name}") as file:
                return bytes(file.read())

    @patiently
    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        return self._size(name)

    def _size(self, name: str) -> int | None:
        with self.explained(name):
            info = self._filesystem.get_file_info(f"{self._path}/{name}")
        return info.size if info.type == pyarrow.fs.FileType.File else None

    @patiently
    def names(self) -> list[str]:
        """Of what the folder holds."""
        with self.explained(""):
            selector = pyarrow.fs.FileSelector(self._path, allow_not_found=True)
            return sorted(info.base_name for info in self._filesystem.get_file_info(selector))

    @patiently
    def remove(self, name: str) -> None:
        with self.explained(name):
            self._filesystem.delete_file(f"{self._path}/{name}")

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's content, piece by piece."""
        with self.explained(name), self._filesystem.open_input_stream(f"{self._path}/{name}") as source:
            while chunk := source.read(_CHUNK_BYTES):
                yield chunk

    @patiently
    def digest(self, name: str) -> str:
        """SHA-256 of what the storage holds."""
        return self._digest(name)

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    @patiently
    def upload(self, path: Path) -> None:
        """Copy a local file, and read it back.

        Raises:
            UserError: It cannot be written, or what is read back is something else.
        """
        digest = hashlib.sha256()
        with self.explained(path.name):
            if self._filesystem.type_name == "local":
                self._filesystem.create_dir(self._path)
            with (
                path.open("rb") as source,
                self._filesystem.open_output_stream(f"{self._path}/{path.name}") as target,
            ):
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
        if self._digest(path.name) != digest.hexdigest():
            raise UserError(f"{self.name}/{path.name}: the stored file differs from the one that was sent; try again")
