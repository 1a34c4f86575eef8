"""Training in this process, with no Ray at all: the single-node fallback."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import Topology
from cxr_dist.runs.events import Reporter, Reporters, closing
from cxr_dist.runs.loggers import run_reporters
from cxr_dist.runs.run_folder import OpenDataset
from cxr_dist.runs.stop_request import stopped_by_sigterm


@dataclass(frozen=True)
class LocalWorker:
    """This process and its devices."""

    config: Config
    dataset: OpenDataset
    topology: Topology

    @property
    def replicas(self) -> int:
        return self.topology.replicas

    def train(self, run: Path, reporter: Reporter) -> dict[str, Any]:
        """Train in the opened folder `run`; result.json."""
        from cxr_dist.training.loop import train

        reporters = Reporters([reporter, *run_reporters(run, run.name)])
        with stopped_by_sigterm(run), closing(reporters):
            folder, manifest = self.dataset.folder, self.dataset.manifest
            return train(self.config, folder, manifest, run, self.topology, reporters, "local")
