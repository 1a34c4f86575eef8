from hypothesis import given
from hypothesis import strategies as st

from tfrecords_builder.splits import MIN_IMAGES_PER_CLASS, SPLITS, assign_splits, split_sizes, stable_order

# The published project's classes and split (its training figure is two higher than its own rule gives).
PUBLISHED_CLASSES = (3_616, 6_012, 10_192, 1_345)
PUBLISHED_TOTALS = {"train": 14_814, "validation": 3_172, "test": 3_179}

names = st.text("abcdefgh/.", min_size=1, max_size=8)


def test_published_counts() -> None:
    sizes = [split_sizes(count) for count in PUBLISHED_CLASSES]
    assert {split: sum(size[split] for size in sizes) for split in SPLITS} == PUBLISHED_TOTALS
    assert [size["validation"] for size in sizes] == [542, 901, 1528, 201]
    assert [size["test"] for size in sizes] == [543, 903, 1530, 203]


def test_published_counts_through_assignment() -> None:
    classes = {f"{c}/{i}.png": str(c) for c, count in enumerate(PUBLISHED_CLASSES) for i in range(count)}
    assigned = list(assign_splits(classes, seed=3).values())
    assert {split: assigned.count(split) for split in SPLITS} == PUBLISHED_TOTALS


def test_sizes_over_a_grid() -> None:
    for count in range(2_000):
        sizes = split_sizes(count)
        assert tuple(sizes) == SPLITS
        assert sum(sizes.values()) == count
        # Exactly rounded down, in whole numbers: 0.7 * 10 in floating point is not 7.
        assert 100 * sizes["train"] <= 70 * count < 100 * (sizes["train"] + 1)
        assert 100 * sizes["validation"] <= 15 * count < 100 * (sizes["validation"] + 1)
        assert all(sizes.values()) == (count >= MIN_IMAGES_PER_CLASS)


@given(st.dictionaries(names, st.sampled_from("XYZ")), st.integers(0, 5), st.randoms())
def test_assignment_is_stable_and_stratified(classes: dict[str, str], seed: int, random) -> None:
    assigned = assign_splits(classes, seed)
    assert assigned.keys() == classes.keys()
    for name in set(classes.values()):
        members = [assigned[path] for path in classes if classes[path] == name]
        assert {split: members.count(split) for split in SPLITS} == split_sizes(len(members))
    shuffled = list(classes.items())
    random.shuffle(shuffled)
    assert assign_splits(dict(shuffled), seed) == assigned
    # A class more moves no image of another.
    more = assign_splits({**classes, **{f"new-{i}": "W" for i in range(9)}}, seed)
    assert {path: more[path] for path in classes} == assigned


def test_seed_decides() -> None:
    classes = {f"{i}.png": "X" for i in range(200)}
    splits = [assign_splits(classes, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_order_is_fixed_across_versions() -> None:
    """Computed once: a change here silently moves images between the splits of datasets built before."""
    assert stable_order(["a", "b", "c", "d", "e", "f"], 0) == ORDER_OF_SEED_0
    assert stable_order(["f", "e", "d", "c", "b", "a"], 0) == ORDER_OF_SEED_0


ORDER_OF_SEED_0 = ["f", "d", "c", "e", "a", "b"]
