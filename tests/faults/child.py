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

    def close(self, state: str) -> None:
        """Nothing is open."""


def main() -> None:
    from cxr_dist.config.loading import load_config
    from cxr_dist.launch import train
    from cxr_dist.runs import run_folder
    from cxr_dist.runs.checkpoint_file import save_arrays
    from cxr_dist.runs.checkpoints import CheckpointFolder
    from tests.conftest import use_small_base

    dataset, run, *overrides = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patch:
        use_small_base(patch)
        patch.setattr(train, "ConsoleReporter", Lines)
        remove = train.remove_checkpoints

        def copy_and_remove(run: Path) -> None:
            """The last checkpoint says more than the model: optimizer and loss scale too."""
            print("finished None None None", flush=True)
            found = CheckpointFolder(run / run_folder.CHECKPOINTS).newest(print)
            if found is not None:
                save_arrays(run.parent / "last.safetensors", found.arrays, {})
            print("copied None None None", flush=True)
            remove(run)

        patch.setattr(train, "remove_checkpoints", copy_and_remove)
        train.run_training(load_config(None, overrides), Path(dataset), Path(run), launcher="local")


if __name__ == "__main__":
    main()
