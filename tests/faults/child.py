"""A training run of the small network in a process of its own, to be killed. Says a line at everything that happens.

python -m tests.faults.child DATASET RUN KEY=VALUE...
"""

import sys
from pathlib import Path

import pytest


class Lines:
    """A line for each event: what the killer counts."""

    def emit(self, event: dict[str, object]) -> None:
        print(event["kind"], event.get("stage"), event.get("epoch"), event.get("step"), flush=True)


def main() -> None:
    from cxr_dist import commands
    from cxr_dist.config import load_config
    from tests.conftest import use_small_base

    dataset, run, *overrides = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patch:
        use_small_base(patch)
        patch.setattr(commands, "ConsoleReporter", Lines)
        commands.run_training(load_config(None, overrides), Path(dataset), Path(run), launcher="local")


if __name__ == "__main__":
    main()
