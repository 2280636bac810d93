"""What TensorBoard reads."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary


class EventFile:
    """A file of events in `folder`; TensorBoard forgets what older ones say of `step` and later.

    Each event is on disk when its method returns. The writer that comes with torch leaves them to a thread:
    a full disk then ends that thread, and the training may not be told.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._file = (folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}").open("xb")
        self._records, self.close = RecordWriter(self._file), self._file.close
        self._add(step=step, file_version="brain.Event:2")
        self._add(step=step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a number."""
        self._add(step=step, summary=summary.scalar(name, value))

    def add_image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Adds a picture of uint8 [H, W, 3]."""
        self._add(step=step, summary=summary.image(name, picture, dataformats="HWC"))

    def _add(self, **values: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **values).SerializeToString())
        self._file.flush()
