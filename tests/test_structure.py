"""What keeps every room of the house small: limits that a reader of a module, a function or a class can rely on."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("cxr_dist", "tfrecords_builder")
MODULE_LINES, FUNCTION_LINES, PARAMETERS, METHODS = 400, 60, 8, 15
DECLARATIONS = "add_parser"
"""Functions with such a name declare a command line: a long list, and nothing else."""


def modules() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def too_large(name: str, source: str) -> Iterator[str]:
    """What of a module is over a limit."""
    if (lines := len(source.splitlines())) > MODULE_LINES:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES and not node.name.lstrip("_").startswith(DECLARATIONS):
                yield f"{name}: {node.name} has {lines} lines"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            if count > PARAMETERS:
                yield f"{name}: {node.name} has {count} parameters"
        elif isinstance(node, ast.ClassDef):
            count = sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
            if count > METHODS:
                yield f"{name}: {node.name} has {count} methods"


def test_modules_functions_and_classes_are_small() -> None:
    assert [line for name, source in modules() for line in too_large(name, source)] == []


def test_what_is_too_large_is_seen() -> None:
    body = "    x = 1\n" * FUNCTION_LINES
    assert list(too_large("m", f"def f():\n{body}")) == [f"m: f has {FUNCTION_LINES + 1} lines"]
    assert list(too_large("m", f"def add_parsers():\n{body}")) == []
    assert list(too_large("m", "def f(a, b, c, d, e, f, g, h, *, i): ...")) == ["m: f has 9 parameters"]
    methods = "".join(f"    def m{number}(self): ...\n" for number in range(METHODS + 1))
    assert list(too_large("m", f"class C:\n{methods}")) == [f"m: C has {METHODS + 1} methods"]
    assert list(too_large("m", "\n" * (MODULE_LINES + 1))) == [f"m: {MODULE_LINES + 1} lines"]


def test_packages_hold_modules_and_say_what_they_own() -> None:
    beside = {path.name for path in (ROOT / "cxr_dist").glob("*.py")} - {"__init__.py", "__main__.py", "compat.py"}
    assert not beside, "a module belongs to a package"
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert len(docstring.split()) >= 12, f"{path.relative_to(ROOT)}: says too little of what it owns"
