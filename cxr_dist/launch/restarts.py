"""How a run through Ray resumes after a launch of its workers has ended early. Pure: errors and times in, plans out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cxr_dist.launch.placement import WorkerPlan
from cxr_dist.runs.events import Event
from cxr_dist.runs.interrupt import RESUME
from cxr_dist.runs.stop_request import RegroupedError
from tfrecords_builder.common.errors import UserError

MAX_LOSSES = 3
"""In a row, without a checkpoint between them."""
REPLACEMENT_LIMIT_S = 120.0
"""For a cluster to have room again for the least number of workers."""


class LostWorkersError(Exception):
    """Worker processes or their machines are gone, and what they computed since the newest checkpoint with them."""


class UnplacedError(UserError):
    """The cluster has the workers' places, but did not give them in time."""


@dataclass(frozen=True)
class Restart:
    """The next launch."""

    event: Event | None
    """For the reporter."""
    plan: WorkerPlan | None
    """None: the plan that the cluster has room for by the deadline."""
    deadline: float = 0.0
    """In the clock of `now`."""


class RestartPolicy:
    """Decides after each launch that ended early whether and with which workers the run resumes."""

    def __init__(self, run: Path, *, may_grow: bool) -> None:
        self._run, self.may_grow = run, may_grow
        self._losses = 0
        self._deadline = -math.inf
        self._before_growth: WorkerPlan | None = None

    def after(
        self, error: Exception, plan: WorkerPlan, *, has_progressed: bool, reasons: Sequence[str], now: float
    ) -> Restart:
        """The next launch.

        Args:
            error: With which the launch ended.
            plan: Of that launch.
            has_progressed: Whether it left a new checkpoint.
            reasons: What the workers said of their end.
            now: Seconds, of a monotonic clock.

        Raises:
            UserError: Workers were lost too often.
            Exception: `error`, where there is no way to resume.
        """
        if isinstance(error, RegroupedError):
            self._losses, self._before_growth = 0, plan
            return Restart({"kind": "message", "text": "machines have joined"}, None, now + REPLACEMENT_LIMIT_S)
        if isinstance(error, LostWorkersError):
            self._losses = 1 if has_progressed else self._losses + 1
            what = "; ".join([str(error), *reasons])
            if self._losses > MAX_LOSSES:
                raise UserError(
                    f"{self._run}: workers were lost {self._losses} times with no checkpoint between ({what}); look at "
                    f"the machines, and {RESUME}"
                ) from None
            self._deadline = now + REPLACEMENT_LIMIT_S
            return Restart({"kind": "warning", "text": f"workers were lost ({what})"}, None, self._deadline)
        if isinstance(error, UnplacedError) and self._before_growth is not None:
            # The plan counted all that the cluster has, and the machines that joined may do other work by now.
            smaller, self._before_growth, self.may_grow = self._before_growth, None, False
            return Restart({"kind": "warning", "text": "no room for more workers"}, smaller)
        # For a while, a cluster counts a host that it has lost among those it has.
        if isinstance(error, UnplacedError) and now <= self._deadline:
            return Restart(None, None, self._deadline)
        raise error
