"""The Python interface: a function for each step of the work. The command line calls the same functions.

A keyword argument is an option of the command of that name, and means what `cxr-dist COMMAND --help` says. A message
names an argument as the command line does: `--devices-per-worker` is `devices_per_worker`. A path is a text, a `Path`,
or a result that has one: `train` takes a `Dataset`, and `evaluate` a `Run` or a `Search`. Progress goes to stderr, as
bars in a terminal or a notebook; nothing is printed to stdout, and no function ends the process.

All functions raise `UserError` for what the caller can mend, in one line; `OSError` where a disk is full or cannot be
written; and `StoppedError` (`cxr_dist.runs.stop_request`) where training was asked to stop by SIGTERM.
"""

from cxr_dist.api.classifier import Classifier
from cxr_dist.api.results import Comparison, Dataset, Evaluation, Run, Search
from cxr_dist.api.steps import (
    EXAMINED,
    LAUNCHER,
    LAUNCHERS,
    SEARCH,
    LaunchKeywords,
    build,
    compare,
    evaluate,
    load,
    load_config,
    train,
    tune,
)
from tfrecords_builder.common.errors import UserError

__all__ = [
    "EXAMINED",
    "LAUNCHER",
    "LAUNCHERS",
    "SEARCH",
    "Classifier",
    "Comparison",
    "Dataset",
    "Evaluation",
    "LaunchKeywords",
    "Run",
    "Search",
    "UserError",
    "build",
    "compare",
    "evaluate",
    "load",
    "load_config",
    "train",
    "tune",
]
