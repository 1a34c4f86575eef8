import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, strategies as st

from tfrecords_builder.format.record import (
    ENCODINGS,
    Record,
    decode_example,
    decode_image,
    encode_example,
    encode_image,
    parse_batch,
    raw_pixels,
)

SIZE = 16
IMAGES = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE), dtype=np.uint8)


@given(st.binary(max_size=50), st.integers(-(2**63), 2**63 - 1), st.text(st.characters(exclude_categories=["Cs"])))
def test_tensorflow_agrees(image: bytes, number: int, path: str) -> None:
    data = encode_example(image=image, label=number, path=path, index=number // 2)
    feature = tf.train.Example.FromString(data).features.feature
    assert sorted(feature) == ["image", "index", "label", "path"]
    assert list(feature["image"].bytes_list.value) == [image]
    assert list(feature["label"].int64_list.value) == [number]
    assert list(feature["path"].bytes_list.value) == [path.encode()]
    assert list(feature["index"].int64_list.value) == [number // 2]
    assert decode_example(data) == Record(image, number, path, number // 2)


def test_same_bytes_in_every_process() -> None:
    code = (
        "from tfrecords_builder.format.record import encode_example; import sys;"
        "sys.stdout.write(encode_example(image=b'i', label=1, path='p', index=2).hex());"
        "assert 'tensorflow' not in sys.modules"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {encode_example(image=b"i", label=1, path="p", index=2).hex()}


def example(**features: list[int]) -> bytes:
    made = {key: tf.train.Feature(int64_list=tf.train.Int64List(value=v)) for key, v in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=made)).SerializeToString()


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff", b"", example(label=[1]), example(image=[1], label=[1], path=[1], index=[1])],
    ids=["garbage", "empty", "keys missing", "wrong type"],
)
def test_other_records_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"Example|keys|values"):
        decode_example(data)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_parse_batch_gives_what_was_stored(encoding: str) -> None:
    stored = [encode_image(image, encoding) for image in IMAGES]
    records = [encode_example(image=image, label=i % 4, path=f"{i}", index=2**40 + i) for i, image in enumerate(stored)]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def parse(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        parsed = parse_batch(serialized, SIZE, encoding)
        assert parsed["image"].shape.as_list() == [None, SIZE, SIZE, 1]
        return parsed

    for count in (5, 1, 0):
        parsed = parse(tf.constant(records[:count], tf.string))
        assert {key: value.dtype for key, value in parsed.items()} == {
            "image": tf.uint8,
            "label": tf.int32,
            "index": tf.int64,
        }
        assert parsed["image"].shape == (count, SIZE, SIZE, 1)
        assert parsed["label"].numpy().tolist() == [i % 4 for i in range(count)]
        assert parsed["index"].numpy().tolist() == [2**40 + i for i in range(count)]
        for read, image, data in zip(parsed["image"].numpy()[..., 0], IMAGES, stored, strict=False):
            # JPEG loses something once; after that, both readers see the same pixels.
            np.testing.assert_array_equal(read, decode_image(data, SIZE, encoding))
            if encoding != "jpeg":
                np.testing.assert_array_equal(read, image)


@pytest.mark.parametrize("size", [1, 2, 10, 11, 12, 32, 90, 91, 127, 128, 129, 224, 299])
@pytest.mark.parametrize("mask", [None, b"", bytes(200)])
def test_raw_pixels_are_found_without_parsing(size: int, mask: bytes | None) -> None:
    """At every size around which a length takes another byte."""
    pixels = np.random.default_rng(size).integers(0, 256, (size, size), dtype=np.uint8)
    for path in ("", "x", "a long path " * 30):
        record = encode_example(image=encode_image(pixels, "raw"), label=3, path=path, index=2**40, mask=mask)
        found = raw_pixels(record, size)
        assert found.shape == (size, size, 1)
        np.testing.assert_array_equal(found[..., 0], pixels)
        with pytest.raises(ValueError, match="raw pixels"):
            raw_pixels(record, size + 1)


@pytest.mark.parametrize("record", [b"", b"\x0a", bytes(100), encode_example(image=b"", label=1, path="", index=0)])
def test_raw_pixels_of_something_else(record: bytes) -> None:
    with pytest.raises(ValueError, match="raw pixels"):
        raw_pixels(record, 10)


def test_static_batch_is_kept() -> None:
    record = encode_example(image=encode_image(IMAGES[0], "png"), label=0, path="", index=0)
    dataset = tf.data.Dataset.from_tensors([record] * 3).map(lambda s: parse_batch(s, SIZE, "png"))
    assert dataset.element_spec["image"] == tf.TensorSpec([3, SIZE, SIZE, 1], tf.uint8)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_image_of_another_size_is_refused(encoding: str) -> None:
    data = encode_image(IMAGES[0], encoding)
    with pytest.raises(ValueError, match="expected"):
        decode_image(data, SIZE + 1, encoding)
    record = encode_example(image=data, label=0, path="", index=0)
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        parse_batch(tf.constant([record]), SIZE + 1, encoding)


def test_jpeg_is_close() -> None:
    smooth = np.add.outer(np.arange(SIZE) * 7, np.arange(SIZE) * 7).astype(np.uint8)
    decoded = decode_image(encode_image(smooth, "jpeg"), SIZE, "jpeg")
    np.testing.assert_allclose(decoded.astype(int), smooth, atol=4)


def test_unknown_encoding_and_wrong_array() -> None:
    with pytest.raises(ValueError, match="unknown encoding 'gif'"):
        encode_image(IMAGES[0], "gif")
    with pytest.raises(ValueError, match="unknown encoding 'gif'"):
        parse_batch(tf.constant([b""]), SIZE, "gif")
    with pytest.raises(ValueError, match="expected uint8"):
        encode_image(IMAGES[0].astype(np.float32), "raw")
