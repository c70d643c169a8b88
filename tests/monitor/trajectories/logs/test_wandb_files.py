import os
import subprocess
import sys

import numpy as np
import pytest
from log_files import wandb_file

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.trajectories.logs import wandb_files
from phasewatch.monitor.trajectories.trajectory import Trajectory

RUN = """
import wandb
run = wandb.init(project="p", settings=wandb.Settings(console="off"))
for i in range(10):
    run.log({"train/loss": 2 - i / 8, "trainer/global_step": 50 * i, "nested": {"a": {"b": i}}, "name": "x"})
    run.log({"note": wandb.Histogram([1, 2, 3]), "bad": float("nan"), "hand": i})
run.finish()
"""
ROWS = [{"train/loss": 2 - i / 8, "global_step": 50 * i} for i in range(9)]


def write(folder, content):
    path = folder / "run-abc.wandb"
    path.write_bytes(content)
    return path


def test_an_offline_run_as_w_and_b_leaves_it(tmp_path):
    pytest.importorskip("wandb")
    folders = {f"WANDB_{kind}": str(tmp_path) for kind in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR")}
    environment = os.environ | folders | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", RUN], check=True, env=environment, cwd=tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    trajectory = Trajectory.read(folder, signal="train/loss").usable("train/loss")
    assert trajectory.steps.tolist() == [50 * i for i in range(10)]
    np.testing.assert_array_equal(trajectory.signal("train/loss"), [2 - i / 8 for i in range(10)])
    assert trajectory.signal("nested.a.b").tolist() == list(range(10))
    by_hand = Trajectory.read(folder, signal="hand").usable("hand")
    assert by_hand.steps.tolist() == [2 * i + 1 for i in range(10)]
    with pytest.raises(PhasewatchError, match="name one of them: offline-run-"):
        Trajectory.read(tmp_path / "wandb", signal="hand")


def test_no_package_of_w_and_b_is_imported(tmp_path):
    path = write(tmp_path, wandb_file(ROWS))
    code = (
        "import sys, phasewatch as pw; pw.Trajectory.read(sys.argv[1], signal='train/loss'); "
        "print({'wandb', 'torch', 'google', 'tensorboard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_records_longer_than_a_block(tmp_path):
    rows = [{**row, **{f"metric_{j}_{'x' * 100}": j for j in range(400)}} for row in ROWS]
    content = wandb_file(rows)
    assert len(content) > 12 * 32768
    trajectory = Trajectory.read(write(tmp_path, content), signal="train/loss")
    np.testing.assert_array_equal(trajectory.signal("train/loss"), [row["train/loss"] for row in ROWS])
    assert trajectory.signal(f"metric_399_{'x' * 100}").tolist() == [399] * 9


def test_large_records_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_files, "MOST_RECORD_BYTES", 50_000)
    rows = [*ROWS[:3], {"train/loss": 9, "table": "x" * 100_000}, *ROWS[3:]]
    assert len(Trajectory.read(write(tmp_path, wandb_file(rows)), signal="train/loss")) == 9


def test_a_file_that_was_cut_off_anywhere_keeps_its_whole_rows(tmp_path):
    content = wandb_file(ROWS)
    before = 0
    for length in range(30, len(content), 17):
        kept = len(Trajectory.read(write(tmp_path, content[:length]), signal="train/loss"))
        assert before <= kept <= len(ROWS)
        before = kept
    assert before >= len(ROWS) - 1


def test_damage_is_named_with_its_place(tmp_path):
    content = bytearray(wandb_file(ROWS))
    start = len(wandb_file(ROWS[:4]))
    content[start + 20] ^= 8
    with pytest.raises(PhasewatchError, match=rf"is damaged at byte {start}; export the run's history"):
        Trajectory.read(write(tmp_path, bytes(content)), signal="train/loss")
    with pytest.raises(PhasewatchError, match=r"is no \.wandb file of W&B"):
        Trajectory.read(write(tmp_path, b"x" * 100), signal="train/loss")


def test_too_many_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_files, "MOST_COLUMNS", 5)
    path = write(tmp_path, wandb_file([{f"m{i}": 1} for i in range(9)]))
    with pytest.raises(PhasewatchError, match="has 6 columns, and at most"):
        Trajectory.read(path, signal="m1")
