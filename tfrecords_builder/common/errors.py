"""The one error type that means: the user can fix this, and what of another error goes into its line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can fix: one line that names the field or file, and the fix.

    The command line prints it as ``error: <message>`` and exits with status 2, without a traceback.
    Everything else that is raised is a defect or a broken machine, and fails loudly.
    """


def one_line(error: BaseException, limit: int = 200) -> str:
    """An error's text on one line of `limit` letters at most; its type's name when it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


@contextmanager
def reading(path: Path, fix: str) -> Iterator[None]:
    """Raise `UserError` for what goes wrong while a file is read and its content is taken apart.

    Args:
        path: The file.
        fix: What the user can do.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); {fix}") from None
