from collections import Counter

from hypothesis import given, strategies as st

from tfrecords_builder.splitting.splits import (
    MIN_IMAGES_PER_CLASS,
    SPLITS,
    assign_splits,
    count_warnings,
    split_sizes,
    stable_order,
)

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


@given(
    st.dictionaries(names, st.tuples(st.sampled_from("XY"), st.integers(0, 30)), min_size=1, max_size=60),
    st.integers(0, 5),
)
def test_groups_stay_together_and_sizes_are_within_one_group(images: dict[str, tuple[str, int]], seed: int) -> None:
    classes = {path: name for path, (name, _) in images.items()}
    group_of = {path: f"{name}{number}" for path, (name, number) in images.items()}
    assigned = assign_splits(classes, seed, group_of)
    assert assigned.keys() == classes.keys()
    for group in set(group_of.values()):
        assert len({assigned[path] for path in classes if group_of[path] == group}) == 1
    for name in set(classes.values()):
        members = [path for path in classes if classes[path] == name]
        largest = max(Counter(group_of[path] for path in members).values())
        for split, size in split_sizes(len(members)).items():
            assert abs(sum(assigned[path] == split for path in members) - size) < largest


def test_single_images_fill_up_to_the_exact_sizes() -> None:
    classes = {f"{i}.png": "X" for i in range(100)}
    group_of = {f"{i}.png": str(i // 5) for i in range(40)}
    assigned = assign_splits(classes, 0, group_of)
    assert Counter(assigned.values()) == split_sizes(100)


def test_a_group_of_two_classes_is_in_one_split() -> None:
    classes = {f"{name}/{i}.png": name for name in "XY" for i in range(40)}
    group_of = {f"{name}/{i}.png": f"both-{i % 4}" for name in "XY" for i in range(12)}
    assigned = assign_splits(classes, 3, group_of)
    for number in range(4):
        assert len({assigned[path] for path, group in group_of.items() if group == f"both-{number}"}) == 1


def test_without_groups_nothing_changes() -> None:
    classes = {f"{i}.png": "XY"[i % 2] for i in range(90)}
    assert assign_splits(classes, 1, {path: path for path in classes}) == assign_splits(classes, 1)


def test_small_classes_are_warned_of() -> None:
    counts = {
        "train": {"a": 104, "b": 700},
        "validation": {"a": 20, "b": 150},
        "test": {"a": 26, "b": 150},
    }
    assert count_warnings(counts) == []
    counts["train"]["a"] = 53
    [ratio] = count_warnings(counts)
    assert ratio.startswith("b has 1,000 images and a 99; ")
    counts["validation"]["a"] = 19
    assert count_warnings(counts)[1].startswith("the validation split has few images (19 of a); ")
