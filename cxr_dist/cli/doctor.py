"""The command `doctor`: a list of findings about this machine or a cluster, each with its fix.

Each check uses what training uses: TensorFlow for devices, the placement plan of `train` for workers.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cxr_dist.cli.options import JSON_HELP, Command
from cxr_dist.distributed import gpu_support
from cxr_dist.distributed.gpu_support import DRIVER, NCCL, Build, Capability, Gpu
from cxr_dist.launch.placement import Node, plan_workers
from cxr_dist.runs import versions
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.installation import install_command

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

GIB = 1 << 30
LEAST_MEMORY_GIB, LEAST_DISK_GIB, LEAST_SHARED_GIB = 4.0, 5.0, 0.5
"""Below these, most runs lack resources: a process with TensorFlow and ResNet50 at batch 32 takes 3 GiB, a dataset of
the whole database with its features 2, and Ray's object store needs shared memory."""

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    state: State
    """note: something optional is missing or limited; missing: training fails."""
    message: str


def add_parsers(command: Command) -> None:
    parser = command("doctor", doctor, "check what this machine or a cluster can run, and list what is missing")
    parser.add_argument(
        "--address", metavar="ADDRESS", help="address of a Ray cluster to check instead of this machine"
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def doctor(options: argparse.Namespace) -> None:
    """Print the findings; exit status 1 when something that training needs is missing."""
    if options.address:
        from cxr_dist.launch.placement import cluster_nodes
        from cxr_dist.launch.ray_connection import connected

        with connected(options.address, options.verbose):
            findings = examine_cluster(cluster_nodes())
    else:
        findings = examine_machine()
    if options.json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        print("\n".join(table(findings)))
    if any(finding.state == "missing" for finding in findings):
        raise SystemExit(1)


def examine_machine() -> list[Finding]:
    """Findings about this machine and this Python environment."""
    return [*_environment(), *_hardware(), *_devices(), *_extras()]


def examine_cluster(nodes: Sequence[Node]) -> list[Finding]:
    """Findings about a Ray cluster: its machines, and the default placement of `train`."""
    machines_text = ", ".join(f"{node.cpus:g} CPU + {node.gpus:g} GPU" for node in nodes) or "none"
    machines = Finding("machines", "ok" if nodes else "missing", machines_text)
    try:
        plan = plan_workers(nodes, None, None)
    except UserError as error:
        return [machines, Finding("train", "missing", one_line(error))]
    message = (
        f"{plan.workers} worker(s) of {plan.devices_per_worker} {plan.kind}(s) and {plan.cpus_per_worker:g} CPUs each"
    )
    return [machines, Finding("train", "ok", f"by default {message}")]


def table(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines of text."""
    width = max(len(finding.what) for finding in findings)
    return [f"{finding.state:8}{finding.what:{width}}  {finding.message}" for finding in findings]


def extras_of(requirements: Sequence[str]) -> dict[str, list[str]]:
    """The requirements of each extra but `test`, of a distribution's `requires`."""
    from packaging.requirements import Requirement

    by_extra: dict[str, list[str]] = {}
    for text in requirements:
        requirement = Requirement(text)
        named = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker))
        if named and named[1] != "test":
            own = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            by_extra.setdefault(named[1], []).append(requirement.name + own)
    return by_extra


def _environment() -> list[Finding]:
    from packaging.specifiers import SpecifierSet

    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    fix = "" if fits else "; TensorFlow has no wheels for it: use Python 3.11, 3.12 or 3.13"
    findings = [Finding("Python", "ok" if fits else "missing", f"{version}{fix}")]
    declared = versions.declared()
    shown = ("tensorflow", "keras", "ray", "optuna", "pyarrow")
    for name in (*shown, *(name for name in declared if name not in shown)):
        finding = _package(name, declared.get(name, SpecifierSet()))
        if name in shown or finding.state != "ok":
            findings.append(finding)
    return findings


def _package(name: str, wanted: "SpecifierSet") -> Finding:
    version, fix = versions.version_of(name), install_command()
    if version == versions.NOT_INSTALLED:
        return Finding(name, "missing", f"{version}: {fix}")
    if not wanted.contains(version, prereleases=True):
        return Finding(name, "note", f"{version}, but {wanted} is supported: {fix}")
    return Finding(name, "ok", version)


def _hardware() -> list[Finding]:
    from tfrecords_builder.common.pool import default_workers

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    findings = [
        Finding("cores", "ok", f"{default_workers()} available to this process"),
        _amount("memory", memory, LEAST_MEMORY_GIB, "training at 224 pixels needs at least 3 GiB"),
    ]
    for what, folder, least in (
        ("disk here", Path.cwd(), LEAST_DISK_GIB),
        ("temporary files", Path(tempfile.gettempdir()), 1.0),
        ("shared memory", Path("/dev/shm"), LEAST_SHARED_GIB),  # noqa: S108 - where Ray puts its object store
    ):
        if not folder.is_dir():
            continue
        free = shutil.disk_usage(folder).free / GIB
        why = "Ray's object store will use the disk" if what == "shared memory" else "builds and runs may not fit"
        findings.append(_amount(f"{what}, free", free, least, f"{folder}: {why}"))
    return findings


def _amount(what: str, amount: float, least: float, why: str) -> Finding:
    enough = amount >= least
    return Finding(what, "ok" if enough else "note", f"{amount:.1f} GiB" + ("" if enough else f"; {why}"))


def _devices() -> list[Finding]:
    if importlib.util.find_spec("tensorflow") is None:
        return []
    from cxr_dist.config.schema import Config
    from cxr_dist.distributed.devices import prepare_devices
    from cxr_dist.distributed.precision import resolve_precision, resolve_xla

    topology = prepare_devices(None)
    present = gpu_support.present_gpus() if topology.kind == "CPU" else 0
    if present:
        findings = [Finding("devices", "missing", why_no_gpu(gpu_support.this_build(), present, os.environ))]
    else:
        findings = [
            Finding("devices", "ok", ", ".join(topology.devices)),
            *gpus(gpu_support.this_build(), gpu_support.visible_gpus()),
        ]
    precision = resolve_precision("auto", topology.kind)
    xla = "on" if resolve_xla(Config()) else "off"
    return [*findings, Finding("auto", "ok", f"precision {precision}, xla {xla}")]


def why_no_gpu(build: Build, present: int, environment: Mapping[str, str]) -> str:
    """Why TensorFlow lists none of the `present` GPUs, and what to do."""
    said = "TensorFlow does not find the NVIDIA GPUs: "
    hides = "CUDA_VISIBLE_DEVICES"
    if environment.get(hides, "0").strip() in ("", "-1"):
        return f"{said}{hides}={environment[hides]} hides them; unset it"
    if not build.cuda:
        return f"{said}this build of it is for CPUs alone; {install_command('gpu')}"
    missing = gpu_support.not_loading(gpu_support.libraries(build, present), gpu_support.wheel_folders())
    if not missing:
        return f"{said}all its libraries load; check with nvidia-smi that the driver supports CUDA {build.cuda}"
    fixes = ["install NVIDIA's driver, and make it visible in a container"] if DRIVER in missing else []
    fixes += [install_command("gpu")] if missing != [DRIVER] else []
    return f"{said}{', '.join(missing)} cannot be loaded; {'; '.join(fixes)}"


def gpus(build: Build, cards: Sequence[Gpu]) -> list[Finding]:
    """What of each kind of card TensorFlow has code for, and whether several of them can exchange gradients."""
    findings = []
    for card in dict.fromkeys(cards):
        state, message = _code(build, card.capability)
        version = ".".join(map(str, card.capability))
        findings.append(Finding("GPU code", state, f"{card.name}, compute capability {version}: {message}"))
    if len(cards) > 1 and (missing := gpu_support.not_loading([NCCL], gpu_support.wheel_folders())):
        fix = f"{missing[0]} cannot be loaded, and several GPUs need it: {install_command('gpu')}"
        findings.append(Finding("NCCL", "missing", fix))
    return findings


def _code(build: Build, capability: Capability) -> tuple[State, str]:
    code = gpu_support.code_for(capability, build.code)
    if code == "native":
        return "ok", "native code"
    if code == "PTX":
        return "note", "PTX only: first start compiles for minutes, and may fail; a newer TensorFlow may be native"
    message = f"none, only for {', '.join(build.code)}: use a newer TensorFlow; a card older than these cannot be used"
    return "missing", message


def _extras() -> list[Finding]:
    findings = []
    for extra, packages in sorted(extras_of(_requirements()).items()):
        absent = [package for package in packages if not _is_installed(package)]
        fix = f"optional, without {', '.join(absent)}: {install_command(extra)}"
        findings.append(Finding(f"extra {extra}", "note" if absent else "ok", fix if absent else "installed"))
    return findings


def _requirements() -> list[str]:
    import importlib.metadata

    return importlib.metadata.distribution(versions.DISTRIBUTION).requires or []


_BROUGHT: dict[str, Callable[[], bool]] = {
    "tensorflow[and-cuda]": lambda: importlib.util.find_spec("nvidia") is not None,
    "ray[serve]": lambda: importlib.util.find_spec("fastapi") is not None,
}
"""How to tell that a package was installed with its own extra."""


def _is_installed(package: str) -> bool:
    if package in _BROUGHT:
        return _BROUGHT[package]()
    import importlib.metadata

    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
