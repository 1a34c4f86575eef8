"""The runtime environment of a job: the code that is packed for it, and what the user adds. No secret is part of it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cxr_dist
from cxr_dist.launch.job_plan import check_size
from cxr_dist.launch.ray_tokens import known_token
from tfrecords_builder.common.errors import UserError, one_line

_TOKEN_FILE_MAX = 1 << 16
_CHATTY = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)


def job_environment(working_dir: Path | None, extra: Path | None) -> dict[str, Any]:
    """What Ray documents as `runtime_env`; `working_dir` wins over the one in `extra`, a YAML file.

    Without either, the working_dir is the folder of the project when this package runs from a checkout. An installed
    package is taken to be installed on the cluster too.

    Raises:
        UserError: a file or folder is missing, damaged, too large for the cluster, or holds the cluster's token.
    """
    environment = _read(extra) if extra else {}
    if working_dir is not None:
        environment["working_dir"] = str(working_dir)
    if environment.get("working_dir") is None and (checkout := project_root()):
        environment["working_dir"] = str(checkout)
    folder = environment.get("working_dir")
    if folder is not None and "://" not in folder:
        _check_folder(Path(folder), environment.get("excludes") or [])
    return environment


def quiet_ray() -> None:
    """Keep Ray's remarks on packing and sending from the terminal."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def project_root() -> Path | None:
    """The folder of this project's checkout; None when the package is installed without one."""
    root = Path(cxr_dist.__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / ".rayignore").is_file() else None


def _read(path: Path) -> dict[str, Any]:
    import yaml
    from ray.runtime_env import RuntimeEnv

    if not path.is_file():
        raise UserError(f"--runtime-env {path}: no such file")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--runtime-env {path}: is not YAML ({one_line(error)})") from None
    if not isinstance(read, dict):
        raise UserError(f"--runtime-env {path}: must map keys of Ray's runtime_env to values")
    known = sorted(name for name in RuntimeEnv.known_fields if not name.startswith("_"))
    for key in read:
        if key not in known:
            raise UserError(f"--runtime-env {path}: {key}: Ray knows {', '.join(known)}")
    variables = read.get("env_vars") or {}
    if not isinstance(variables, dict) or not all(isinstance(part, str) for pair in variables.items() for part in pair):
        raise UserError(f"--runtime-env {path}: env_vars: must map names to texts; put numbers into quotes")
    if not isinstance(read.get("working_dir", ""), str):
        raise UserError(f"--runtime-env {path}: working_dir: must be a folder or an address")
    return read


def packed_files(folder: Path, excludes: Sequence[str] = ()) -> list[tuple[str, int]]:
    """The files of a working_dir that Ray packs, as (path inside it, size in bytes), by Ray's own rules."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    quiet_ray()
    files: list[tuple[str, int]] = []
    root = folder.absolute()

    def found(path: Path) -> None:
        if path.is_file():
            files.append((path.relative_to(root).as_posix(), path.stat().st_size))

    rules = [packaging._get_excludes(root, [*ray_constants.get_runtime_env_default_excludes(), *excludes])]
    follows_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    packaging._dir_travel(root, rules, found, include_gitignore=follows_gitignore)
    return files


def size_limit() -> int:
    """The bytes that a cluster takes as a package: the dashboard's limit on a request, and the head's on a message."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    return int(min(ray_constants.DASHBOARD_CLIENT_MAX_SIZE, packaging.GCS_STORAGE_MAX_SIZE))


def _check_folder(folder: Path, excludes: Sequence[str]) -> None:
    if folder.is_file() and folder.suffix in (".zip", ".gz"):
        check_size(str(folder), [(folder.name, folder.stat().st_size)], size_limit())
        return
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}: no such folder")
    files = packed_files(folder, excludes)
    check_size(str(folder), files, size_limit())
    token = known_token()
    for name, size in files if token else ():
        if size <= _TOKEN_FILE_MAX and str(token).encode() in (folder / name).read_bytes():
            raise UserError(f"--working-dir {folder}: {name} holds the cluster's token; add it to .rayignore")
