"""Design pages and decision records name modules, functions and files: each exists, or the page is out of date."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr_dist.config.schema import Config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/design/*.md"), *ROOT.glob("docs/decisions/*.md")])
PACKAGES = {path.name: path for name in ("cxr_dist", "tfrecords_builder") for path in (ROOT / name).iterdir()}
OTHERS = re.compile(r"model\.fit|\w+\.(json|jsonl|yaml|keras|html)")
"""Dotted names that are Keras's, or files of a run."""
ROOTS = {"cxr_dist": ROOT / "cxr_dist", "tfrecords_builder": ROOT / "tfrecords_builder"}


def is_config_key(name: str) -> bool:
    """Whether the dotted name is a field of the configuration; a number or N is a stage's."""
    fields = Config.model_json_schema()
    node = fields
    for part in name.split("."):
        node = fields["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        if re.fullmatch(r"\d+|N", part):
            node = node.get("additionalProperties", {})
        else:
            node = node.get("properties", {}).get(part, {})
        if "allOf" in node:
            node = node["allOf"][0]
        if not node:
            return False
    return True


def is_in_code(name: str) -> bool:
    """Whether a dotted name is a module, or a name that its module defines."""
    first, *rest = name.split(".")
    place = ROOTS.get(first) or PACKAGES[first]
    while rest and (place / rest[0]).is_dir():
        place = place / rest.pop(0)
    if not rest:
        return place.exists()
    module = place / f"{rest.pop(0)}.py"
    return module.is_file() and all(re.search(rf"\b{part}\b", module.read_text(encoding="utf-8")) for part in rest)


def names(page: Path) -> Iterator[str]:
    for quoted in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        yield quoted.removesuffix("()")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    missing = []
    for name in names(page):
        if re.fullmatch(r"(cxr_dist|tfrecords_builder|tune_configs|tests|cluster)(/[\w.]+)+", name):
            missing += [] if (ROOT / name).exists() else [name]
        elif re.fullmatch(r"[a-z_]+(\.\w+)+", name) and not OTHERS.fullmatch(name):
            ours = name.split(".")[0] in PACKAGES.keys() | ROOTS.keys()
            missing += [] if not ours or is_in_code(name) or is_config_key(name) else [name]
    assert missing == []


def test_a_name_that_is_gone_is_seen() -> None:
    assert is_in_code("training.train_step.TrainStep")
    assert is_in_code("cxr_dist.compat")
    assert not is_in_code("training.stepper")
    assert not is_in_code("training.train_step.Stepper")
    assert is_config_key("stages.2.unfreeze_layers")
    assert is_config_key("features.cache_activations")
    assert not is_config_key("features.keep_activations")
