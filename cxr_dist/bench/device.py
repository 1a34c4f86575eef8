"""Every figure that decides how a device is used, the most valuable first, within a time limit.

Each step is measured in a process of its own, which is ended when the time is up. What is measured is written to a file
of JSON lines at once, so that an interrupted benchmark keeps it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist.bench import device_steps
from cxr_dist.bench.device_steps import Figures, Request
from cxr_dist.config.loading import load_config, resolve_preset
from tfrecords_builder.common.errors import UserError

FORWARD_FLOP = 8.2e9
"""Of ResNet50 for an image of 224 x 224 pixels (He et al., 4.1e9 multiply-adds). Training takes three times that."""
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12}
"""Dense, in bfloat16, or float16 where there is none, by the vendor's data sheets; of the SXM part."""


@dataclass(frozen=True)
class Step:
    """One row of the table."""

    title: str
    name: str
    """A key of `device_steps.STEPS`."""
    batch_size: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is measured, and on what."""

    dataset: Path
    work: Path
    """A folder for runs."""
    batch_sizes: Sequence[int]
    epochs: int
    overrides: Sequence[str] = ()
    """Of every configuration."""
    source: Path | None = None
    """Labelled X-rays for the recipes, which need `weights` too."""
    weights: Path | None = None

    def steps(self) -> list[Step]:
        """In the order of their value."""
        batch, *others = self.batch_sizes
        recipes = bool(self.source and self.weights)
        as_keras, on_host = "model.fused_batch_norm=off", "input.device_memory_gb=0"
        return [
            Step("device", "describe", batch),
            Step("whole network", "whole_network", batch),
            *([Step("published recipe", "published", 32)] if recipes else []),
            Step("upper 100 layers, cached activations", "upper_layers_cached", batch),
            Step("features, then head", "head", batch),
            Step("features, then head, XLA", "head", 8 * batch, ("xla=on",)),
            Step("two logical devices", "two_devices", batch),
            Step("whole network, XLA", "whole_network", batch, ("xla=on",)),
            Step("whole network, batches from the host", "whole_network", batch, (on_host,)),
            Step("whole network, BatchNorm of Keras", "whole_network", batch, (as_keras,)),
            Step("upper 100 layers", "upper_layers", batch),
            Step("frozen base", "frozen_base", batch),
            Step("input alone", "input_alone", batch),
            *(Step("whole network", "whole_network", other) for other in others),
            *(Step("whole network, XLA", "whole_network", other, ("xla=on",)) for other in others),
            *([Step("adamw recipe", "adamw", 32)] if recipes else []),
        ]


def check(
    only: Collection[str] | None, overrides: Sequence[str], source: Path | None, weights: Path | None, results: Path
) -> None:
    """Refuse, before the first step, what would make each of them fail or leave some out.

    Raises:
        UserError: there is no such step, key or folder, or one of the X-rays and the weights is missing.
    """
    for name in only or ():
        if name not in device_steps.STEPS:
            raise UserError(f"--only {name}: is no step; steps are {', '.join(device_steps.STEPS)}")
    if (source is None) != (weights is None):
        raise UserError(
            f"{'--xrays' if source else '--weights'}: whole recipes need both --xrays and --weights; give both"
        )
    for option, path in (("--xrays", source), ("--weights", weights), ("--out", results.absolute().parent)):
        if path is not None and not path.exists():
            raise UserError(f"{option} {path}: there is no such file or folder; give another path")
    if source is None and (recipes := {"published", "adamw"} & set(only or ())):
        raise UserError(f"--only {min(recipes)}: needs X-rays and weights; give --xrays and --weights")
    load_config(resolve_preset(Path("published")), list(overrides))


def measure(
    plan: Plan, only: Collection[str] | None, deadline: float, results: Path, show: Callable[[str], None]
) -> list[Figures]:
    """Take the plan's steps until `deadline`, of `time.monotonic`.

    Args:
        only: Names of the steps to take; None for all.
        results: Gets a JSON line for each step.
        show: Gets a line for people for each step.

    Returns:
        A row for each step that was begun.
    """
    rows: list[Figures] = []
    show(HEADER)
    for number, step in enumerate(step for step in plan.steps() if only is None or step.name in only):
        if time.monotonic() >= deadline:
            show(f"time is up before: {step.title}, batch {step.batch_size}")
            break
        started = time.monotonic()
        figures = _measured(plan, step, number, deadline)
        row = {"step": step.title, "batch_size": step.batch_size, "overrides": list(step.overrides)} | figures
        rows.append(row | {"seconds": round(time.monotonic() - started, 1)})
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        show(line(rows[-1], rows[0].get("device", "")))
    return rows


def _measured(plan: Plan, step: Step, number: int, deadline: float) -> Figures:
    """The step's figures, or why there are none as `failed`."""
    folder = plan.work / f"step-{number}"
    folder.mkdir(parents=True)
    request = Request(
        step.name,
        str(plan.dataset),
        str(folder),
        step.batch_size,
        plan.epochs,
        (*step.overrides, *plan.overrides),
        None if plan.source is None else str(plan.source),
        None if plan.weights is None else str(plan.weights),
    )
    asked, answer, log = folder / "request.json", folder / "answer.json", folder / "log.txt"
    device_steps.save(request, asked)
    command = [sys.executable, "-m", "cxr_dist.bench.device_steps", str(asked), str(answer)]
    # This Python, and files that this function has written; a group of its own, as a step starts commands.
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True) as process,  # noqa: S603
    ):
        try:
            status = process.wait(max(deadline - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            return {"failed": "the time was up"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if status:
        return {"failed": f"exit status {status}: {_last_line(log)}"}
    figures: Figures = json.loads(answer.read_text(encoding="utf-8"))
    return figures


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


HEADER = f"{'step':40} batch  images/s  bare step  ratio  wait %  peak %  compile s  memory GB"


def line(row: Figures, device: str) -> str:
    """A row of the table."""
    if "failed" in row:
        return f"{row['step']:40} {row['batch_size']:5}  not measured: {row['failed']}"
    if row["step"] == "device":
        hidden = ("step", "batch_size", "overrides", "seconds")
        return ", ".join(f"{name} {value}" for name, value in row.items() if name not in hidden)
    start = f"{row['step']:40} {row['batch_size']:5}"
    if "largest_difference" in row:
        return f"{start}  largest difference of an epoch's loss: {row['largest_difference']:.1e}"
    if "accuracy" in row:
        low, high = row["interval"]
        seconds = f"{row['total_seconds']:.0f} s in all, {row['best_seconds']:.0f} s to the best epoch"
        return f"{start}  {seconds}, test accuracy {row['accuracy']:.4f} [{low:.3f}, {high:.3f}]"
    share = share_of_peak(row["images_per_second"], device) if row["step"].startswith("whole network") else None
    cells: list[tuple[Any, str]] = [
        (row["images_per_second"], "9,.0f"),
        (row.get("bare"), "10,.0f"),
        (row.get("ratio"), "6.3f"),
        (row["input_wait"] * 100 if "input_wait" in row else None, "7.1f"),
        (None if share is None else share * 100, "7.1f"),
        (row.get("compile_seconds"), "10.1f"),
        (row.get("memory_gb"), "10.1f"),
    ]
    shown = " ".join(
        " " * int(re.split("[,.]", form)[0]) if value is None else format(value, form) for value, form in cells
    )
    features = f"  ({row['features_per_second']:,.0f} features/s)" if "features_per_second" in row else ""
    return f"{start} {shown}{features}".rstrip()


def share_of_peak(images_per_second: float, device: str) -> float | None:
    """Of the device's peak, for training the whole network on images of 224 pixels; None where it is not known."""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in device), None)
    return None if peak is None else images_per_second * 3 * FORWARD_FLOP / peak
