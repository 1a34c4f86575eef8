"""Which image a text of a table names, and what a value says."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from tfrecords_builder.collection.tables import path_finder, plain_value

PARTS = st.sampled_from(["a", "A", "b"])
NAMES = st.sampled_from(["x.png", "X.jpg", "y.png", "x"])


def paths(most: int) -> st.SearchStrategy[str]:
    return st.builds(lambda folders, name: "/".join([*folders, name]), st.lists(PARTS, max_size=most), NAMES)


def named(paths: Sequence[str], text: str) -> list[str]:
    """The images of which the text is an end, or that are an end of it; one after the other."""
    words = text.casefold().split("/")
    found = []
    for path in paths:
        own = path.casefold().split("/")
        for last in {own[-1], own[-1].removesuffix(".png").removesuffix(".jpg")}:
            parts = [*own[:-1], last]
            length = min(len(parts), len(words))
            if parts[-length:] == words[-length:]:
                found.append(path)
    return found


@given(st.sets(paths(2), min_size=1), paths(3))
def test_a_text_names_the_one_image_that_it_fits(known: set[str], text: str) -> None:
    found = path_finder(known)(text)
    if text in known:
        assert found == text
    else:
        fitting = set(named(sorted(known), text))
        assert found == (fitting.pop() if len(fitting) == 1 else None)


def test_images_of_one_name_in_many_folders_take_no_longer() -> None:
    known = [f"patient{number}/study1/view1.png" for number in range(20_000)]
    find = path_finder(known)
    started = time.process_time()
    assert [find(path.replace("/", "\\")) for path in known] == known
    assert time.process_time() - started < 20, "one look at all images for each would take minutes"
    assert find("view1.png") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [(" a  b ", "a b"), ("1.0", "1"), ("1.5", "1.5"), ("nan", None), ("", None), ("Normal", "Normal"), ("NULL", None)],
)
def test_values(text: str, value: str | None) -> None:
    assert plain_value(text) == value
