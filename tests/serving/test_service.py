"""What `serving` does around Ray Serve, without a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from cxr_dist.serving import service
from cxr_dist.serving.limits import Limits


@pytest.mark.parametrize("verbose", [False, True])
def test_what_ray_prints_at_the_end_is_shown_on_request_alone(
    verbose: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray prints that the controller has died while the service, and then the cluster, is shut down."""
    import ray

    @contextmanager
    def connected(*_: object) -> Iterator[None]:
        yield
        print("(raylet) the controller is dead")

    def nothing(*_: object, **__: object) -> None:
        pass

    fake = SimpleNamespace(start=nothing, run=nothing, shutdown=lambda: print("(raylet) a task failed"))
    monkeypatch.setattr(ray, "serve", fake, raising=False)
    monkeypatch.setattr(service, "connected", connected)
    for name in ("_check_run", "_check_address", "_application"):
        monkeypatch.setattr(service, name, nothing)
    with service.serving(Path("run"), "127.0.0.1", 8000, Limits(), verbose=verbose) as address:
        print(address)
    shown = capsys.readouterr().out.splitlines()
    ray_s = ["(raylet) a task failed", "(raylet) the controller is dead"]
    assert shown == ["http://127.0.0.1:8000", *(ray_s if verbose else [])]
    print("afterwards")
    assert capsys.readouterr().out == "afterwards\n"
