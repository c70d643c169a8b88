"""When a graph of a pass and a compiled loss are used, with stand-ins; those of a GPU are in test_captured.py."""

import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

import phasewatch as pw
from phasewatch.monitor.model import passes
from phasewatch.monitor.model.autocast import under_autocast
from phasewatch.monitor.model.gradients import clear_gradients
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.weights import SampledModel


def squared_error(model, batch):
    return (model(batch) - batch[:, :1]).square().mean()


def captures(monkeypatch, graph):
    """Have a stand-in for a CUDA graph captured."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(passes, "CapturedGradient", graph)
    monkeypatch.setattr(passes.Passes, "_on_a_gpu", True)
    monkeypatch.setattr(passes.Passes, "_fits_twice", lambda self: True)
    plain = passes.Trace.of

    def timed(parameters, add_gradient, batch):
        """Plain passes seem to take a tenth of a second."""
        found = plain(parameters, add_gradient, batch)
        return replace(found, seconds=found.seconds + 0.1 * (not isinstance(add_gradient, graph)))

    monkeypatch.setattr(passes.Trace, "of", timed)


def weights_of(model):
    return [parameter.data for parameter in model.parameters]


class Repeated:
    """A graph that is right, but for what a subclass gets wrong."""

    def __init__(self, parameters, add_gradient, batch):
        self.parameters, self.plain, self.batch = parameters, add_gradient, batch
        self.weights = [parameter.detach().clone() for parameter in parameters]

    def __call__(self, batch):
        return self.plain(batch)

    def lend(self):
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)


class Slow(Repeated):
    def __call__(self, batch):
        time.sleep(0.2)
        return super().__call__(batch)


class OfOneBatch(Repeated):
    def __call__(self, batch):
        return self.plain(self.batch)


class OfOneWeights(Repeated):
    """As where half-precision copies of the weights were kept."""

    def __call__(self, batch):
        now = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, self.weights, strict=True):
                parameter.copy_(weight)
        loss = self.plain(batch)
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, now, strict=True):
                parameter.copy_(weight)
        return loss


class WithoutOneParameter(Repeated):
    def __call__(self, batch):
        loss = self.plain(batch)
        self.parameters[0].grad = None
        return loss


class Refused(Repeated):
    def __init__(self, *_):
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("graph", "used"),
    [
        (Repeated, True),
        (Slow, False),
        (OfOneBatch, False),
        (OfOneWeights, False),
        (WithoutOneParameter, False),
        (Refused, False),
    ],
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_graph_is_used_where_it_is_the_loss_and_faster(monkeypatch, graph, used, autocast):
    captures(monkeypatch, graph)
    torch.manual_seed(0)
    model = SampledModel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
    loss = ModelLoss(model, squared_error if autocast is None else under_autocast(squared_error, "cpu", autocast))
    loss.rounded = [] if autocast is None else [0, 1]
    target, before = LossOnBatches(loss, Batches(list(torch.randn(4, 32, 8)))), model.weights()
    with target.many_gradients(passes.WORTH_CAPTURING - 1, weights_of(model)):
        assert loss.captured is None
    with target.many_gradients(passes.WORTH_CAPTURING, weights_of(model)):
        assert loss.captured is used
        assert ("CUDA graph" in loss.path) is used
        for number in range(4):
            clear_gradients(model.parameters)
            target.add_gradient(number, part=True)  # a plain pass, which adds to what is held
            target.add_gradient(number)
            plain = torch.autograd.grad(loss.value(target._batches[number]), model.parameters)
            torch.testing.assert_close([parameter.grad for parameter in model.parameters], [2 * grad for grad in plain])
    assert all(map(torch.equal, model.parameters, before))


def test_trying_a_graph_draws_nothing_from_the_loss_s_random_stream(monkeypatch):
    captures(monkeypatch, Repeated)
    loss = ModelLoss(SampledModel(nn.Linear(8, 1)), lambda model, batch: squared_error(model, torch.randn_like(batch)))
    target, before = LossOnBatches(loss, Batches(list(torch.randn(4, 32, 8)))), torch.get_rng_state()
    with target.many_gradients(passes.WORTH_CAPTURING, weights_of(loss.model)):
        assert loss.captured is False
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("compiled", "reason"),
    [
        (lambda loss: lambda model, batch: loss(model, batch), None),
        (lambda loss: lambda model, batch: 1.01 * loss(model, batch), "differs from its plain one"),
        (lambda loss: lambda model, batch: loss(model, batch[:, :3]), "mat1 and mat2"),
    ],
    ids=["right", "another function", "can't be run"],
)
def test_a_compiled_loss_is_used_where_it_is_the_loss(monkeypatch, compiled, reason):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda loss, **_: compiled(loss))
    monkeypatch.setattr(passes.Passes, "_on_a_gpu", True)
    monkeypatch.setattr(passes.Passes, "_fits_twice", lambda self: False)
    torch.manual_seed(0)
    model = SampledModel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
    loss = ModelLoss(model, squared_error)
    loss.to_compile = True
    target = LossOnBatches(loss, Batches(list(torch.randn(4, 32, 8))))
    plain = [float(target.loss(number)) for number in range(4)]
    with nullcontext() if reason is None else pytest.warns(pw.PhasewatchWarning, match=reason):
        target.prepare_gradients(loss.model.weights())
    assert (loss.for_chains is not squared_error) is (reason is None)
    assert ("The loss is compiled" in loss.path) is (reason is None)
    target.prepare_gradients(loss.model.weights())  # it isn't tried again
    seen = []
    monkeypatch.setattr(loss, "for_chains", lambda *args: seen.append("whole") or squared_error(*args))
    monkeypatch.setattr(loss, "loss", lambda *args: seen.append("other") or squared_error(*args))
    assert [float(target.loss(number)) for number in range(4)] == pytest.approx(plain)
    assert seen == 4 * ["whole"]
    target.add_gradient(0, part=True)
    with target.vector.intercepted(None, lambda grad, held: None, add=True):
        target.add_gradient(0)
    target.add_gradient(0)
    assert seen[4:] == ["other", "other", "whole"]


def test_torch_can_compile_a_loss_in_mixed_precision_as_one_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    loss, batch = under_autocast(squared_error, "cpu", torch.bfloat16), torch.randn(32, 8)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
    assert compiled(model, batch).item() == pytest.approx(loss(model, batch).item(), rel=1e-2)
