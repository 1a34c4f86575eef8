"""Which images come at which step, on any number of workers and replicas, and what is read."""

import gc
import shutil
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from cxr_dist.data import batch_sampler as plans, shards
from cxr_dist.data.arrays import ArraySource, MemorySource
from cxr_dist.data.batch_sampler import PADDING, EvaluationBatchSampler, TrainBatchSampler, epoch_order
from cxr_dist.data.pipeline import worker_batches
from cxr_dist.data.shards import ShardSource
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.format.tfrecord import HEADER_BYTES, CorruptRecordError
from tfrecords_builder.images.decode import load_gray

REPLICAS = (1, 2, 3, 4, 6, 12)


def global_batch(plan: TrainBatchSampler | EvaluationBatchSampler, step: int) -> list[int]:
    return [int(position) for replica in range(plan.replicas) for position in plan.positions(step, replica)]


# Plans


@given(count=st.integers(12, 300), factor=st.integers(1, 4), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_the_global_batch_is_the_same_for_any_number_of_replicas(
    count: int, factor: int, seed: int, data: st.DataObject
) -> None:
    batch = min(12 * factor, count // 12 * 12)
    plans = [TrainBatchSampler(count, batch, replicas, seed) for replicas in REPLICAS]
    step = data.draw(st.integers(0, 5 * plans[0].steps_per_epoch))
    expected = global_batch(plans[0], step)
    assert len(set(expected)) == batch
    for plan in plans:
        assert plan.steps_per_epoch == plans[0].steps_per_epoch
        assert all(plan.positions(step, replica).shape == (plan.batch_size,) for replica in range(plan.replicas))
        # In the same order, too: an image keeps its slot, on which its augmentation depends.
        assert global_batch(plan, step) == expected


@given(count=st.integers(1, 200), batch=st.integers(1, 200), seed=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_an_epoch_has_no_repeats_and_leaves_out_less_than_a_batch(
    count: int, batch: int, seed: int, epoch: int
) -> None:
    batch = min(batch, count)
    plan = TrainBatchSampler(count, batch, 1, seed)
    seen: list[int] = []
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        seen += global_batch(plan, step)
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(range(count))
    assert 0 <= count - len(seen) < batch


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = {(seed, epoch): epoch_order(500, seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len({order.tobytes() for order in orders.values()}) == 25
    for (seed, epoch), order in orders.items():
        np.testing.assert_array_equal(np.sort(order), np.arange(500))
        np.testing.assert_array_equal(order, epoch_order(500, seed, epoch))
        assert order.dtype == np.int64
    # The plan uses them so, across epochs and back: a run that goes on asks for any step first.
    plan = TrainBatchSampler(500, 50, 2, seed=3)
    for step in (12, 3, 39, 0, 12):
        epoch, within = divmod(step, plan.steps_per_epoch)
        assert global_batch(plan, step) == orders[3, epoch][within * 50 : (within + 1) * 50].tolist()


def test_what_an_epoch_leaves_out_changes() -> None:
    plan = TrainBatchSampler(99, 50, 1, seed=0)
    left_out = [set(range(99)) - set(global_batch(plan, epoch)) for epoch in range(12)]
    assert set.intersection(*left_out) == set()


@given(count=st.integers(0, 300), batch=st.integers(1, 40), replicas=st.integers(1, 9))
def test_evaluation_counts_every_image_once(count: int, batch: int, replicas: int) -> None:
    plan = EvaluationBatchSampler(count, batch, replicas)
    seen = [position for step in range(plan.steps) for position in global_batch(plan, step)]
    assert seen[:count] == list(range(count)), "in order"
    assert seen[count:] == [PADDING] * (len(seen) - count), "padding only at the end"
    assert len(seen) - count < batch * replicas, "no step of padding alone"


@pytest.mark.parametrize(
    ("count", "batch", "replicas", "words"),
    [
        (100, 32, 3, ["32", "multiple of the 3", "33"]),
        (100, 1, 8, ["1:", "multiple of the 8", "try 8"]),
        (31, 32, 1, ["32", "31 images", "smaller"]),
        (0, 1, 1, ["1:", "0 images"]),
    ],
)
def test_batch_sizes_that_do_not_fit(count: int, batch: int, replicas: int, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        TrainBatchSampler(count, batch, replicas, seed=0)
    message = str(caught.value)
    assert message.startswith("global_batch_size ")
    assert all(word in message for word in words), message


# Pipelines


def array_source(count: int, dtype: Any = np.uint8) -> ArraySource:
    """Input i holds i; its label is i squared, modulo 7."""
    inputs = np.broadcast_to(np.arange(count)[:, None, None], (count, 3, 2)).astype(dtype)
    return ArraySource(inputs, (np.arange(count) ** 2 % 7).astype(np.int32))


@pytest.mark.parametrize(
    ("first_replica", "local_replicas", "replicas", "start_step"),
    [(0, 1, 1, 0), (2, 2, 4, 0), (1, 1, 2, 13), (0, 3, 3, 5)],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_elements_come_as_planned(
    first_replica: int, local_replicas: int, replicas: int, start_step: int, dtype: Any
) -> None:
    source = array_source(50, dtype)
    plan = TrainBatchSampler(50, 12, replicas, seed=4)
    batches = worker_batches(
        source, plan, first_replica=first_replica, local_replicas=local_replicas, start_step=start_step
    )
    batch = plan.batch_size
    shapes = {key: (spec.shape.as_list(), spec.dtype.as_numpy_dtype) for key, spec in batches.element_spec.items()}
    assert shapes == {
        "inputs": ([batch, 3, 2], dtype),
        "label": ([batch], np.int32),
        "mask": ([batch], np.float32),
        "slot": ([batch], np.int32),
    }
    for number, element in enumerate(batches.take(70 * local_replicas).as_numpy_iterator()):
        step, local = divmod(number, local_replicas)
        replica = first_replica + local
        expected = plan.positions(start_step + step, replica)
        np.testing.assert_array_equal(element["inputs"][:, 1, 1], expected)
        np.testing.assert_array_equal(element["label"], expected**2 % 7)
        np.testing.assert_array_equal(element["mask"], 1)
        np.testing.assert_array_equal(element["slot"], replica * batch + np.arange(batch))


@pytest.mark.parametrize("plan", [TrainBatchSampler(50, 12, 1, seed=4), EvaluationBatchSampler(50, 12, 1)])
def test_pipelines_say_that_they_never_end(plan: Any) -> None:
    """Of another, a distributed iterator of several workers asks all of them before every batch who has data left."""
    import tensorflow as tf

    batches = worker_batches(array_source(50), plan, first_replica=0, local_replicas=1)
    assert batches.cardinality() == tf.data.INFINITE_CARDINALITY


def test_an_epoch_s_order_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although TensorFlow calls into Python from threads that are new each time."""
    epochs: list[int] = []

    def counted(count: int, seed: int, epoch: int) -> Any:
        epochs.append(epoch)
        return epoch_order(count, seed, epoch)

    monkeypatch.setattr(plans, "epoch_order", counted)
    plan = TrainBatchSampler(1000, 2, 1, seed=77)
    batches = worker_batches(array_source(1000, np.int32), plan, first_replica=0, local_replicas=1)
    list(batches.take(2 * plan.steps_per_epoch).as_numpy_iterator())
    assert epochs[:2] == [0, 1]
    assert len(epochs) <= 3, "the pipeline may be ahead by an epoch"


def test_a_pipeline_that_starts_later_goes_on_identically() -> None:
    plan = TrainBatchSampler(50, 12, 2, seed=1)

    def elements(start: int, steps: int) -> list[dict[str, Any]]:
        batches = worker_batches(array_source(50), plan, first_replica=0, local_replicas=2, start_step=start)
        return list(batches.take(2 * steps).as_numpy_iterator())

    whole, rest = elements(0, 9), elements(5, 4)
    for before, after in zip(whole[10:], rest, strict=True):
        for key, value in before.items():
            np.testing.assert_array_equal(value, after[key])


def test_batches_that_were_read_leave_nothing_behind() -> None:
    """TensorFlow keeps functions that a dataset calls, and graphs of its own, in its default graph."""

    def objects_after(runs: int) -> int:
        for _ in range(runs):
            plan = TrainBatchSampler(50, 12, 1, seed=1)
            batches = worker_batches(array_source(50), plan, first_replica=0, local_replicas=1)
            list(batches.take(2).as_numpy_iterator())
        del batches
        gc.collect()
        return len(gc.get_objects())

    before = objects_after(5)
    assert objects_after(20) - before < 20 * 5


@pytest.mark.parametrize(("replicas", "batch"), [(1, 8), (2, 8), (3, 5), (4, 40)])
def test_evaluation_batches_mask_their_padding(replicas: int, batch: int) -> None:
    source = array_source(101)
    plan = EvaluationBatchSampler(101, batch, replicas)
    counted: Counter[int] = Counter()
    for replica in range(replicas):
        batches = worker_batches(source, plan, first_replica=replica, local_replicas=1)
        for element in batches.take(20 * plan.steps).as_numpy_iterator():
            real = element["mask"] == 1
            assert set(element["mask"].tolist()) <= {0.0, 1.0}
            counted.update(element["inputs"][real, 0, 0].tolist())
    assert counted == Counter(dict.fromkeys(range(101), 20)), "each time it begins again"


def test_arrays_of_different_lengths_are_a_defect() -> None:
    with pytest.raises(ValueError, match="3 inputs and 2 labels"):
        ArraySource(np.zeros((3, 1)), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="3 inputs and 2 labels"):
        MemorySource(MemorySource.empty((3, 1), np.dtype(np.uint8)), np.zeros(2, np.int32))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_memory_gives_rows_as_arrays_do_and_is_given_back(dtype: Any) -> None:
    arrays = array_source(50, dtype)
    plan = TrainBatchSampler(50, 12, 2, seed=4)

    def elements(source: Any) -> list[dict[str, Any]]:
        batches = worker_batches(source, plan, first_replica=0, local_replicas=2, start_step=3)
        return list(batches.take(130).as_numpy_iterator())

    inputs = MemorySource.empty((50, 3, 2), np.dtype(dtype))
    inputs[:] = np.arange(50)[:, None, None]
    memory = weakref.ref(inputs.base)
    source = MemorySource(inputs, arrays.labels)
    del inputs
    for left, right in zip(elements(arrays), elements(source), strict=True):
        for name, value in left.items():
            np.testing.assert_array_equal(value, right[name], err_msg=name)
            assert value.dtype == right[name].dtype
    del source, left, right
    gc.collect()
    assert memory() is None


def test_memory_that_tensorflow_would_not_bear_is_refused() -> None:
    """It ends the process there."""
    inputs = MemorySource.empty((65,), np.dtype(np.uint8))
    MemorySource(inputs, np.zeros(65, np.int32))
    with pytest.raises(ValueError, match="not aligned to 64 bytes"):
        MemorySource(inputs[1:], np.zeros(64, np.int32))


# Shards


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_shards_give_the_images_of_their_paths(split: str, dataset: Path, phantom_source: Path) -> None:
    manifest = read_manifest(dataset)
    source = ShardSource(dataset, manifest, split)
    assert source.count == len(source.paths) == len(source.labels) == sum(manifest.counts[split].values())
    plan = EvaluationBatchSampler(source.count, 5, 1)
    number = 0
    batches = worker_batches(source, plan, first_replica=0, local_replicas=1)
    assert batches.element_spec["inputs"].shape.as_list() == [5, 32, 32, 1]
    for element in batches.take(plan.steps).as_numpy_iterator():
        for image, label, mask in zip(element["inputs"], element["label"], element["mask"], strict=True):
            if mask:
                path = source.paths[number]
                np.testing.assert_array_equal(image[..., 0], load_gray(phantom_source / path, 32))
                assert manifest.class_names[label] == path.split("/")[0].replace(" ", "_")
                number += 1
    assert number == source.count


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
@pytest.mark.parametrize("run_bytes", [1, 3000, 1 << 20])
def test_a_split_in_memory_is_the_split(
    encoding: str, run_bytes: int, phantom_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_RUN_BYTES", run_bytes)  # one record at a time, some, a shard
    build_dataset(phantom_source, tmp_path / "dataset", BuildOptions(image_size=32, encoding=encoding, workers=1))
    source = ShardSource(tmp_path / "dataset", read_manifest(tmp_path / "dataset"), "train")
    plan = EvaluationBatchSampler(source.count, 7, 1)
    needed = source.count * 32 * 32
    assert source.in_memory(needed - 1) is source
    kept = source.in_memory(needed)
    assert kept is not source
    for left, right in zip(
        *(
            worker_batches(each, plan, first_replica=0, local_replicas=1).take(plan.steps).as_numpy_iterator()
            for each in (source, kept)
        ),
        strict=True,
    ):
        for name, value in left.items():
            np.testing.assert_array_equal(value, right[name], err_msg=name)


def test_what_is_left_out_or_empty_is_not_read_into_memory(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    whole = ShardSource(dataset, manifest, "train")
    for left_out in (whole.paths[:3], whole.paths[::4], whole.paths[-2:], [whole.paths[7]]):
        source = ShardSource(dataset, manifest, "train", left_out)
        kept = source.in_memory(1 << 30)
        plan = EvaluationBatchSampler(kept.count, 1, 1)
        batches = worker_batches(kept, plan, first_replica=0, local_replicas=1).take(plan.steps).as_numpy_iterator()
        for position, element in enumerate(batches):
            np.testing.assert_array_equal(element["inputs"][..., 0], source.pixels(np.array([position])))
    empty = ShardSource(dataset, manifest, "train", whole.paths)
    assert empty.count == 0
    assert empty.in_memory(1 << 30) is empty


@pytest.mark.parametrize("place", ["header", "payload"])
def test_a_flipped_byte_names_shard_and_offset(dataset: Path, tmp_path: Path, place: str) -> None:
    damaged = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    manifest = read_manifest(damaged)
    index = manifest.split("validation")
    position = 3
    shard, offset = damaged / index.shard_names[index.shard[position]], int(index.offset[position])
    data = bytearray(shard.read_bytes())
    data[offset + (2 if place == "header" else HEADER_BYTES + 40)] ^= 0x10
    shard.write_bytes(data)

    import tensorflow as tf

    source = ShardSource(damaged, manifest, "validation")
    plan = EvaluationBatchSampler(source.count, 2, 1)
    batches = worker_batches(source, plan, first_replica=0, local_replicas=1).take(plan.steps)
    with pytest.raises(tf.errors.OpError):
        list(batches.as_numpy_iterator())
    assert isinstance(source.failure, CorruptRecordError)
    assert isinstance(source.failure, UserError)
    assert (source.failure.shard, source.failure.offset) == (str(shard), offset)
    assert str(shard) in str(source.failure)
    assert str(offset) in str(source.failure)
    with pytest.raises(CorruptRecordError, match=shard.name):
        ShardSource(damaged, manifest, "validation").in_memory(1 << 30)


def test_a_reader_reads_its_own_records_alone(dataset: Path, tmp_path: Path) -> None:
    """A worker's slice is read, and nothing else: damage elsewhere goes unseen."""
    damaged = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    manifest = read_manifest(damaged)
    index = manifest.split("train")
    plan = TrainBatchSampler(len(index), 8, 2, seed=0)
    own = {int(position) for position in plan.positions(0, 0)}
    for position in set(range(len(index))) - own:
        shard = damaged / index.shard_names[index.shard[position]]
        with shard.open("r+b") as file:
            file.seek(int(index.offset[position]) + HEADER_BYTES)
            file.write(b"\xff" * 8)
    source = ShardSource(damaged, manifest, "train")
    records = source._read(plan.positions(0, 0))
    assert [len(record) for record in records] == [int(index.length[position]) for position in plan.positions(0, 0)]
    with pytest.raises(CorruptRecordError):
        source._read(plan.positions(0, 1))


def test_origins_make_no_object_of_any_other_row(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    source = ShardSource(dataset, manifest, "test")
    positions = np.array([7, 0, 3])
    sources_of, groups = source.origins(positions)
    assert source.digests.shape == (12,)
    assert len(set(source.patient_names) - {None}) == 0
    assert "_rows" not in vars(manifest.rows), "rows were made"
    row_of = {row.path: row for row in manifest.rows}
    assert sources_of == [row_of[source.paths[position]].source for position in positions]
    assert groups == [row_of[source.paths[position]].group for position in positions]


def test_descriptors_are_given_back(dataset: Path) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    manifest = read_manifest(dataset)
    gc.collect()
    before = open_files()
    source = ShardSource(dataset, manifest, "train")
    for _ in range(3):
        source._read(np.arange(source.count))
    assert open_files() == before + len({int(shard) for shard in manifest.split("train").shard})
    del source
    gc.collect()
    assert open_files() == before
