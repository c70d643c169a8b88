"""The toy model of superposition: its closed-form loss, its polygons, and their learning coefficients."""

import math
from itertools import islice

import pytest
import torch
from torch import Generator

from phasewatch.toy_tasks.superposition import (
    SuperpositionData,
    SuperpositionModel,
    local_llc,
    loss,
    polygon,
    population_loss,
    training,
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def random_model(features: int, seed: int) -> SuperpositionModel:
    model = SuperpositionModel(features, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, features, generator=generator(seed)))
        model.bias.copy_(0.5 * torch.randn(features, generator=generator(seed + 100)))
    return model


def test_data_has_one_feature_on():
    x = SuperpositionData(5)(generator(), 40_000).double()
    assert x.shape == (40_000, 5)
    assert ((x > 0).sum(1) == 1).all()
    for values, expected in [(x, 1 / 10), (x**2, 1 / 15), ((x > 0).double(), 1 / 5)]:
        error = values.std(0) / math.sqrt(len(x))
        assert ((values.mean(0) - expected).abs() < 4 * error).all()
        assert (error < 0.003).all()


def test_the_generator_decides():
    data = SuperpositionData(3)
    assert torch.equal(data(generator(1), 8), data(generator(1), 8))
    assert not torch.equal(data(generator(1), 8), data(generator(2), 8))


def test_loss_by_hand():
    model = SuperpositionModel(3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]))
        model.bias.copy_(torch.tensor([0.1, -0.2, -1.0]))
    x = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]])
    # f(x) = ReLU(0.5·(1, 0, 0.5) + b) and ReLU(0.5·(0, 4, 0) + b)
    torch.testing.assert_close(model(x), torch.tensor([[0.6, 0.0, 0.0], [0.1, 1.8, 0.0]]))
    assert loss(model, x).item() == pytest.approx((0.1**2 + 0.1**2 + 1.3**2) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_the_population_loss_is_the_integral_over_the_data(seed):
    model = random_model(4, seed)
    with torch.no_grad():
        model.weight[:, 3] = 0
    size = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    total = sum(loss(model, size[:, None] * torch.eye(4, dtype=torch.float64)[i]).item() for i in range(4))
    assert population_loss(model.weight, model.bias).item() == pytest.approx(total / 4, rel=1e-7)


@pytest.mark.parametrize(
    ("features", "k", "positive", "published"),
    [(5, 4, 0, 0.06667), (5, 5, 0, 0.01583), (6, 5, 0, 0.06874), (6, 5, 1, 0.06180), (6, 6, 0, 0.04819)],
)
def test_polygons_are_critical_and_have_the_published_loss(features, k, positive, published):
    model = polygon(features, k, positive=positive)
    value = population_loss(model.weight, model.bias)
    assert value.item() == pytest.approx(published, abs=6e-6)
    for gradient in torch.autograd.grad(value, list(model.parameters())):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("features", "k", "positive", "llc"), [(5, 5, 0, 7.0), (6, 6, 0, 8.5), (6, 5, 1, 8.5), (6, 5, 0, 7.0)]
)
def test_published_coefficients(features, k, positive, llc):
    assert local_llc(polygon(features, k, positive=positive)) == llc


@pytest.mark.parametrize("features", [5, 6, 7, 8])
def test_the_polygon_of_all_features_turns_and_nothing_else(features):
    assert local_llc(polygon(features, features)) == (3 * features - 1) / 2


def test_a_saddle_and_a_kink_have_no_coefficient():
    saddle = SuperpositionModel(5, dtype=torch.float64)
    with torch.no_grad():
        saddle.weight.zero_()
        saddle.bias.fill_(0.1)
    with pytest.raises(ValueError, match=r"a saddle, whose Hessian has the eigenvalue -"):
        local_llc(saddle)
    with pytest.raises(ValueError, match="on the kink of its ReLU"):
        local_llc(polygon(5, 4))


@pytest.mark.parametrize(("features", "k", "positive"), [(5, 3, 0), (5, 6, 0), (6, 5, 2)])
def test_polygons_that_do_not_fit_are_refused(features, k, positive):
    with pytest.raises(ValueError, match=rf"polygon\(features={features}, k={k}, positive={positive}\): k must lie"):
        polygon(features, k, positive=positive)


# Training


def test_a_training_step_is_sgd_on_a_batch_of_its_seed():
    data, model, by_hand = SuperpositionData(4), random_model(4, 0).float(), random_model(4, 0).float()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    draws = generator(3)
    for step in islice(training(model, data, seed=3), 3):
        optimizer.zero_grad()
        loss(by_hand, data(draws, 1024)).backward()
        optimizer.step()
        for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(one, other), step


def test_training_with_five_features_ends_at_the_pentagon():
    model = SuperpositionModel(5)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 5, generator=generator()))
    for _ in islice(training(model, SuperpositionData(5)), 3000):
        pass
    value = population_loss(model.weight.double(), model.bias.double()).item()
    assert value == pytest.approx(0.01583, abs=1e-4)
