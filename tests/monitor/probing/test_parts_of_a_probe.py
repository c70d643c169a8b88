"""Parts of a model sampled with the rest held fast, and several snapshots measured at once."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from regression import D, half_squared_error, regression
from torch import nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.model.heads import heads
from phasewatch.monitor.model.vectorised import VectorisedLoss
from phasewatch.monitor.probing import probe as probe_module
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.replay import replay
from phasewatch.monitor.sampling.settings import Langevin
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory

FULL = Langevin(kappa=0.5, localization=1.0, nbeta=2000.0, chains=12, draws=400, burn_in=100, batch_size=None)


def test_a_mask_leaves_half_of_its_own_weights():
    model, data = regression()
    mask = torch.zeros(1, D, dtype=torch.bool)
    mask[0, 3:10] = True
    probe = Probe(model, half_squared_error, data, sampler=FULL, parts={"weight": mask})
    found = probe(Snapshot.of(model, 0)).llc
    assert found.health is Health.OK
    assert abs(found.value - 3.5) < 4 * found.error + 0.02 * 3.5
    assert found.error < 0.04 * 3.5


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4, dtype=torch.float64)
        self.second = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def at_its_own_targets() -> tuple[TwoLayers, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = TwoLayers()
    x = torch.randn(64, 6, dtype=torch.float64)
    return model, (x, model(x).detach())


SHORT = Langevin(step_size=1e-4, localization=10.0, nbeta=100.0, chains=3, draws=20, burn_in=5, batch_size=16)


def test_named_parts_come_beside_the_whole_model():
    model, data = at_its_own_targets()
    snapshot = Snapshot.of(model, 7)
    parts = {"the first": "first", "the biases": "*.bias"}
    point = Probe(model, half_squared_error, data, sampler=SHORT, parts=parts)(snapshot)
    whole = Probe(model, half_squared_error, data, sampler=SHORT)(snapshot)
    np.testing.assert_allclose(point.llc.per_chain, whole.llc.per_chain, rtol=1e-9)
    assert list(point.parts) == list(parts)
    for name, part in parts.items():
        beside = Probe(model, half_squared_error, data, sampler=SHORT, parts={"another": "second", name: part})
        np.testing.assert_allclose(point.parts[name].per_chain, beside(snapshot).parts[name].per_chain, rtol=1e-9)
    long = replace(SHORT, step_size=1e-3, chains=16, draws=300)
    many = Probe(model, half_squared_error, data, sampler=long, parts=parts)(snapshot).parts["the first"]
    alone = Probe(model, half_squared_error, data, sampler=long, parts="first")(snapshot).llc
    assert abs(many.value - alone.value) < 4 * math.hypot(many.error, alone.error)
    assert math.hypot(many.error, alone.error) < 0.1 * alone.value
    assert Point.from_json(point.as_json()) == point
    trajectory = Trajectory([point])
    assert trajectory.part("the first").llc.tolist() == [point.parts["the first"].value]
    with pytest.raises(
        PhasewatchError, match=r"trajectory.part\('the last'\): there is no such part; its parts are 'the f"
    ):
        trajectory.part("the last")


def test_a_part_of_few_parameters_is_sampled_alone():
    """The others aren't even in the list of weights; its noise is then that of a model of its own size."""
    model, data = at_its_own_targets()
    probe = Probe(model, half_squared_error, data, sampler=SHORT, parts="second")
    assert probe.settings["parameters"] == 10
    assert probe(Snapshot.of(model, 0)).llc.value > 0


def test_heads_in_one_pass():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(32, 5, 8)

    def loss(model, batch):
        return model(batch, batch, batch, need_weights=False)[0].square().mean()

    point = Probe(model, loss, x, sampler=SHORT, parts=heads(model))(Snapshot.of(model, 0))
    assert list(point.parts) == ["L0H0", "L0H1"]
    assert len({point.llc.value, *(estimate.value for estimate in point.parts.values())}) == 3


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("third", r"Probe\(parts='third'\)"),
        ({"a": "third"}, r"Probe\(parts="),
        ({"weight": torch.ones(3)}, r"Probe\(parts="),
        (3, r"Probe\(parts=...\) takes a name or pattern, .* a int came"),
    ],
)
def test_parts_that_are_not_there(parts, words):
    model, data = at_its_own_targets()
    with pytest.raises(PhasewatchError, match=words):
        Probe(model, half_squared_error, data, sampler=SHORT, parts=parts)


# Several snapshots at once


def test_snapshots_measured_together_are_as_each_alone():
    model, data = at_its_own_targets()
    probe = Probe(model, half_squared_error, data, sampler=SHORT, metrics={"norm": lambda m, b: m.first.weight.norm()})
    snapshots = []
    for step in range(3):
        snapshots.append(Snapshot.of(model, step))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01
    together = probe.measure(snapshots)
    for snapshot, found in zip(snapshots, together, strict=True):
        alone = probe(snapshot)
        assert (found.step, found.loss, found.metrics) == (alone.step, alone.loss, alone.metrics)
        np.testing.assert_allclose(found.llc.per_chain, alone.llc.per_chain, rtol=1e-9)
        np.testing.assert_allclose(found.llc.checks, alone.llc.checks, rtol=1e-6)


def test_snapshots_that_differ_in_what_is_held_are_measured_one_by_one():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True)
    probe = Probe(model, half_squared_error, (x, y), sampler=SHORT)
    first = Snapshot.of(model, 0)
    model.train()(x)
    second = Snapshot.of(model, 1)
    assert probe.measure([first, second]) == [probe(first), probe(second)]
    assert probe(first).llc.value != probe(second).llc.value


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_chains_that_do_not_all_fit_are_grouped(monkeypatch, rows):
    model, data = at_its_own_targets()
    snapshot, probe = Snapshot.of(model, 0), Probe(model, half_squared_error, data, sampler=SHORT)
    plain = probe(snapshot).llc
    at_once, evaluate = [], VectorisedLoss.rows_and_gradients

    def counted(self, weights, batches):
        at_once.append(len(weights[0]))
        return evaluate(self, weights, batches)

    monkeypatch.setattr(VectorisedLoss, "rows_and_gradients", counted)
    monkeypatch.setattr(probe_module, "_rows", lambda subject, sampler: rows)
    np.testing.assert_allclose(probe(snapshot).llc.per_chain, plain.per_chain, rtol=1e-9)
    assert max(at_once) == rows


# What can't be measured as it is


def test_a_loss_that_is_a_sum_says_so():
    model, data = at_its_own_targets()

    def total(model, batch):
        return (model(batch[0]) - batch[1] - 1).square().sum()

    with pytest.warns(match=r"Probe\(loss=total\): total\(model, batch\) doubles when the minibatch comes twice"):
        Probe(model, total, data, sampler=SHORT)


def test_a_loss_that_is_drawn_anew_says_so():
    model, data = at_its_own_targets()

    def noisy(model, batch):
        return (model(batch[0]) - batch[1]).square().mean() + torch.rand(()).double()

    with pytest.warns() as caught:
        Probe(model, noisy, data, sampler=SHORT)
    assert any("for the same weights and minibatch" in str(warning.message) for warning in caught)


def test_half_precision_is_measured_in_single():
    model = nn.Linear(6, 1).bfloat16()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    data = (x, x.sum(1, keepdim=True))
    half = Probe(model, half_squared_error, data, sampler=SHORT)(Snapshot.of(model, 0))
    single = Probe(model.float(), half_squared_error, data, sampler=SHORT)(Snapshot.of(model, 0))
    assert half == single


def test_half_precision_that_must_stay_so_says_what_it_costs():
    torch.manual_seed(0)
    model = nn.Linear(6, 1).bfloat16()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    with pytest.warns(match=r"Probe\(model=Linear\(...\)\) has bfloat16 weights and can't run with float32 ones"):
        probe = Probe(model, half_squared_error, (x, x[:, :1]), sampler=SHORT)
    half = probe(Snapshot.of(model, 0)).llc
    model.float()
    single = Probe(model, half_squared_error, (x.float(), x[:, :1].float()), sampler=SHORT)(Snapshot.of(model, 0)).llc
    np.testing.assert_allclose(half.per_chain, single.per_chain, atol=0.3)  # nβ times what losses near 1 are rounded to


def test_mixed_precision_agrees_with_single():
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    data = (x, x.sum(1, keepdim=True))
    sampler = Langevin(3e-4, 10.0, 100.0, chains=4, draws=100, burn_in=20, batch_size=64)
    snapshot = Snapshot.of(model, 0)
    single = Probe(model, half_squared_error, data, sampler=sampler)(snapshot)
    mixed = Probe(model, half_squared_error, data, sampler=sampler, autocast=torch.bfloat16)(snapshot)
    assert mixed != single
    assert abs(mixed.llc.value - single.llc.value) < 0.05 * abs(single.llc.value) + single.llc.error


def test_a_replay_that_groups_loses_only_what_cant_be_measured(monkeypatch, tmp_path):
    model, data = at_its_own_targets()
    probe = Probe(model, half_squared_error, data, sampler=SHORT)
    folder = SnapshotFolder(tmp_path)
    for step in range(4):
        folder.save(Snapshot.of(model, step))
        with torch.no_grad():
            model.first.weight += 0.01
    one_by_one = list(replay(folder, probe))
    at_once, measure = [], Probe.measure

    def counted(self, snapshots):
        at_once.append(len(snapshots))
        return measure(self, snapshots)

    monkeypatch.setattr(Probe, "measure", counted)
    monkeypatch.setattr(Probe, "together", 3)
    for grouped, alone in zip(replay(folder, probe), one_by_one, strict=True):
        assert grouped.step == alone.step
        np.testing.assert_allclose(grouped.llc.per_chain, alone.llc.per_chain, rtol=1e-9)
    assert max(at_once) == 3
    folder.source(1).write_bytes(b"torn")
    complaints = []
    assert [point.step for point in replay(folder, probe, on_error=complaints.append)] == [0, 2, 3]
    assert len(complaints) == 1
