"""How this program was installed, and so how an extra of it is."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Of a checkout; else the folder of all installed packages."""


def install_command(extra: str = "") -> str:
    """The command that installs this program's dependencies, those of an extra too, as it was installed itself.

    Args:
        extra: The extra's name; none when empty.
    """
    extras = f"[{extra}]" if extra else ""
    if (ROOT / "pyproject.toml").is_file() and (ROOT / "constraints.txt").is_file():
        return f'pip install -c constraints.txt -e ".{extras}"'
    return f'pip install "cxr-dist{extras}"'
