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
    """A file of events, each on disk when its method returns.

    The writer that comes with torch leaves them to a thread, which can tell nobody that the disk is full.

    Args:
        folder: where the file is made.
        step: from which on TensorBoard is to forget what older files in the folder say.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._file = (folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}").open("xb")
        self._records = RecordWriter(self._file)
        self._add(step=step, file_version="brain.Event:2")
        self._add(step=step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a number."""
        self._add(step=step, summary=summary.scalar(name, value))

    def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str = "CHW") -> None:
        """Adds a picture of uint8."""
        self._add(step=step, summary=summary.image(name, picture, dataformats=dataformats))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, **values: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **values).SerializeToString())
        self._file.flush()
