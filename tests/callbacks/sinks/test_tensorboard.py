"""The sink for TensorBoard, read back by TensorBoard's own reader and by ours."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest

import phasewatch as pw
from phasewatch.callbacks.sinks.tensorboard import TensorBoardSink
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.runs.sink import send

pytest.importorskip("tensorboard")

STEPS = [1, 10, 100, 1000, 2000, 3000, 9000]
LLC = [1.0, 2.0, 20.0, 30.0, 31.0, 31.5, 31.25]
TRAJECTORY = pw.Trajectory.from_values(
    STEPS,
    loss=[3, 2.5, 2, 1.5, 1.25, 1.25, 1.125],
    llc=LLC,
    llc_error=[0.25] * 7,
    metrics={"acc": [0.5] * 7, "llc_low": [7.0] * 7},
)


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)], events.Tags()


def test_points_stand_at_their_own_steps_however_late_they_come(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for i in (3, 0, 6, 1, 2, 5, 4):
        sink.write(TRAJECTORY[i])
    sink.close()
    found, tags = scalars(tmp_path, "phase/llc")
    assert sorted(found) == list(zip(STEPS, LLC, strict=True))
    assert {"phase/loss", "phase/llc_error", "phase/llc_low", "phase/llc_high", "phase/doubtful", "phase/acc"} <= set(
        tags["scalars"]
    )
    assert scalars(tmp_path, "phase/llc_low")[0][0] == (1000, 29.5)
    assert scalars(tmp_path, "phase/metrics/llc_low")[0][0] == (1000, 7.0)


def test_what_was_written_is_read_as_the_trajectory_that_it_was(tmp_path):
    assert send(TRAJECTORY, pw.find_transitions(TRAJECTORY), TensorBoardSink(tmp_path))
    back = pw.Trajectory.read(tmp_path)
    assert back.steps.tolist() == STEPS
    for name in ("llc", "loss", "acc"):
        np.testing.assert_array_equal(back.signal(name), TRAJECTORY.signal(name))
    np.testing.assert_array_equal(back.llc_error, TRAJECTORY.llc_error)


def test_transitions_are_text(tmp_path):
    steps = np.unique(np.geomspace(1, 1e4, 60).round().astype(int))
    llc = np.interp(np.arange(len(steps)), [0, 15, 30, 60], [5, 5, 60, 60])
    trajectory = pw.Trajectory.from_values(steps, loss=5 - llc / 20, llc=llc)
    found = pw.find_transitions(trajectory)
    assert found
    send(trajectory, found, TensorBoardSink(tmp_path))
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert content.count(str(found[0]).encode()) == 2  # as it was confirmed, and among all of them at the end
    assert "phase/transitions/text_summary" in scalars(tmp_path, "phase/llc")[1]["tensors"]


def test_a_failed_estimate_has_no_value_and_a_writer_of_the_user_s_stays_open(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    failed = replace(TRAJECTORY[0], llc=replace(TRAJECTORY[0].llc, value=math.nan, health=pw.Health.DIVERGED))
    with SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        sink.write(failed)
        sink.close()
        writer.add_scalar("mine", 2.0, 7)
    found, tags = scalars(tmp_path, "mine")
    assert found == [(7, 2.0)]
    assert "phase/llc" not in tags["scalars"]
    assert "phase/doubtful" in tags["scalars"]


def test_what_it_does_not_take(monkeypatch):
    with pytest.raises(PhasewatchError, match=r"TensorBoardSink\(3\) takes a folder or a SummaryWriter"):
        TensorBoardSink(3)  # pyright: ignore[reportArgumentType]
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "tensorboard" or "torch.utils.tensorboard" in name
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(PhasewatchError, match=r"needs the package tensorboard.*'phasewatch\[tensorboard\]'"):
        TensorBoardSink("runs")
