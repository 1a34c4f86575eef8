"""What TensorBoard's HParams page shows of a trial: what it set, and how it ended.

The search's process writes both, as a trial's process may be killed at any time. Without TensorFlow, which takes
seconds to start.
"""

import time
from pathlib import Path
from typing import Any, Literal

from cxr_dist.tuning.search_space import Values

Status = Literal["success", "failure"]


def write_start(folder: Path, name: str, values: Values) -> None:
    """Write to a trial's folder of events what the trial sets, unless an earlier attempt did."""
    from tensorboard.plugins.hparams import summary_v2

    if not any(folder.glob("*tfevents*")):
        _write(folder, "0.start", summary_v2.hparams_pb(dict(values), trial_id=name))


def write_end(folder: Path, status: Status) -> None:
    """Write how the trial ended, once: TensorBoard reads the first of several."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    if any(folder.glob("*tfevents*.end")):
        return
    value = api_pb2.STATUS_SUCCESS if status == "success" else api_pb2.STATUS_FAILURE
    ended = plugin_data_pb2.SessionEndInfo(status=value, end_time_secs=time.time())
    described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=ended))
    summary = Summary()
    summary.value.add(tag=metadata.SESSION_END_INFO_TAG, metadata=described, tensor=metadata.NULL_TENSOR)
    _write(folder, "zzz.end", summary)


def _write(folder: Path, suffix: str, summary: Any) -> None:
    """Put a summary into an event file of its own; files of a folder are read in the order of their names."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    with (folder / f"events.out.tfevents.{int(now):010d}.{suffix}").open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        records.write(Event(wall_time=now, summary=summary).SerializeToString())
