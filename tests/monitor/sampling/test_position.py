"""Chains in place, wherever the anchor is kept and in however many pieces a minibatch is taken."""

import pytest
import torch

import phasewatch as pw
from phasewatch.monitor.model.pieces import in_pieces, pieces_beside, samples_in
from phasewatch.monitor.model.weights import SampledModel
from phasewatch.monitor.sampling import chains
from phasewatch.monitor.sampling.position import AnchorOnDevice, AnchorOnHost, DisplacementOnDevice
from phasewatch.monitor.sampling.ways import Way
from phasewatch.monitor.snapshots.snapshot import named_tensors, same_weights


def squared_error(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def trained():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x = torch.randn(256, 8)
    data = x, torch.tanh(x[:, :1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        squared_error(model, data).backward()
        optimizer.step()
    return model, data


@pytest.fixture(scope="module")
def case():
    return trained()


SETTING = {"step_size": 1e-4, "nbeta": 100.0, "localization": 10.0, "draws": 20, "burn_in": 8, "batch_size": 32}
SAMPLERS = {
    "SGLD": pw.SGLD(**SETTING),
    "no momentum": pw.Langevin(**SETTING, momentum=0.0),
    "momentum": pw.Langevin(**SETTING, momentum=0.5),
    "kappa": pw.Langevin(**{**SETTING, "step_size": None}, kappa=0.5),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(
    ("way", "tolerance"),
    [
        (Way(0), 1e-5),
        (Way(0, AnchorOnHost), 1e-5),
        (Way(0, DisplacementOnDevice), 0.02),
        (Way(0, AnchorOnDevice, 3), 1e-5),
    ],
    ids=str,
)
def test_each_way_gives_what_stacked_chains_give(monkeypatch, case, sampler, way, tolerance):
    if sampler.target_kappa and way.pieces > 1:
        pytest.skip("the curvature that sets the step is that of a part of the minibatch")
    model, data = case
    probe, snapshot = pw.Probe(model, squared_error, data, sampler=sampler), pw.Snapshot.of(model, 0)
    together = probe(snapshot).llc
    probe.subject.loss.vectorised = False
    monkeypatch.setattr(chains, "ways", lambda target, rows: iter([way]))
    apart = probe(snapshot).llc
    assert apart.value == pytest.approx(together.value, rel=tolerance)
    assert probe.path.endswith(str(way))


def test_a_displacement_leaves_the_snapshot_where_it_is():
    """However often it is rounded, w* doesn't move further than float32 rounds."""
    torch.manual_seed(0)
    anchor = torch.randn(1000)
    parameter = torch.nn.Parameter(anchor.clone())
    position = DisplacementOnDevice([parameter], [anchor])
    for _ in range(500):
        position.put([0], [parameter.detach() + 0.01 * torch.randn(1000)])
    torch.testing.assert_close(position.origin(0), anchor, rtol=0, atol=1e-5)
    assert (parameter.detach() - anchor).std() == pytest.approx(0.01 * 500**0.5, rel=0.1)


@pytest.mark.parametrize("position", [AnchorOnDevice, AnchorOnHost, DisplacementOnDevice])
def test_each_part_s_chains_begin_at_the_snapshot(monkeypatch, case, position):
    """One after another, they leave the parameters where they end."""
    model, data = case
    probe = pw.Probe(model, squared_error, data, sampler=SAMPLERS["SGLD"], parts={"first": "0", "again": "0"})
    probe.subject.loss.vectorised = False
    monkeypatch.setattr(chains, "ways", lambda target, rows: iter([Way(0, position)]))
    point = probe(pw.Snapshot.of(model, 0))
    assert point.parts["first"] == point.parts["again"]


def test_where_a_gpu_has_no_room_the_snapshot_s_own_tensors_are_the_anchor(monkeypatch, case):
    model, data = case
    probe, snapshot = pw.Probe(model, squared_error, data, sampler=SAMPLERS["SGLD"]), pw.Snapshot.of(model, 0)
    probe.subject.loss.vectorised = False
    before, roomy = pw.Snapshot.of(model, 0), probe(snapshot)
    monkeypatch.setattr(type(probe.subject), "_has_room_for_an_anchor", False)
    anchor = probe.subject.anchor(snapshot)
    assert [tensor.data_ptr() for tensor in anchor] == [tensor.data_ptr() for tensor in snapshot.tensors.values()]
    assert probe(snapshot) == roomy
    assert same_weights(snapshot, before)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_a_snapshot_s_weights_are_those_of_the_model_that_loaded_it(kind, saved):
    torch.manual_seed(0)
    model = SampledModel(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(kind))
    snapshot = pw.Snapshot(0, {n: (3.3 * torch.randn(t.shape)).to(saved) for n, t in named_tensors(model.module)})
    model.load(snapshot)
    expected, found = model.weights(), model.weights_in(snapshot)
    assert [weight.dtype for weight in found] == [weight.dtype for weight in expected]
    assert all(map(torch.equal, found, expected))


def test_where_memory_runs_out_minibatches_are_taken_in_pieces(monkeypatch, case):
    model, data = case
    probe, snapshot = pw.Probe(model, squared_error, data, sampler=SAMPLERS["SGLD"]), pw.Snapshot.of(model, 0)
    roomy, value = probe(snapshot), probe.subject.loss.value

    def tight(batch, **how):
        if samples_in(batch) < 256 and samples_in(batch) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return value(batch, **how)

    probe.subject.loss.vectorised = False
    assert probe.subject.loss.splits([data])
    monkeypatch.setattr(probe.subject.loss, "value", tight)
    assert probe(snapshot).llc.value == pytest.approx(roomy.llc.value, rel=1e-5)
    assert probe.path.endswith("One chain at a time, with the snapshot's weights, minibatches in 4 parts.")


def test_pieces_of_a_minibatch():
    batch = {"x": torch.arange(10).view(5, 2), "y": (torch.arange(5), torch.arange(5.0))}
    assert samples_in(batch) == 5
    pieces = in_pieces(batch, 3)
    assert [share for share, _ in pieces] == [0.4, 0.4, 0.2]
    assert torch.equal(torch.cat([piece["x"] for _, piece in pieces]), batch["x"])
    assert torch.equal(torch.cat([piece["y"][1] for _, piece in pieces]), batch["y"][1])
    assert samples_in({"x": torch.zeros(5, 2), "positions": torch.zeros(1, 2)}) == 1


@pytest.mark.parametrize(
    ("held", "taken", "samples", "pieces"), [(1, 4, 8, 2), (3, 4, 8, 4), (4, 4, 8, 8), (9, 4, 8, 8), (0, 4, 8, 1)]
)
def test_a_pass_beside_a_gradient_takes_no_more_than_one_without(held, taken, samples, pieces):
    assert pieces_beside(held, taken, samples) == pieces
    if held < taken and pieces < samples:
        assert held + taken / pieces <= taken


def test_a_loss_that_is_no_mean_over_samples_is_not_taken_in_pieces():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 1), torch.randn(64, 3)

    def spread(model, batch):
        return model(batch).var()

    probe = pw.Probe(model, spread, x, sampler=pw.SGLD(step_size=1e-4, batch_size=16, draws=8, burn_in=0))
    assert not probe.subject.loss.splits([x[:16], x[16:32]])
