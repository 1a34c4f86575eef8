"""The record: sole owner of its keys, its encodings, and how to write and read it.

A record is a serialised `tensorflow.Example` with the keys below. TensorFlow Datasets can read it:
`label` as ClassLabel, `path` as Text, `index` as an int64 scalar, and `image` as
`Tensor(shape=(S, S, 1), dtype=uint8, encoding=BYTES)` when raw, as `Image(shape=(S, S, 1))` when png or jpeg, and
`mask` as `Image(shape=(S, S, 1))`.

Nothing here imports TensorFlow but `parse_batch`, inside: the builder's processes start without it.
"""

import functools
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from PIL import Image

if TYPE_CHECKING:
    import tensorflow as tf

IMAGE = "image"
"""bytes: the gray image in the dataset's encoding."""
LABEL = "label"
"""int64: position of the class in the dataset's class names."""
PATH = "path"
"""bytes: UTF-8 path of the source file, relative to the source folder."""
INDEX = "index"
"""int64: position of the image's row in the manifest."""
MASK = "mask"
"""bytes, in datasets with lung masks: PNG of 0 and 255. Of an image that has no mask, all is 0."""

ENCODINGS = ("raw", "png", "jpeg")
"""raw: uint8 row by row, S x S bytes. png: lossless, smaller, slower to read. jpeg: quality 95, lossy."""
JPEG_QUALITY = 95
# On X-rays of 224 pixels level 4 makes files as small as zlib's default, 6, in less than half the time.
PNG_COMPRESS_LEVEL = 4


@dataclass(frozen=True, slots=True)
class Record:
    """A parsed record; `image` is still encoded."""

    image: bytes
    label: int
    path: str
    index: int
    mask: bytes | None = None
    """None in a dataset without masks."""


def encode_image(gray: npt.NDArray[np.uint8], encoding: str) -> bytes:
    """Bytes of a gray uint8 [S, S] image in one of `ENCODINGS`."""
    if gray.dtype != np.uint8 or gray.ndim != 2:
        raise ValueError(f"expected uint8 [S, S], not {gray.dtype} {list(gray.shape)}")
    if encoding == "raw":
        return gray.tobytes()
    buffer = io.BytesIO()
    if encoding == "png":
        Image.fromarray(gray).save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL)
    elif encoding == "jpeg":
        Image.fromarray(gray).save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        raise ValueError(f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    return buffer.getvalue()


def decode_image(image: bytes, image_size: int, encoding: str) -> npt.NDArray[np.uint8]:
    """The inverse of `encode_image` (but for JPEG's loss): uint8 [image_size, image_size].

    Raises:
        ValueError: The bytes are not an image of that size in that encoding.
    """
    if encoding == "raw":
        if len(image) != image_size * image_size:
            raise ValueError(f"{len(image)} bytes where {image_size} x {image_size} pixels were expected")
        return np.frombuffer(image, np.uint8).reshape(image_size, image_size)
    try:
        decoded = Image.open(io.BytesIO(image), formats=[encoding.upper()])
        decoded.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a whole {encoding} image") from error
    if decoded.mode != "L" or decoded.size != (image_size, image_size):
        raise ValueError(f"{decoded.mode} {decoded.size} where gray {image_size} x {image_size} was expected")
    return np.asarray(decoded)


def encode_mask(inside: npt.NDArray[np.bool_]) -> bytes:
    """Bytes of a mask, bool [S, S]: some hundred, whatever the dataset's encoding of images."""
    return encode_image(np.where(inside, np.uint8(255), np.uint8(0)), "png")


def decode_mask(mask: bytes, image_size: int) -> npt.NDArray[np.bool_]:
    """The inverse of `encode_mask`; `ValueError` when the bytes are no mask of that size."""
    pixels = decode_image(mask, image_size, "png")
    if not np.isin(pixels, (0, 255)).all():
        raise ValueError("a mask of more than two levels")
    return pixels > 0


def encode_example(*, image: bytes, label: int, path: str, index: int, mask: bytes | None = None) -> bytes:
    """Serialise a record. The same input gives the same bytes in every process (map keys are sorted)."""
    example = _Example()
    feature = example.features.feature
    feature[IMAGE].bytes_list.value.append(image)
    feature[LABEL].int64_list.value.append(label)
    feature[PATH].bytes_list.value.append(path.encode())
    feature[INDEX].int64_list.value.append(index)
    if mask is not None:
        feature[MASK].bytes_list.value.append(mask)
    return example.SerializeToString(deterministic=True)


def decode_example(serialized: bytes) -> Record:
    """Parse a record without TensorFlow.

    Raises:
        ValueError: The bytes are not an Example with exactly these keys (with or without a mask), one value each.
    """
    try:
        feature = _Example.FromString(serialized).features.feature
    except DecodeError as error:
        raise ValueError("not a tensorflow.Example") from error
    keys = sorted(feature)
    if keys not in (sorted((IMAGE, LABEL, PATH, INDEX)), sorted((IMAGE, LABEL, PATH, INDEX, MASK))):
        raise ValueError(f"has the keys {keys}")

    def one(key: str, kind: str) -> Any:
        values = getattr(feature[key], kind).value
        if len(values) != 1:
            raise ValueError(f"has {len(values)} values of {key}")
        return values[0]

    return Record(
        image=one(IMAGE, "bytes_list"),
        label=one(LABEL, "int64_list"),
        path=one(PATH, "bytes_list").decode(),
        index=one(INDEX, "int64_list"),
        mask=one(MASK, "bytes_list") if MASK in keys else None,
    )


def raw_pixels(serialized: bytes, image_size: int) -> npt.NDArray[np.uint8]:
    """The image of a record of a raw dataset, without parsing the rest: uint8 [S, S, 1], a view of the record.

    The image is the record's first value, as the keys of a map are written in their order (`encode_example`). Before it
    lie the tags and lengths of the messages around it, which are the same for all images of one size but for the
    outermost, which counts the rest of the record.

    Raises:
        ValueError: The record does not begin so.
    """
    count, head = image_size * image_size, _before_raw_pixels(image_size)
    at = serialized[: len(head) + _MOST_VARINT_BYTES + 1].find(head)
    if at < 0 or at + len(head) + count > len(serialized):
        raise ValueError(f"does not begin with an image of {image_size} x {image_size} raw pixels")
    pixels = np.frombuffer(serialized, np.uint8, count, offset=at + len(head))
    return pixels.reshape(image_size, image_size, 1)


@functools.cache
def _before_raw_pixels(image_size: int) -> bytes:
    count = image_size * image_size
    value = _LENGTH_DELIMITED + _varint(count)
    feature = _LENGTH_DELIMITED + _varint(len(value) + count)
    key = _LENGTH_DELIMITED + _varint(len(IMAGE)) + IMAGE.encode()
    before = b"\x12" + _varint(len(feature) + len(value) + count) + feature + value
    return _LENGTH_DELIMITED + _varint(len(key) + len(before) + count) + key + before


_LENGTH_DELIMITED = b"\x0a"
"""The tag of field 1, of bytes or of a message (https://protobuf.dev/programming-guides/encoding)."""
_MOST_VARINT_BYTES = 10


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def parse_batch(serialized: "tf.Tensor", image_size: int, encoding: str) -> "dict[str, tf.Tensor]":
    """Parse a whole batch inside a TensorFlow graph.

    Args:
        serialized: string [B]: records.
        image_size: Side S of the stored images in pixels.
        encoding: The dataset's, one of `ENCODINGS`.

    Returns:
        `image`: uint8 [B, S, S, 1]; `label`: int32 [B]; `index`: int64 [B]. S is static, and so is B
        when `serialized` has it. Batches, not single records, are parsed: per-record calls cost more
        than the parsing when the images are raw.
    """
    import tensorflow as tf

    if encoding not in ENCODINGS:
        raise ValueError(f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    features = tf.io.parse_example(
        serialized,
        {
            IMAGE: tf.io.FixedLenFeature([], tf.string),
            LABEL: tf.io.FixedLenFeature([], tf.int64),
            INDEX: tf.io.FixedLenFeature([], tf.int64),
        },
    )
    shape = (image_size, image_size, 1)
    if encoding == "raw":
        image = tf.reshape(tf.io.decode_raw(features[IMAGE], tf.uint8), (-1, *shape))
    else:

        def decode(encoded: "tf.Tensor") -> "tf.Tensor":
            if encoding == "png":
                decoded = tf.io.decode_png(encoded, channels=1)
            else:
                # The accurate transform is the one that Pillow uses: both readers see equal pixels.
                decoded = tf.io.decode_jpeg(encoded, channels=1, dct_method="INTEGER_ACCURATE")
            return tf.ensure_shape(decoded, shape)

        image = tf.map_fn(decode, features[IMAGE], fn_output_signature=tf.TensorSpec(shape, tf.uint8))
    image = tf.ensure_shape(image, (serialized.shape[0], *shape))
    return {IMAGE: image, LABEL: tf.cast(features[LABEL], tf.int32), INDEX: features[INDEX]}


def _example_class() -> Any:
    """The message class of `tensorflow.Example`, from a private descriptor pool.

    The default pool would reject TensorFlow's own definition if that is imported later. Source of the field
    numbers: tensorflow/core/example/{example,feature}.proto.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def add(
        message: Any, name: str, number: int, kind: Any, *, label: Any = field.LABEL_OPTIONAL, **named: Any
    ) -> None:
        """A field of `message`; `kind` is a type of protobuf, or the name of a message."""
        how = (
            {"type": field.TYPE_MESSAGE, "type_name": f".tensorflow.{kind}"}
            if isinstance(kind, str)
            else {"type": kind}
        )
        message.field.add(name=name, number=number, label=label, **how, **named)

    feature = descriptor_pb2.DescriptorProto(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(
        (("Bytes", field.TYPE_BYTES), ("Float", field.TYPE_FLOAT), ("Int64", field.TYPE_INT64)), start=1
    ):
        add(file.message_type.add(name=f"{name}List"), "value", 1, kind, label=field.LABEL_REPEATED)
        add(feature, f"{name.lower()}_list", number, f"{name}List", oneof_index=0)
    file.message_type.append(feature)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    add(features, "feature", 1, "Features.FeatureEntry", label=field.LABEL_REPEATED)
    add(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


_Example = _example_class()
