"""The token that a Ray cluster asks for: found as Ray finds it, or made up for a cluster of this machine.

Ray's servers, and each replica of Ray Serve, listen on all interfaces whatever address a cluster is given, and unpickle
what they are sent. Without a token, whoever reaches the machine could run code on it while a run lasts.
"""

import os
import secrets
import sys
from pathlib import Path


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
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

        # Ray reads its environment when it is imported; where that came first, it reads it again. Not without need:
        # threads of a cluster that was just left may still look at what is made anew here.
        if not is_token_auth_enabled():
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()
