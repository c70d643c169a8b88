import numpy as np
import pytest
from log_files import event_file, field, framed

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.trajectories.logs import event_files
from phasewatch.monitor.trajectories.trajectory import Trajectory

CURVE = [(10 * i, {"train/loss": 2 - i / 8, "acc": i / 8}) for i in range(9)]


def write(folder, content, name="events.out.tfevents.1700000000.host.1.0"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("new_style", [False, True])
def test_what_tensorboard_s_own_writer_wrote(tmp_path, new_style):
    writers = pytest.importorskip("torch.utils.tensorboard")
    with writers.SummaryWriter(str(tmp_path)) as writer:
        for step, scalars in CURVE:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step, new_style=new_style, double_precision=new_style and tag == "acc")
            writer.add_histogram("weights", np.arange(9.0), step)
            writer.add_text("note", "a note", step)
            writer.add_image("picture", np.zeros((3, 8, 8)), step)
    for tag in ("train/loss", "acc"):
        trajectory = Trajectory.read(tmp_path, signal=tag)
        assert trajectory.steps.tolist() == [step for step, _ in CURVE]
        np.testing.assert_array_equal(trajectory.signal(tag), [scalars[tag] for _, scalars in CURVE])
    assert set(trajectory[0].metrics) == {"train/loss", "acc"}
    with pytest.raises(PhasewatchError, match=r"no signal 'loss'; it has train/loss, acc\.|'loss'"):
        Trajectory.read(tmp_path, signal="loss")


def test_a_folder_s_files_are_one_log_in_which_the_later_value_counts(tmp_path):
    """A training that went on from step 40, from where it logs anew."""
    write(tmp_path, event_file(CURVE[:7]))
    write(
        tmp_path,
        event_file([(s, {"acc": v["acc"] + 1}) for s, v in CURVE[4:]]),
        "events.out.tfevents.1700000009.host.1.0",
    )
    (tmp_path / "hparams.yaml").write_text("a: 1")
    trajectory = Trajectory.read(tmp_path, signal="acc")
    assert trajectory.steps.tolist() == [step for step, _ in CURVE]
    np.testing.assert_array_equal(trajectory.signal("acc"), [i / 8 + (i > 3) for i in range(9)])


def test_what_is_no_number_is_left_out(tmp_path):
    path = write(
        tmp_path, event_file([(0, {"a": 1.0}), (1, {"a": float("nan")}), (2, {"a": float("inf")}), (3, {"a": 2})])
    )
    assert Trajectory.read(path, signal="a").steps.tolist() == [0, 3]


def test_a_file_that_was_cut_off_anywhere_keeps_its_whole_records(tmp_path):
    content = event_file(CURVE)

    before = 0
    for length in range(len(event_file([])), len(content), 13):
        path = write(tmp_path, content[:length])
        kept = len(Trajectory.read(path, signal="acc"))
        assert before <= kept <= len(CURVE)
        before = kept
    assert before >= len(CURVE) - 1


def test_damage_is_named_with_its_place(tmp_path):
    content = bytearray(event_file(CURVE))
    start = len(event_file(CURVE[:4]))
    content[start] ^= 8
    with pytest.raises(PhasewatchError, match=rf"is damaged at byte {start}; copy it again"):
        Trajectory.read(write(tmp_path, bytes(content)), signal="acc")
    value = bytearray(event_file(CURVE))
    value[start - 6] ^= 8  # in the last value of the record before
    with pytest.raises(PhasewatchError, match="is damaged at byte"):
        Trajectory.read(write(tmp_path, bytes(value)), signal="acc")
    hostile = event_file(CURVE[:1]) + framed(b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
    with pytest.raises(PhasewatchError, match="is damaged at byte"):
        Trajectory.read(write(tmp_path, hostile), signal="acc")


def test_large_records_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(event_files, "MOST_RECORD_BYTES", 500)
    path = write(tmp_path, event_file(CURVE[:2]) + framed(field(4, bytes(9999))) + event_file(CURVE[2:]))
    assert len(Trajectory.read(path, signal="acc")) == len(CURVE)


def test_too_many_tags_and_steps_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(event_files, "MOST_COLUMNS", 3)
    path = write(tmp_path, event_file([(i, {f"t{i}": 1}) for i in range(4)]))
    with pytest.raises(PhasewatchError, match="has 4 columns, and at most"):
        Trajectory.read(path, signal="t1")
    path = write(tmp_path, event_file([(-1, {"a": 1})]))
    with pytest.raises(PhasewatchError, match=r"column 'step', holds -1; a training step is a whole number"):
        Trajectory.read(path, signal="a")


def test_links_out_of_a_folder_are_refused(tmp_path):
    outside = write(tmp_path / "outside", event_file(CURVE))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / outside.name).symlink_to(outside)
    with pytest.raises(PhasewatchError, match="leads out of"):
        Trajectory.read(tmp_path / "logs", signal="acc")
