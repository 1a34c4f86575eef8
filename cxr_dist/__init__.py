"""Distributed, high-throughput training and evaluation of chest X-ray classifiers.

The Python interface is what `__all__` names; `cxr_dist.api` describes it. Importing this package changes nothing and
loads neither TensorFlow nor Ray. TensorFlow's variables are set when work begins (`devices.prepare_environment`). Who
imports TensorFlow before that should set ``TF_ENABLE_ONEDNN_OPTS=1`` first: without it results differ in their last
digits from those of the command line. Whatever computes on a CPU also has glibc keep freed memory for the whole process
(`devices.keep_freed_memory`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cxr_dist.api import (
        Classifier,
        Comparison,
        Dataset,
        Evaluation,
        Run,
        Search,
        UserError,
        build,
        compare,
        evaluate,
        load,
        load_config,
        train,
        tune,
    )

    __version__: str
else:

    def __getattr__(name: str) -> object:
        """The names of `__all__`, when they are first needed."""
        if name == "__version__":
            from cxr_dist.runs.versions import DISTRIBUTION, version_of

            return version_of(DISTRIBUTION)
        if name in __all__:
            from cxr_dist import api

            return getattr(api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Classifier",
    "Comparison",
    "Dataset",
    "Evaluation",
    "Run",
    "Search",
    "UserError",
    "__version__",
    "build",
    "compare",
    "evaluate",
    "load",
    "load_config",
    "train",
    "tune",
]
