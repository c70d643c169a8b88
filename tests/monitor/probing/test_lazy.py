"""Models whose weights take their shapes from the first batch."""

import pytest
import torch
from torch import nn

import phasewatch as pw

SAMPLER = pw.SGLD(chains=2, draws=5, burn_in=2, batch_size=8)
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def make_model():
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))


def loss(model, batch):
    return model(batch).square().mean()


def needs_more(model, batch):
    return model(batch, batch).square().mean()


@pytest.mark.parametrize("built", [False, True])
def test_shapes_come_from_a_minibatch(built):
    trained = make_model()
    trained(X)
    probe = pw.Probe(make_model if built else make_model(), loss, X, sampler=SAMPLER)
    ready = pw.Probe(trained, loss, X, sampler=SAMPLER)
    assert probe(pw.Snapshot.of(trained, 3)) == ready(pw.Snapshot.of(trained, 3))


def test_shapes_that_no_minibatch_gives_are_a_sentence():
    with pytest.raises(pw.PhasewatchError, match=r"has lazy layers.*Run the model once before the probe is made"):
        pw.Probe(make_model(), needs_more, X, sampler=SAMPLER)


def test_a_monitor_of_a_lazy_model_says_that_it_has_no_weights_yet(tmp_path):
    trained = make_model()
    trained(X)
    probe = pw.Probe(trained, loss, X, sampler=SAMPLER)
    with pytest.raises(pw.PhasewatchError, match=r"lazy layers that have no weights yet. Run it on a batch first"):
        pw.PhaseMonitor(make_model(), probe, run=tmp_path / "run", at=pw.every(1))
