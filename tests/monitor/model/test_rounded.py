"""Passes that are given parameters in bfloat16, which autocast makes of them in any case."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import phasewatch as pw
from phasewatch.monitor.model import loss as loss_of_a_model
from phasewatch.monitor.model import passes
from phasewatch.monitor.model import rounded as rounding
from phasewatch.monitor.model.autocast import under_autocast
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.rounded import used_rounded
from phasewatch.monitor.model.weights import SampledModel
from phasewatch.monitor.sampling import chains, in_place
from phasewatch.monitor.sampling.position import AnchorOnDevice, AnchorOnHost, DisplacementOnDevice
from phasewatch.monitor.sampling.ways import Way

WORDS = 31
EQUALS = rounding.Signature.equals


class Words(nn.Module):
    """A model of words with a weight of each kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, 32)
        self.norm = nn.LayerNorm(32)
        self.once = nn.Linear(32, 32)
        self.twice = nn.Linear(32, 32)
        self.head = nn.Linear(32, WORDS, bias=False)

    def forward(self, words):
        x = self.norm(self.embed(words))
        x = self.twice(torch.tanh(self.twice(torch.tanh(self.once(x)))))
        return self.head(x)


class Tied(Words):
    def __init__(self):
        super().__init__()
        self.head.weight = self.embed.weight


def cross_entropy(model, words):
    return F.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


def with_penalty(model, words):
    return cross_entropy(model, words) + 1e-3 * model.once.weight.square().sum()


def with_hidden_use(model, words):
    return cross_entropy(model, words) * (1 + model.once.weight.detach().abs().mean())


def asks_for_float32(model, words):
    if model.once.weight.dtype != torch.float32:
        raise TypeError("float32 is needed")
    return cross_entropy(model, words)


def words(count=64):
    return torch.randint(WORDS, (count, 9), generator=torch.Generator().manual_seed(1))


def names_found(make, loss):
    model = SampledModel(make())
    taken = under_autocast(loss, "cpu", torch.bfloat16)
    return {model.names[number] for number in used_rounded(taken(model.module, words()), model.parameters)}


@pytest.mark.parametrize(
    ("make", "loss", "names"),
    [
        (Words, cross_entropy, {"once.weight", "once.bias", "head.weight"}),
        (Words, with_penalty, {"once.bias", "head.weight"}),
        (Tied, cross_entropy, {"once.weight", "once.bias"}),
    ],
)
def test_parameters_that_are_only_used_rounded_are_known(make, loss, names):
    assert names_found(make, loss) == names


def test_in_full_precision_there_are_none():
    model = SampledModel(Words())
    assert used_rounded(cross_entropy(model.module, words()), model.parameters) == []


@pytest.mark.parametrize(
    ("loss", "how_many"), [(cross_entropy, 3), (with_penalty, 2), (with_hidden_use, 0), (asks_for_float32, 0)]
)
def test_they_are_given_in_bfloat16_where_passes_are_then_the_same(loss, how_many):
    model = SampledModel(Words())
    found, before = ModelLoss(model, under_autocast(loss, "cpu", torch.bfloat16)), model.weights()
    found.choose_rounded(words().split(16))
    target = LossOnBatches(found, Batches(list(words().split(16))))
    with target.many_gradients(1, [parameter.data for parameter in model.parameters]):
        assert [parameter.dtype for parameter in model.parameters].count(torch.bfloat16) == how_many
    assert ("in bfloat16" in found.rounds) is (how_many > 0)
    assert all(map(torch.equal, model.parameters, before))
    assert {parameter.dtype for parameter in model.parameters} == {torch.float32}
    assert all(parameter.grad is None for parameter in model.parameters)
    target.settle(2, "")
    with target.many_gradients(1, before):  # several pieces are added up
        assert {parameter.dtype for parameter in model.parameters} == {torch.float32}


def noisy(model, words):
    return cross_entropy(model, words) * (1 + 0.1 * torch.rand(()))


def test_a_loss_that_draws_noise_is_the_same_each_time(monkeypatch):
    probe = probe_in_place(monkeypatch, pw.Langevin(1e-4, 30.0, 70.0, chains=2, draws=9, batch_size=8), loss=noisy)
    first, second = probe(pw.Snapshot.of(Words(), 0)), probe(pw.Snapshot.of(Words(), 0))
    assert first == second


@pytest.mark.parametrize(
    ("position", "parts", "momentum"),
    [
        (AnchorOnDevice, None, 0.0),
        (AnchorOnDevice, {"once": "once"}, 0.6),
        (AnchorOnHost, None, 0.6),
        (DisplacementOnDevice, {"once": "once"}, 0.6),
    ],
)
def test_chains_are_the_same_bit_for_bit(monkeypatch, position, parts, momentum):
    setting = {"step_size": 1e-4, "nbeta": 70.0, "localization": 30.0, "chains": 2, "draws": 9, "burn_in": 3}
    monkeypatch.setattr(chains, "ways", lambda target, rows: iter([Way(0, position)]))
    points, types = [], []
    run = in_place.run_in_place

    def seen(target, start, *rest):
        advance = target.add_gradient
        target.add_gradient = lambda *args, **how: (
            types.append([p.dtype for p in target.parameters]) or advance(*args, **how)
        )
        found = run(target, start, *rest)
        points[-1].append(types[-1].count(torch.bfloat16))
        assert {p.dtype for p in target.parameters} == {torch.float32}
        where = zip(target.parameters, start.position.weights, strict=True)
        assert all(parameter.data_ptr() == weight.data_ptr() for parameter, weight in where)
        return found

    monkeypatch.setattr(chains, "run_in_place", seen)
    for given in (True, False):
        rounds(monkeypatch, given)
        points.append([])
        sampler = pw.Langevin(**setting, momentum=momentum, batch_size=8)
        probe = probe_in_place(monkeypatch, sampler, parts)
        types.clear()
        points[-1].append(probe(pw.Snapshot.of(Words(), 0)))
        assert any(torch.bfloat16 in each for each in types) is given
    (*some, found), (*none, expected) = points
    assert set(some) == {3}
    assert set(none) == {0}
    assert found == expected


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class Checkpointed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 1))

    def forward(self, x):
        return self[2](checkpoint(self[1], self[0](x), use_reentrant=False))


def with_normed_weights():
    return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(32, 8)), nn.Tanh(), nn.Linear(8, 1))


def convolutions():
    return nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 1))


def runs_in_bfloat16(make):
    """Some CPUs have no kernel for an LSTM in it."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            make().train()(torch.randn(4, 4, 8))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    ("make", "how_many"), [(Recurrent, 6), (Checkpointed, 4), (with_normed_weights, 3), (convolutions, 4)]
)
def test_other_kinds_of_models_give_the_same_points(monkeypatch, make, how_many):
    if not runs_in_bfloat16(make):
        pytest.skip("this CPU has no kernel for it in bfloat16")

    def squared_error(model, batch):
        return (model(batch).float() - batch[:, 0, :1]).square().mean()

    monkeypatch.setattr(loss_of_a_model, "LARGEST_VECTORISED_ROW", 0)
    sampler = pw.Langevin(1e-5, 30.0, 70.0, chains=2, draws=6, burn_in=2, batch_size=4)
    x, found = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(0)), []
    for given in (how_many, 0):
        rounds(monkeypatch, given > 0)
        torch.manual_seed(0)
        model = make()
        probe = pw.Probe(model, squared_error, x, sampler=sampler, autocast=torch.bfloat16)
        assert len(probe.subject.loss.rounded) == given
        found.append(probe(pw.Snapshot.of(model, 0)))
    assert found[0] == found[1]


def probe_in_place(monkeypatch, sampler, parts=None, device="cpu", loss=cross_entropy):
    monkeypatch.setattr(loss_of_a_model, "LARGEST_VECTORISED_ROW", 0)
    monkeypatch.setattr(loss_of_a_model, "WORTH_ITS_MEMORY", 0.0)
    model = Words().to(device)
    return pw.Probe(model, loss, words(64), sampler=sampler, autocast=torch.bfloat16, parts=parts)


def rounds(monkeypatch, given):
    """Whether passes with rounded parameters count as the same."""
    monkeypatch.setattr(rounding.Signature, "equals", EQUALS if given else lambda self, other: False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("position", [AnchorOnDevice, AnchorOnHost, DisplacementOnDevice])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_chains_on_a_gpu_are_the_same(monkeypatch, position, momentum):
    monkeypatch.setattr(chains, "ways", lambda target, rows: iter([Way(0, position)]))
    monkeypatch.setattr(passes.Passes, "_fits_twice", lambda self: False)  # no CUDA graph
    sampler = pw.Langevin(1e-4, 30.0, 70.0, chains=2, draws=40, burn_in=8, batch_size=8, momentum=momentum)
    found = []
    for given in (True, False):
        rounds(monkeypatch, given)
        probe = probe_in_place(monkeypatch, sampler, {"once": "once"}, "cuda")
        point = probe(pw.Snapshot.of(Words(), 0))
        assert ("in bfloat16" in probe.path) is given
        found.append([point.llc.value, *(part.value for part in point.parts.values())])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
