"""Our own commands in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfrecords_builder.common.errors import UserError

_MENDABLE = 2
"""Exit status of a command that has said in a line what the user can mend."""


def train(dataset: Path, run: Path, arguments: Sequence[str], settings: Sequence[str]) -> None:
    """`cxr-dist train` with `arguments`, and with `settings` (key=value) on top."""
    command(["train", str(dataset), "--out", str(run), *arguments], settings)


def command(arguments: Sequence[str], settings: Sequence[str]) -> None:
    """`cxr-dist` with `arguments`, and with `settings` (key=value) on top."""
    changes = [text for setting in settings for text in ("--set", setting)]
    python(["-m", "cxr_dist", *arguments, *changes], os.environ)


def python(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """This Python, and wait; what it prints goes to stderr, as it is no result.

    Raises:
        UserError: the command ended with what the user can mend, which it has said.
    """
    try:
        # Our own commands, and paths that the user gave.
        subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=sys.stderr)  # noqa: S603
    except subprocess.CalledProcessError as error:
        if error.returncode == _MENDABLE:
            raise UserError("the benchmark ends here, as the command that it measures says above why") from None
        raise
