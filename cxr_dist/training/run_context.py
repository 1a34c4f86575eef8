"""What a run builds once: strategy, model, sources, the order of batches."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config, StageConfig
from cxr_dist.data import pipeline
from cxr_dist.data.arrays import Source
from cxr_dist.data.batch_sampler import EvaluationBatchSampler, TrainBatchSampler
from cxr_dist.data.shards import ShardSource
from cxr_dist.distributed.devices import Topology
from cxr_dist.distributed.precision import dtype_policy, resolve_precision, resolve_xla
from cxr_dist.distributed.strategy import make_strategy
from cxr_dist.features import cache
from cxr_dist.features.stage_inputs import StageInputs
from cxr_dist.features.store import FeatureStore
from cxr_dist.model.resnet import build_model
from cxr_dist.runs import corrupt_records, run_folder
from cxr_dist.runs.events import Reporter
from cxr_dist.training.progress import Progress
from tfrecords_builder.format.manifest import Manifest


class RunContext:
    """What every stage of one run shares."""

    def __init__(
        self,
        config: Config,
        dataset: Path,
        manifest: Manifest,
        run: Path,
        topology: Topology,
        reporter: Reporter,
    ) -> None:
        import tensorflow as tf

        self.started = self._counted = time.perf_counter()
        self.config, self.run, self.topology, self.reporter = config, run, topology, reporter
        self.precision = resolve_precision(config.precision, topology.kind)
        self.xla = resolve_xla(config)
        self.classes = len(manifest.class_names)
        self.left_out = corrupt_records.load_excluded(run)
        self._content = self.left_out.fingerprint(manifest.fingerprint)
        self.train_source = ShardSource(dataset, manifest, "train", self.left_out.paths)
        self.validation_source = ShardSource(dataset, manifest, "validation", self.left_out.paths)
        self.plan = TrainBatchSampler(
            self.train_source.count,
            config.global_batch_size,
            topology.replicas,
            config.seed,
            accumulation_steps=config.accumulation_steps,
        )
        if config.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.strategy = make_strategy(topology, config.all_reduce)
        with self.strategy.scope():
            policy = dtype_policy(self.precision)
            self.model = build_model(self.classes, manifest.image_size, config, policy, seed=config.seed)
        self.store = FeatureStore(run_folder.feature_cache(config, run), int(config.features.limit_gb * 1e9))
        self._iterators: list[Any] = []
        self._said_waiting = False
        self.steps_computed = 0
        """By this process."""
        self.heartbeat: Callable[[str], None] = lambda _doing: None
        """Called with what the process does, wherever there is progress."""

    def batches(self, source: Source, plan: TrainBatchSampler | EvaluationBatchSampler, start_step: int = 0) -> Any:
        """An endless iterator, kept until the run ends: making and destroying one costs seconds."""
        iterator = pipeline.distributed_batches(self.strategy, self.topology, source, plan, start_step)
        self._iterators.append(iterator)
        return iterator

    def stage_inputs(self, progress: Progress) -> StageInputs:
        """Where the stages of a run that stands at `progress` find their inputs."""

        def report(done: int, total: int, images_per_second: float) -> None:
            self.heartbeat(f"the features, image {done}")
            self.reporter.emit(
                {"kind": "progress", "stage": progress.stage, "epoch": "features", "step": done, "steps": total}
                | {"images_per_second": images_per_second}
            )

        frozen = cache.FrozenFeatures(
            self.config,
            self.strategy,
            self.topology,
            self.store,
            precision=self.precision,
            xla=self.xla,
            progress=report,
            waiting=self._wait_for_features,
        )
        return StageInputs(
            self.config,
            self.model,
            frozen,
            cache.SplitImages(self._content, "train", self.train_source),
            cache.SplitImages(self._content, "validation", self.validation_source),
            announce=self._announce,
            timed=progress.timed,
            decided=progress.reads_cache,
        )

    def count_time(self, progress: Progress) -> None:
        """Add what has passed since the last call to the total, so that the total survives an interruption."""
        now = time.perf_counter()
        progress.add_seconds("total", now - self._counted)
        self._counted = now

    def warn(self, text: str) -> None:
        self.reporter.emit({"kind": "warning", "text": text})

    def raise_reading_failure(self, error: Exception) -> None:
        """Raise what a reading thread met, of which TensorFlow's `error` has only the text."""
        for source in (self.train_source, self.validation_source):
            if source.failure is not None:
                raise source.failure from error

    def _wait_for_features(self) -> None:
        self.heartbeat("features that another run computes")
        if not self._said_waiting:
            self._said_waiting = True
            self.warn("another run is computing the same features; waiting for them")

    def _announce(self, number: int, stage: StageConfig, source: str) -> None:
        what = f"head and upper {stage.unfreeze_layers} layers" if stage.unfreeze_layers else "head"
        text = (
            f"stage {number}: {what}, {stage.epochs} epochs of {self.plan.steps_per_epoch} steps, batch "
            f"{self.config.global_batch_size}, from {source} "
            f"[{self.topology.replicas} x {self.topology.kind}, {self.precision}{', XLA' if self.xla else ''}]"
        )
        self.reporter.emit(
            {"kind": "stage", "stage": number, "epochs": stage.epochs}
            | {"steps_per_epoch": self.plan.steps_per_epoch, "text": text}
        )
