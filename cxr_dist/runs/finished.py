"""A finished run: what is needed to use its network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config
from cxr_dist.runs import run_folder
from cxr_dist.runs.checkpoints import CheckpointFolder
from tfrecords_builder.common.errors import UserError


@dataclass(frozen=True)
class FinishedRun:
    """What a run's folder says of a model that is whole."""

    folder: Path
    config: Config
    info: run_folder.RunInfo
    result: dict[str, Any]


def read_finished(run: Path) -> FinishedRun:
    """The run in a folder; reads no weights.

    Raises:
        UserError: the folder is that of no run, or of one that has not ended.
    """
    info, config, result = run_folder.read_info(run), run_folder.read_config(run), run_folder.read_result(run)
    if result is None or weights_file(run) is None:
        raise UserError(f"{run}: the run is not finished; resume it with cxr-dist train")
    return FinishedRun(run, config, info, result)


def weights_file(run: Path) -> Path | None:
    """`resnet.keras`, or the best weights of a trial whose model was removed (`search.keep`); None where neither is."""
    model = run / run_folder.MODEL
    return model if model.is_file() else CheckpointFolder(run / run_folder.CHECKPOINTS).newest_best()
