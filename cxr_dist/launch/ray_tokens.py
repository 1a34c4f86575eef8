"""The token that a Ray cluster asks for: found as Ray finds it, or made up for a cluster of this machine.

Ray's servers, and each replica of Ray Serve, listen on all interfaces whatever address a cluster is given, and unpickle
what they are sent. Without a token, whoever reaches the machine could run code on it while a run lasts.
"""

import os
import secrets
import sys
from pathlib import Path

from cxr_dist import compat

HOW_TO_SET = "set RAY_AUTH_MODE=token, and its token as RAY_AUTH_TOKEN or a file that holds it as RAY_AUTH_TOKEN_PATH"


def token_sent(*, is_looked_up: bool) -> str | None:
    """The token that Ray sends to a cluster it is to join; None when it sends none.

    Args:
        is_looked_up: Whether Ray finds the cluster itself on this machine. To one whose address it is given it sends
            none unless $RAY_AUTH_MODE says so.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token" if is_looked_up else "")
    return known_token() if mode.lower() == "token" else None


def known_token() -> str | None:
    """The token that requests will carry; None when there is none."""
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if given:
        return given
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def ask_for_tokens() -> None:
    """Let a cluster that this process starts admit only those who know the user's token, or one made up for it."""
    if not known_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token"
    if "ray" in sys.modules:
        compat.ray_reads_its_token_again()
