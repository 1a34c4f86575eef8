"""Names of Ray that are not public. Each function fails with Ray's version when Ray no longer has the name."""

import importlib
from typing import Any

from cxr_dist.runs.versions import unsupported


def _name(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise unsupported("ray", f"it has no {module}.{name}") from None


def health_check_errors() -> tuple[type[Exception], ...]:
    """What Ray Train raises of workers that do not answer."""
    module = "ray.train.v2._internal.exceptions"
    return _name(module, "WorkerHealthCheckFailedError"), _name(module, "WorkerHealthCheckTimeoutError")


def startup_timeout_error() -> type[Exception]:
    """What Ray Train raises when workers did not get their places in time."""
    error: type[Exception] = _name("ray.train.v2._internal.exceptions", "WorkerGroupStartupTimeoutError")
    return error


def address_on_this_machine() -> str:
    """The address that Ray takes `auto` for.

    Raises:
        ConnectionError: No cluster runs on this machine.
    """
    return str(_name("ray._private.services", "get_ray_address_from_environment")("auto", None))
