"""What a run and a search tell Ray's metrics, which Prometheus scrapes: there, each name begins with `ray_`."""

from collections.abc import Mapping
from typing import Any

from cxr_dist.runs.events import Event, Reporter
from cxr_dist.tuning.search import Search

RUN_TAGS = ("run", "stage")
TRIAL_STATES = ("waiting", "running", "complete", "stopped", "failed")


class RayMetrics(Reporter):
    """Listens to a run in a process of the cluster, and sets its gauges."""

    def __init__(self, run: str, global_batch_size: int) -> None:
        from ray.util.metrics import Gauge

        def gauge(name: str, description: str) -> Any:
            return Gauge(f"cxr_dist_{name}", description=description, tag_keys=RUN_TAGS)

        self._run, self._batch = run, global_batch_size
        self._rate = gauge("images_per_second", "Training images per second, over all workers")
        self._step = gauge("step_seconds", "Seconds of a training step")
        self._loss = gauge("loss", "Mean training loss of the last epoch")
        self._accuracy = gauge("validation_accuracy", "Accuracy on the validation split after the last epoch")
        self._wait = gauge("input_wait_share", "Share of the last epoch's steps that waited for input")

    def emit(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "progress":
            self._set_rate(event["images_per_second"], event["stage"])
        elif kind == "epoch":
            row = event["row"]
            tags = self._tags(row["stage"])
            self._set_rate(row["images_per_second"], row["stage"])
            self._loss.set(row["loss"], tags)
            self._accuracy.set(row["val_accuracy"], tags)
            if row["input_wait"] is not None:  # not measured by a deterministic run
                self._wait.set(row["input_wait"], tags)

    def _set_rate(self, images_per_second: float, stage: int) -> None:
        if images_per_second > 0:
            self._rate.set(images_per_second, self._tags(stage))
            self._step.set(self._batch / images_per_second, self._tags(stage))

    def _tags(self, stage: int) -> dict[str, str]:
        return {"run": self._run, "stage": str(stage)}


def show_trial_counts(search: Search) -> None:
    """Keep a gauge of a search's trials by state, from now on."""
    from ray.util.metrics import Gauge

    gauge = Gauge("cxr_dist_trials", description="Trials by state", tag_keys=("experiment", "state"))

    def show(counts: Mapping[str, int]) -> None:
        for state in TRIAL_STATES:
            gauge.set(counts.get(state, 0), {"experiment": search.experiment.folder.name, "state": state})

    search.observe(show)
