"""An ensemble's members are trained as they would be alone."""

import copy
from itertools import islice

import pytest
import torch
from torch import Generator

from phasewatch.toy_tasks.ensemble import EAGER, Ensemble
from phasewatch.toy_tasks.in_context_regression import RegressionData, RegressionTransformer, loss, training

DATA = RegressionData(dimensions=2, examples=3)


def models(count=3):
    torch.manual_seed(0)
    return [RegressionTransformer(2, 3, width=8, heads=2) for _ in range(count)]


class Slice:
    """The batches that a member of an ensemble of three is given."""

    def __init__(self, member):
        self.member = member

    def __call__(self, generator, batch_size):
        return tuple(part.unflatten(0, (3, -1))[self.member] for part in DATA(generator, 3 * batch_size))


@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_each_member_is_trained_as_it_would_be_alone(device, steps):
    alone = [model.to(device) for model in models()]
    ensemble = Ensemble(alone, loss)
    assert list(islice(training(ensemble, DATA, seed=3, steps=steps), 2 * EAGER)) == list(range(1, 2 * EAGER + 1))
    for member, model in enumerate(alone):
        before = copy.deepcopy(model)
        list(islice(training(model, Slice(member), seed=3, steps=steps), 2 * EAGER))
        for name, parameter in ensemble.member(member).named_parameters():
            torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-4, atol=1e-5)
        moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True)]
        assert all(moved)


def test_losses_are_those_of_the_members():
    ensemble = Ensemble(models(), loss)
    batches = tuple(part.unflatten(0, (3, -1)) for part in DATA(Generator().manual_seed(1), 12))
    by_hand = [loss(ensemble.member(i), tuple(part[i] for part in batches)) for i in range(3)]
    torch.testing.assert_close(ensemble.losses(batches), torch.stack(by_hand))


def test_an_ensemble_is_a_copy():
    mine = models()
    ensemble = Ensemble(mine, loss)
    next(training(ensemble, DATA))
    for model, again in zip(mine, models(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    member = ensemble.member(1)
    with torch.no_grad():
        member.unembed.bias.fill_(7.0)
    assert not torch.equal(ensemble.member(1).unembed.bias, member.unembed.bias)
