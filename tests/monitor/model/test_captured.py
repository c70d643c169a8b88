"""Gradients by a CUDA graph and by a compiled loss: run with `-m gpu` where there is a GPU."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import phasewatch as pw
from phasewatch.monitor.model import passes
from phasewatch.monitor.model.captured import Trace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SAMPLER = pw.Langevin(step_size=1e-5, nbeta=30.0, localization=100.0, chains=2, draws=60, burn_in=10, batch_size=16)


@pytest.fixture(autouse=True)
def _whenever_it_is_right(monkeypatch):
    graphs_take(monkeypatch, 0.0)


def graphs_take(monkeypatch, seconds):
    """A pass by a CUDA graph so long, whatever the clock says."""
    plain = Trace.of

    def timed(parameters, add_gradient, batch):
        found = plain(parameters, add_gradient, batch)
        return replace(found, seconds=seconds) if isinstance(add_gradient, passes.CapturedGradient) else found

    monkeypatch.setattr(passes.Trace, "of", timed)


def make_model():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(64, 1)).cuda()


def squared_error(model, batch):
    return (model(batch) - batch[:, :1]).square().mean()


def asks_on_the_host(model, batch):
    value = squared_error(model, batch)
    return value if value.item() < 1e9 else value * 2


def branches_on_weights(model, batch):
    """Python decides, at another place than where it was captured."""
    squared_error.seen = float(next(model.parameters()).detach().abs().max()) if not capturing() else 1.0
    return squared_error(model, batch) * squared_error.seen


def capturing():
    return torch.cuda.is_current_stream_capturing()


def probe_of(loss, autocast=None, *, compiled=False):
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    probe = pw.Probe(make_model(), loss, x, sampler=SAMPLER, autocast=autocast, compiled=compiled)
    probe.subject.loss.vectorised = False
    return probe


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_chains_are_those_of_plain_passes(monkeypatch, autocast):
    snapshot, found = pw.Snapshot.of(make_model(), 0), {}
    for worth in (10**9, 1):
        monkeypatch.setattr(passes, "WORTH_CAPTURING", worth)
        probe = probe_of(squared_error, autocast)
        found[worth] = probe(snapshot).llc.value, probe(snapshot).llc.value
        assert bool(probe.subject.loss.captured) == (worth == 1)
        assert ("CUDA graph" in probe.path) == (worth == 1)
    assert found[1][0] == pytest.approx(found[1][1], rel=1e-5 if autocast is None else 0.02)
    assert found[1][0] == pytest.approx(found[10**9][0], rel=1e-5 if autocast is None else 0.02)


@pytest.mark.parametrize("loss", [asks_on_the_host, branches_on_weights])
def test_what_a_graph_would_get_wrong_runs_plainly(loss):
    probe = probe_of(loss)
    point = probe(pw.Snapshot.of(make_model(), 0))
    assert probe.subject.loss.captured is False
    again = probe(pw.Snapshot.of(make_model(), 0)).llc.value
    assert point.llc.value == pytest.approx(again, rel=1e-5)
    torch.randn(3, device="cuda")  # nothing is left of a capture that failed


@pytest.mark.parametrize("seconds", [0.0, 1e3], ids=["in a graph", "without a graph"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_compiled_loss_gives_the_same_points(monkeypatch, autocast, seconds):
    graphs_take(monkeypatch, seconds)
    snapshot = pw.Snapshot.of(make_model(), 0)
    plain, compiled = probe_of(squared_error, autocast), probe_of(squared_error, autocast, compiled=True)
    found, expected = compiled(snapshot).llc.value, plain(snapshot).llc.value
    assert "The loss is compiled" in compiled.path
    assert bool(compiled.subject.loss.captured) == (seconds == 0)
    assert [found, compiled(snapshot).llc.value] == pytest.approx(
        2 * [expected], rel=1e-5 if autocast is None else 0.02
    )
