"""Who is called first, on trajectories in which it is known who moves first."""

import csv
import sys

import numpy as np
import pytest

from phasewatch import Trajectory, log_spaced


def keep_run(folder, name, *, llc, accuracy, seed=0):
    """A run of grokking's in which λ̂ and the loss fall, and the accuracy rises, about the steps given."""
    steps = np.array(sorted(log_spaced(100, 20_000, num=40).steps))
    noise = 0.003 * np.random.default_rng(seed).standard_normal((len(steps), 4)).T
    risen = 1 / (1 + (accuracy / steps) ** 4)
    folder.mkdir(parents=True, exist_ok=True)
    Trajectory.from_values(
        steps,
        loss=2 - risen + noise[3],
        llc=300 - 200 * (1 / (1 + (llc / steps) ** 4) + noise[0]),
        metrics={"test_accuracy": risen + noise[1], "rule_share": 0.02 + noise[2]},
    ).write(folder / f"{name}.jsonl")


@pytest.fixture
def asked(script, monkeypatch, tmp_path):
    """Runs the experiment on the trajectories that are kept under a folder."""

    def ask(*arguments):
        command = ["does_llc_lead.py", "--points", str(tmp_path / "points"), "--results", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        script("does_llc_lead").main()
        if not (tmp_path / "does_llc_lead.csv").exists():
            return []
        with (tmp_path / "does_llc_lead.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return ask


@pytest.mark.parametrize("lead", [2.5, 1 / 2.5])
def test_what_moves_first_is_called_first(asked, tmp_path, lead):
    for seed in range(2):
        keep_run(tmp_path / "points" / "grokking", f"seed-{seed}", llc=1000, accuracy=1000 * lead, seed=seed)
    rows = asked()
    assert [row["run"] for row in rows] == ["seed-0", "seed-1"]
    for row in rows:
        assert row["metric"] == "test_accuracy"  # the rule's share doesn't jump
        assert abs(float(row["half"]) / (1000 * lead) - 1) < 0.1
        assert int(row["start"]) < int(row["called"]) < int(row["end"])
        assert row["llc_kind"] == "B"
        assert (int(row["llc_called"]) < int(row["called"])) == (lead > 1)


def test_what_moves_together_is_called_together(asked, tmp_path, capsys):
    for seed in range(2):
        keep_run(tmp_path / "points" / "grokking", f"seed-{seed}", llc=1500, accuracy=1500, seed=10 + seed)
    for row in asked():
        assert row["llc_kind"] == "B"
        assert 0.5 < int(row["llc_called"]) / int(row["called"]) < 2
        assert int(row["loss_called"]) > int(row["start"])
    assert "| grokking | test_accuracy up | 2 of 2 runs | 2 of 2 | B 2 |" in capsys.readouterr().out


def test_a_fall_without_a_jump_is_counted(asked, tmp_path, capsys):
    keep_run(tmp_path / "points" / "grokking", "seed-0", llc=1500, accuracy=1500)
    keep_run(tmp_path / "points" / "grokking", "shuffled-seed-0", llc=1500, accuracy=1e9)
    asked()
    printed = capsys.readouterr().out
    assert "| grokking | seed-* | 1 | 1 | 0 | 0 | 0 | 0 |" in printed
    assert "| grokking | shuffled-seed-* | 1 | 1 | 1 | 0 | 1 | 0 |" in printed


def test_the_quick_size_looks_at_two_runs_and_keeps_nothing(asked, tmp_path, capsys):
    for seed in range(4):
        keep_run(tmp_path / "points" / "grokking", f"seed-{seed}", llc=1500, accuracy=1500, seed=seed)
    assert asked("--quick") == []
    assert "2 of 2 runs" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["points"]
