"""What all tests share: logical CPUs before TensorFlow starts, small datasets, and the real images where they are."""

import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from cxr_dist.distributed.devices import prepare_devices, prepare_environment

prepare_environment()  # here, as some files of tests import TensorFlow themselves
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# A shell has what it runs in the background (`make test &`) ignore SIGINT, and so would all that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# As every cluster that the program starts asks for a token, and Ray decides that once for a process.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Limits of Ray that a slow machine reaches although nothing is wrong, and its killing of workers where the machine's
# memory is nearly full, whoever holds it.
os.environ |= {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}

LOGICAL_CPUS = 4
_SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def logical_cpus() -> None:
    """Divide the CPU once: it cannot be done after TensorFlow has started."""
    prepare_devices(LOGICAL_CPUS)


@pytest.fixture(autouse=True)
def keras_policy_stays() -> Iterator[None]:
    """Whatever a test does with models, Keras's global policy is afterwards what it was."""
    yield
    if keras := sys.modules.get("keras"):
        assert keras.config.dtype_policy().name == "float32"


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process of this test session to ask for it makes, and all read."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each process has a folder of its own below it
    folder = shared / "shared" / name
    with FileLock(f"{shared}/{name}.lock"):
        if not folder.exists():
            unfinished = shared / "unfinished" / name
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.parent.mkdir(exist_ok=True)
            make(unfinished)
            folder.parent.mkdir(exist_ok=True)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def phantom_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of the four classes, 20 of each at 48 pixels. Do not change it: all processes share it."""
    from cxr_dist.phantoms import write_phantoms

    return _made_once(tmp_path_factory, "phantoms", lambda out: write_phantoms(out, per_class=20, size=48, workers=1))


@pytest.fixture(scope="session")
def dataset(phantom_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 80 phantoms at 32 pixels: 56 for training, 12 for validation, 12 for the test. Do not change it."""
    from tfrecords_builder.build import BuildOptions, build_dataset

    return _made_once(
        tmp_path_factory,
        "dataset",
        lambda out: build_dataset(phantom_source, out, BuildOptions(image_size=32, workers=1)),
    )


def _real(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.exists():
        pytest.skip(f"needs real input: {path} is missing; set ${variable}")
    return path


@pytest.fixture(scope="session")
def xrays() -> Path:
    """The real X-rays: $CXR_XRAYS, a folder in the database's layout."""
    return _real("CXR_XRAYS", _SHARED / "data" / "cxr4" / "COVID-19_Radiography_Dataset")


@pytest.fixture(scope="session")
def odd_xrays() -> Path:
    """Damaged images of the class Viral Pneumonia: $CXR_ODD_XRAYS, a folder of PNGs."""
    return _real("CXR_ODD_XRAYS", _SHARED / "data" / "odd")


@pytest.fixture(scope="session")
def imagenet_weights() -> Path:
    """ImageNet weights of ResNet50 without top: $CXR_WEIGHTS."""
    return _real("CXR_WEIGHTS", _SHARED / "weights" / "resnet50_imagenet_notop.h5")


# `pytest --hypothesis-profile=nightly` chooses the other one. No deadline and no limit for drawing: how long an example
# takes says how busy the machine is. The quick one draws the same examples every time: a change is not refused for an
# example that it has nothing to do with.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("timeless"), max_examples=25, derandomize=True)
settings.register_profile("nightly", settings.get_profile("timeless"), max_examples=500)
settings.load_profile("quick")


_RAY_FILES = tuple(f"tests/integration/test_{name}.py" for name in ("connection", "ray", "serve", "submit", "tune_ray"))
_FAULT_FILES = tuple(f"tests/faults/test_{name}.py" for name in ("killed_builds", "lost_workers", "partition"))
RAY_FILES = (*_RAY_FILES, *_FAULT_FILES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share a process, and those with a Ray cluster share one.

    Two clusters of one machine contend for the port of the agent that takes jobs. xdist's own groups have no effect
    with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(RAY_FILES) else nodeid.partition("::")[0]

    return ByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a Ray cluster begin first as they take longest, file by file: fixtures of the session mix files."""
    items.sort(key=lambda item: (0, str(item.path)) if item.get_closest_marker("ray") else (1, ""))


@pytest.fixture
def ray_stopped() -> Iterator[None]:
    """No Ray before or after, whatever the test does."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


SMALL_RUN = [
    "global_batch_size=8",
    "precision=float32",
    "model.weights=none",
    "stages.1.epochs=2",
    "stages.1.learning_rate=1e-3",
    "stages.2.epochs=1",
    "stages.2.unfreeze_layers=20",
]


def use_small_base(patch: pytest.MonkeyPatch) -> None:
    """Let training and evaluation build a small residual base: ResNet50's steps take half a minute to trace."""
    from cxr_dist.model import resnet
    from tests.small_training import small_base

    patch.setattr(resnet, "resnet50", small_base)


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small residual base in place of ResNet50, in this process."""
    use_small_base(monkeypatch)


@pytest.fixture
def figures_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is made, and none is drawn, which is most of what an evaluation of a few images costs."""
    from tfrecords_builder.common import figure

    monkeypatch.setattr(figure, "image_bytes", lambda _drawing, _kind: b"not drawn")


@pytest.fixture(scope="session")
def run_with_checkpoints(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `finished_run`, killed before its checkpoints were removed. Do not change it."""
    from cxr_dist.config.loading import load_config
    from cxr_dist.launch import train

    def make(run: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            use_small_base(patch)
            patch.setattr(train, "remove_checkpoints", lambda _run: None)
            train.run_training(load_config(None, SMALL_RUN), dataset, run, launcher="local")

    return _made_once(tmp_path_factory, "run", make)


@pytest.fixture(scope="session")
def finished_run(run_with_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of stage 1 and one of stage 2 of the small network. Do not change it."""
    from cxr_dist.launch.train import remove_checkpoints

    run = Path(shutil.copytree(run_with_checkpoints, tmp_path_factory.mktemp("finished") / "run"))
    remove_checkpoints(run)
    return run
