import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from phasewatch import SnapshotFolder, Trajectory, log_spaced


@pytest.fixture
def stages(script, monkeypatch):
    module = script("regression_stages")
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "published_steps", lambda: frozenset({0, 1, 2}))
    return module


def trained(stages, folder, *only):
    """The tensors of each snapshot that is there after training."""
    given = stages.options("", stages.EXPERIMENT, seeds=4, arguments=["--runs", str(folder), *only])
    given = replace(given, results=folder / "results")
    stages.train_in_pairs(stages.runs(given), given)
    found = {run.name: SnapshotFolder(given.runs / run.name / "snapshots") for run in stages.runs(given)}
    return {(name, step): series.load(step).tensors for name, series in found.items() for step in series.steps}


def test_a_seed_is_trained_in_its_pair_whichever_is_wanted(stages, tmp_path):
    both = trained(stages, tmp_path / "both", "--first-seed", "2", "--seeds", "2")
    one = trained(stages, tmp_path / "one", "--only", "seed-3")
    assert set(both) == set(one) == {(f"seed-{seed}", step) for seed in (2, 3) for step in (0, 1, 2)}
    for key, tensors in one.items():
        assert all(torch.equal(tensor, both[key][name]) for name, tensor in tensors.items())
    name = "embed.weight"
    assert len({both[key][name].sum().item() for key in both}) == len(both)


def test_pairs_are_the_same_however_many_are_wanted(stages, tmp_path, monkeypatch):
    pairs = []
    monkeypatch.setattr(stages, "train_together", lambda pair, given: pairs.append([run.seed for run in pair]))
    trained(stages, tmp_path, "--first-seed", "1", "--seeds", "4")
    assert pairs == [[0, 1], [2, 3], [4, 5]]


def test_what_is_trained_or_measured_is_not_trained_again(stages, tmp_path, monkeypatch):
    trained(stages, tmp_path, "--only", "seed-0")
    monkeypatch.setattr(stages, "train_together", lambda pair, given: pytest.fail("trained again"))
    trained(stages, tmp_path, "--only", "seed-0")
    kept = tmp_path / "results" / "points" / stages.EXPERIMENT / "seed-2.jsonl"
    kept.parent.mkdir(parents=True)
    kept.touch()
    trained(stages, tmp_path, "--only", "seed-2")


def straight(slope):
    """λ̂ rises by as much in every factor of the step."""
    steps = sorted(log_spaced(1, 500_000, num=100).steps)
    return Trajectory.from_values(steps, loss=[1.0] * len(steps), llc=[slope * math.log(step) for step in steps])


def test_changes_between_ends_are_those_of_the_curve(stages):
    rows = stages.rows_between_ends({"a": straight(2.0), "b": straight(4.0)}, "mean")
    assert [row["λ̂ between the published ends"] for row in rows] == ["a", "b", "mean"]
    for row, slope in zip(rows, (2.0, 4.0, 3.0), strict=True):
        for before, after in pairwise((1, *stages.ENDS)):
            assert row[f"to step {after}"] == pytest.approx(slope * math.log(after / before), rel=0.02)
