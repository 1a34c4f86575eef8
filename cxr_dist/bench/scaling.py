"""How training grows with workers: measured on this machine, fitted, and predicted for a cluster that a file describes.

Each point is a run of `cxr-dist train` through Ray Train on drawn X-rays, with every forward pass computed. Workers of
one machine without GPUs share its cores, so more of them are not faster: what is measured is what they lose to one
another and to the all-reduce between processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cxr_dist.bench import common
from cxr_dist.bench.cost_model import Cluster, CostModel, Measured, Prediction, fit, held_out_errors, predict

_EPOCHS = 3
"""Of each stage; the first compiles, and is not counted."""


@dataclass(frozen=True)
class Fitted:
    """The cost model of a stage."""

    stage: int
    model: CostModel
    held_out_errors: Sequence[float]
    """At each measured point, by how much the model is off that the other points give, as a share."""


def measure(
    dataset: Path, arguments: Sequence[str], workers: Sequence[int], batch_sizes: Sequence[int], folder: Path
) -> list[Measured]:
    """Train both stages for every number of workers and size of global batch.

    Args:
        dataset: Holds a few batches of the largest size.
        arguments: Of `cxr-dist train`: the configuration.
        workers: Numbers of Ray workers.
        batch_sizes: Images, over all workers.
        folder: Empty; takes the runs.
    """
    measured = []
    for count in workers:
        for batch_size in batch_sizes:
            run = folder / f"{count}-workers-{batch_size}"
            settings = [f"global_batch_size={batch_size}", "features.cache=off"]
            settings += [f"stages.{stage}.epochs={_EPOCHS}" for stage in (1, 2)]
            measured += stages_of(
                common.train(dataset, run, [*arguments, "--workers", str(count)], settings), batch_size
            )
    return measured


def fit_stages(measured: Sequence[Measured]) -> list[Fitted]:
    """A cost model for each stage."""
    fitted = []
    for stage in sorted({row.stage for row in measured}):
        rows = [row for row in measured if row.stage == stage]
        # Of two points, one says nothing of the other.
        fitted.append(Fitted(stage, fit(rows), held_out_errors(rows) if len(rows) > 2 else []))
    return fitted


def predict_stages(
    fitted: Sequence[Fitted], cluster: Cluster, images: int, bytes_per_image: int
) -> list[tuple[int, Prediction]]:
    """An epoch of each stage on one machine, two, four, and so on up to all of the cluster's."""
    powers = [1 << power for power in range(cluster.machines.bit_length())]
    return [
        (row.stage, predict(row.model, cluster, machines, images, bytes_per_image))
        for row in fitted
        for machines in sorted({*powers, cluster.machines})
    ]


def table(measured: Sequence[Measured], fitted: Sequence[Fitted]) -> list[str]:
    """Lines for people: the points and the models."""
    lines = ["stage  workers  global batch  images/s"]
    lines += [
        f"{row.stage:5} {row.workers:8} {row.global_batch_size:13} {row.images_per_second:9.2f}" for row in measured
    ]
    for row in fitted:
        model = row.model
        bandwidth = f"{1e-6 / model.seconds_per_byte:,.0f} MB/s" if model.seconds_per_byte else "no measurable cost"
        lines.append(
            f"stage {row.stage}: {model.fixed_seconds * 1e3:.0f} ms per step, {model.seconds_per_image * 1e3:.1f} ms "
            f"per image, all-reduce of {model.gradient_bytes / 1e6:.1f} MB at {bandwidth}"
        )
        if row.held_out_errors:
            lines.append(f"  largest error at a held-out point: {max(map(abs, row.held_out_errors)):.0%}")
    return lines


def prediction_table(cluster: Cluster, images: int, predicted: Sequence[tuple[int, Prediction]]) -> list[str]:
    """Lines for people: an epoch of `images` images on the cluster."""
    return [
        f"{cluster.name}, prediction for an epoch of {images:,} images:",
        "stage  machines  replicas   images/s  hours    cost  limited by",
        *(
            f"{stage:5} {row.machines:9} {row.replicas:9} {row.images_per_second:10,.0f} {row.hours:6.2f} "
            f"{row.cost:7.2f}  {row.limit}"
            for stage, row in predicted
        ),
    ]


def stages_of(run: common.Trained, batch_size: int) -> list[Measured]:
    """The stages of a run, each at the median speed of its epochs but the first."""
    measured = []
    for stage in sorted({row["stage"] for row in run.history}):
        rows = [row for row in run.history if row["stage"] == stage]
        rate = median(row["images_per_second"] for row in rows[1:])
        parameters = rows[0]["trainable_parameters"]
        measured.append(Measured(stage, run.result["workers"], batch_size, rate, parameters, run.result["device"]))
    return measured
