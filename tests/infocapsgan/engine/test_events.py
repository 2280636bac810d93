import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infocapsgan.engine.events import EventFile


def test_tensorboard_reads_numbers_and_pictures(tmp_path):
    events = EventFile(tmp_path, 1)
    events.add_scalar("train/loss", 0.25, 1)
    events.add_image("samples", np.full((4, 6, 3), 200, np.uint8), 1)
    read = EventAccumulator(str(tmp_path)).Reload()  # before the file is closed
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 0.25)]
    (picture,) = read.Images("samples")
    assert (picture.width, picture.height) == (6, 4)
    events.close()


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    for begin, steps, value in ((1, (1, 2, 3), 1.0), (3, (3, 4), 2.0)):
        events = EventFile(tmp_path, begin)
        for step in steps:
            events.add_scalar("loss", value, step)
        events.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_full_disk_is_noticed_at_once(tmp_path):
    events = EventFile(tmp_path, 1)
    events._records._writer = events._file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        events.add_scalar("loss", 1.0, 1)
