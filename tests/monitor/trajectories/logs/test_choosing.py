"""Folders as trainers leave them, and the log_history of a Trainer."""

import json

import pytest
from log_files import event_file, wandb_file

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.trajectories.trajectory import Trajectory

EVENTS = event_file([(i, {"loss": 9 - i}) for i in range(6)])


def state(steps):
    """What a Trainer writes beside a checkpoint: training and evaluation in entries of their own, and a last one."""
    entries = []
    for step in steps:
        entries += [
            {"epoch": step / 100, "grad_norm": 1.0, "learning_rate": 1e-4, "loss": 3 - step / 100, "step": step},
            {"epoch": step / 100, "eval_loss": 4 - step / 100, "eval_runtime": 1.5, "step": step},
        ]
    last = {"epoch": 1.0, "step": steps[-1], "total_flos": 1e15, "train_loss": 2.0, "train_runtime": 60.0}
    return json.dumps({"global_step": steps[-1], "log_history": [*entries, last], "best_metric": None, "is_x": True})


def files(folder, **contents):
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".").replace("_dash_", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_a_trainer_s_output_is_the_log_of_its_last_checkpoint(tmp_path):
    early, late = [10, 20, 30], [10, 20, 30, 40, 50, 60]
    files(tmp_path, checkpoint_dash_9__trainer_state_dot_json=state(early))
    files(tmp_path, checkpoint_dash_60__trainer_state_dot_json=state(late), checkpoint_dash_70__x="")
    for path in (tmp_path, tmp_path / "checkpoint-60", tmp_path / "checkpoint-60" / "trainer_state.json"):
        for signal, first in (("loss", 3), ("eval_loss", 4)):
            trajectory = Trajectory.read(path, signal=signal)
            assert trajectory.steps.tolist() == late
            assert trajectory.signal(signal) == pytest.approx([first - step / 100 for step in late])
    files(tmp_path, trainer_state_dot_json=state(early))
    assert Trajectory.read(tmp_path, signal="loss").steps.tolist() == early


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", r"has no log_history; give the trainer_state\.json"),
        ('{"log_history": 3}', "has no log_history"),
        ('{"log_history": [1]}', r"Entry 1 of .*trainer_state\.json is not an object of named values"),
        ("[" * 100, "nests deeper|is not JSON"),
    ],
)
def test_a_trainer_state_that_is_none(tmp_path, content, says):
    with pytest.raises(PhasewatchError, match=says):
        Trajectory.read(files(tmp_path, trainer_state_dot_json=content), signal="loss")


def test_what_is_chosen_in_a_folder(tmp_path):
    table = "step,loss\n1,2\n2,2\n"
    assert len(Trajectory.read(files(tmp_path, metrics_dot_csv=table), signal="loss")) == 2
    files(tmp_path, run_dot_wandb=wandb_file([{"loss": 1, "step": i} for i in range(4)]))
    assert len(Trajectory.read(tmp_path, signal="loss")) == 4
    files(tmp_path, events_dot_out_dot_tfevents_dot_1=EVENTS)
    assert len(Trajectory.read(tmp_path, signal="loss")) == 6
    files(tmp_path, trainer_state_dot_json=state([10]))
    assert len(Trajectory.read(tmp_path, signal="loss")) == 1
    files(tmp_path, points_dot_jsonl="")
    assert len(Trajectory.read(tmp_path, signal="loss")) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("trainer_state.json", '{"log_history": []}'), ("a.tfevents.1", event_file([])), ("a.wandb", wandb_file([]))],
)
def test_a_log_without_values_so_far(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert len(Trajectory.read(tmp_path / name, signal="loss")) == 0


def test_folders_below_are_named(tmp_path):
    with pytest.raises(PhasewatchError, match=r"is a folder without points\.jsonl, event files"):
        Trajectory.read(tmp_path, signal="loss")
    files(tmp_path, a__b__events_dot_out_dot_tfevents_dot_1=EVENTS, c__points_dot_jsonl="")
    with pytest.raises(PhasewatchError, match=r"has logs in folders below it; name one of them: a/b, c\."):
        Trajectory.read(tmp_path, signal="loss")
    files(tmp_path, one_dot_wandb="", two_dot_wandb="")
    with pytest.raises(PhasewatchError, match=r"several \.wandb files; name one of them: one\.wandb, two\.wandb\."):
        Trajectory.read(tmp_path, signal="loss")
