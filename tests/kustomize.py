"""Builds a folder of `cluster/kuberay/` as `kubectl kustomize` does, for the features that the folders use.

These are resources, components, images (newName, newTag) and patches (inline JSON patches, RFC 6902, whose targets have
a kind and perhaps a name). Any other field raises, so that no folder relies on what is not built here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]

_FIELDS = {"apiVersion", "kind", "resources", "components", "images", "patches"}


def load(folder: Path) -> Document:
    """The folder's kustomization.

    Raises:
        ValueError: it has a field that is not built here.
    """
    content: Document = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if unknown := set(content) - _FIELDS:
        raise ValueError(f"{folder.name}: not built here: {sorted(unknown)}")
    return content


def build(folder: Path, added: Mapping[Path, list[str]] | None = None) -> list[Document]:
    """The objects that `kubectl apply -k FOLDER` would apply.

    Args:
        folder: of a kustomization.
        added: components of a folder beside those that its file names, by the resolved folder.
    """
    return _extend([], folder.resolve(), added or {})


def _extend(objects: list[Document], folder: Path, added: Mapping[Path, list[str]]) -> list[Document]:
    content = load(folder)
    for name in content.get("resources", []):
        path = (folder / name).resolve()
        objects += build(path, added) if path.is_dir() else yaml.safe_load_all(path.read_text(encoding="utf-8"))
    for name in [*content.get("components", []), *added.get(folder, [])]:
        objects = _extend(objects, (folder / name).resolve(), added)
    for patch in content.get("patches", []):
        kind, name = patch["target"]["kind"], patch["target"].get("name")
        for target in objects:
            if target["kind"] == kind and name in {None, target["metadata"]["name"]}:
                for operation in yaml.safe_load(patch["patch"]):
                    _operate(target, **operation)
    for image in content.get("images", []):
        for target in objects:
            _rename(target, image)
    return objects


def _operate(target: Any, op: str, path: str, value: Any = None) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    for part in parents:
        target = target[int(part) if isinstance(target, list) else part]
    if op not in {"add", "replace", "remove"} or not isinstance(target, dict):
        raise ValueError(f"not built here: {op} {path}")
    if op != "add":
        del target[last]
    if op != "remove":
        target[last] = value


def _rename(node: Any, image: Document) -> None:
    """In every list named `containers`, wherever it is."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == "containers":
            for container in child:
                name, _, tag = container["image"].partition(":")
                if name == image["name"]:
                    container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
        _rename(child, image)
