"""Deep linear networks: their data, their training, and the two learning coefficients that are known of them."""

import math

import pytest
import torch
from torch import Generator

from phasewatch.toy_tasks.deep_linear import (
    DeepLinear,
    curvatures,
    local_llc,
    loss,
    low_rank_matrix,
    most_singular_llc,
    most_singular_point,
    regression_data,
    train,
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def network(*widths: int, seed: int = 0) -> DeepLinear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DeepLinear(widths, dtype=torch.float64)


def trained(widths, rank, seed=0, noise=0.0):
    truth = low_rank_matrix(widths[-1], widths[0], rank, generator(seed))
    batch = regression_data(truth, 500, generator(seed + 1), noise=noise)
    model = network(*widths, seed=seed)
    train(model, batch)
    return model, batch, truth


def product(model):
    return model(torch.eye(next(model.parameters()).shape[1], dtype=torch.float64)).mT.detach()


def jacobian(model):
    """The explicit Jacobian of the outputs for each unit vector, shape (output of each, parameter)."""
    weights = tuple(model.factors())
    x = torch.eye(weights[0].shape[1], dtype=torch.float64)

    def outputs(*weights):
        y = x
        for weight in weights:
            y = y @ weight.mT
        return y.flatten()

    parts = torch.autograd.functional.jacobian(outputs, weights)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def jacobian_rank(model):
    """The rank of the explicit Jacobian, which must be told from 0 by four orders of magnitude."""
    values = torch.linalg.svdvals(jacobian(model))
    rank = int((values > 1e-6 * values[0]).sum())
    assert rank == len(values) or values[rank] < 1e-4 * values[rank - 1]
    return rank


# The data


def test_the_truth_has_its_rank_and_its_singular_values():
    values = torch.linalg.svdvals(low_rank_matrix(7, 5, 3, generator()))
    torch.testing.assert_close(values[:3], torch.tensor([2.0, 1.5, 1.0], dtype=torch.float64))
    assert values[3:].max() < 1e-14
    assert torch.equal(low_rank_matrix(4, 3, 0, generator()), torch.zeros(4, 3, dtype=torch.float64))


def test_moments_of_the_data():
    truth, noise, samples = low_rank_matrix(3, 4, 2, generator()), 0.7, 20_000
    x, y = regression_data(truth, samples, generator(1), noise=noise)
    left = y - x @ truth.mT
    for values, expected, bound in [(x, 0, 0.01), (x**2, 1, 0.02), (left, 0, 0.01), (left**2, noise**2, 0.01)]:
        error = values.std(0) / math.sqrt(samples)
        assert ((values.mean(0) - expected).abs() < 4 * error).all()
        assert (error < bound).all()


def test_noise_changes_the_targets_alone_and_the_generator_decides():
    truth = low_rank_matrix(3, 4, 2, generator())
    x, y = regression_data(truth, 10, generator(1))
    noisy_x, noisy_y = regression_data(truth, 10, generator(1), noise=0.5)
    assert torch.equal(x, noisy_x)
    assert not torch.equal(y, noisy_y)
    assert torch.equal(noisy_y, regression_data(truth, 10, generator(1), noise=0.5)[1])
    torch.testing.assert_close(y, x @ truth.mT)


def test_loss_is_half_the_squared_error_summed_over_outputs():
    model = network(3, 2, 4)
    x, y = (torch.randn(5, n, generator=generator(n), dtype=torch.float64) for n in (3, 4))
    expected = sum(0.5 * ((model(x[i]) - y[i]) ** 2).sum().item() for i in range(5)) / 5
    assert loss(model, (x, y)).item() == pytest.approx(expected, rel=1e-12)


# Aoyagi's formula


@pytest.mark.parametrize(
    ("widths", "rank", "llc"),
    [
        ((2, 2, 2), 0, 1.5),
        ((2, 2, 2), 1, 2.0),
        ((5, 3, 5), 0, 6.5),
        ((5, 4, 5), 0, 8.0),
        ((4, 3, 8), 0, 6.0),
        ((2, 2, 2, 2), 0, 1.5),
        ((3, 3, 3, 3), 1, 4.0),
        ((10, 10, 10, 10), 5, 46.0),
        ((5, 4, 3, 4, 5), 2, 9.0),
        ((1, 1, 1, 1), 0, 0.5),
        ((20, 20, 20), 5, 172.0),
    ],
)
def test_published_values(widths, rank, llc):
    assert most_singular_llc(widths, rank) == llc


def reduced_rank_llc(inputs, hidden, outputs, rank):
    """Aoyagi & Watanabe (2005), by cases."""
    m, h, n, r = inputs, hidden, outputs, rank
    if n + r <= m + h and m + r <= n + h and h + r <= m + n:
        odd = (m + h + n + r) % 2
        return (-((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * m + 2 * (h + r) * n + 2 * m * n + odd) / 8
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2
    return m * n / 2


def test_two_layers_are_reduced_rank_regression():
    sizes = range(1, 9)
    cases = [(m, h, n, r) for m in sizes for h in sizes for n in sizes for r in range(min(m, h, n) + 1)]
    assert len(cases) > 1500
    for m, h, n, r in cases:
        assert most_singular_llc((m, h, n), r) == reduced_rank_llc(m, h, n, r)


def test_the_order_of_the_hidden_widths_does_not_matter():
    assert most_singular_llc((6, 3, 5, 9), 2) == most_singular_llc((6, 5, 3, 9), 2)


def test_one_layer_is_regular():
    assert most_singular_llc((4, 7), 2) == 14


def test_a_rank_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"most_singular_llc\(\(4, 2, 4\), rank=3\): the rank must lie from 0 to"):
        most_singular_llc((4, 2, 4), 3)


# Training, and where it ends

NETWORKS = [((2, 2, 2), 1), ((4, 3, 5), 2), ((5, 4, 3, 4, 5), 2), ((8, 8, 8, 8), 3), ((12, 12, 12), 3), ((6, 9, 6), 6)]


@pytest.mark.parametrize(("widths", "rank"), NETWORKS)
def test_training_reaches_the_truth_and_its_rank_is_that_of_the_jacobian(widths, rank):
    model, batch, truth = trained(widths, rank)
    torch.testing.assert_close(product(model), truth, rtol=0, atol=1e-9)
    assert loss(model, batch).item() < 1e-18
    assert local_llc(model) == jacobian_rank(model) / 2
    assert most_singular_llc(widths, rank) <= local_llc(model) <= widths[0] * widths[-1] / 2


def test_training_ends_where_the_initial_weights_decide():
    found = {local_llc(trained((4, 3, 5), 2, seed)[0]) for seed in range(6)}
    assert len(found) > 1
    assert min(found) >= most_singular_llc((4, 3, 5), 2) == 8


@pytest.mark.parametrize("widths", [(5, 5, 4), (5, 2, 4), (5, 3, 3, 4)])
def test_with_noise_training_reaches_the_minimum_of_its_own_data(widths):
    model, batch, truth = trained(widths, 2, noise=0.5)
    assert (product(model) - truth).norm() > 0.01
    assert loss(model, batch) < loss(most_singular_point(widths, truth, generator()), batch)
    gradients = torch.autograd.grad(loss(model, batch), list(model.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-9


def test_training_that_does_not_arrive_says_so():
    model = network(3, 3, 3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # a saddle
    batch = regression_data(low_rank_matrix(3, 3, 1, generator()), 50, generator(1))
    with pytest.raises(RuntimeError, match=r"still 1\.0e\+00 from the optimum"):
        train(model, batch)


# The local coefficient


@pytest.mark.parametrize(("widths", "rank"), [((4, 4, 4), 4), ((3, 6, 2), 2), ((2, 3, 3, 2), 2)])
def test_a_network_that_can_do_anything_is_regular(widths, rank):
    model, _, _ = trained(widths, rank)
    assert local_llc(model) == widths[0] * widths[-1] / 2 == most_singular_llc(widths, rank)


def test_a_random_factorisation_into_full_ranks():
    truth = low_rank_matrix(20, 20, 5, generator())
    model = network(20, 20, 20)
    with torch.no_grad():
        first, second = model.parameters()
        second.copy_(truth @ torch.linalg.inv(first))
    assert local_llc(model) == jacobian_rank(model) / 2 == 200


@pytest.mark.parametrize("seed", range(3))
def test_trained_points_of_the_same_truth(seed):
    model, _, _ = trained((20, 20, 20), 5, seed)
    assert 172 <= local_llc(model) <= 174


def test_factors_of_any_rank_have_the_jacobian_of_their_partial_products():
    draws = generator(3)
    for ranks in [(1, 3, 2), (3, 1, 3), (2, 2, 2), (0, 2, 2)]:
        model = network(4, 5, 3, 6)
        with torch.no_grad():
            for weight, rank in zip(model.parameters(), ranks, strict=True):
                weight.copy_(low_rank_matrix(*weight.shape, rank, draws))
        assert local_llc(model) == jacobian_rank(model) / 2


def test_the_local_coefficient_of_a_million_parameters():
    model = most_singular_point((700, 700, 700), low_rank_matrix(700, 700, 3, generator()), generator())
    assert sum(weight.numel() for weight in model.parameters()) == 980_000
    assert local_llc(model) == (3 * 1400 - 9) / 2  # the matrices of rank 3


@pytest.mark.parametrize(("widths", "rank"), NETWORKS)
def test_curvatures_are_the_squares_of_the_singular_values_of_the_jacobian(widths, rank):
    model, _, _ = trained(widths, rank)
    found = curvatures(model)
    expected = torch.linalg.svdvals(jacobian(model)).square().flip(0)
    torch.testing.assert_close(found, expected[-len(found) :], rtol=1e-9, atol=0)
    assert len(found) == 2 * local_llc(model)


def test_curvatures_are_those_of_the_loss():
    model, _, truth = trained((4, 3, 5), 2)
    x = 2 * torch.eye(4, dtype=torch.float64)  # whose second moments are the identity
    shapes = [weight.shape for weight in model.parameters()]

    def at(flat):
        first, second = (part.view(shape) for part, shape in zip(flat.split([12, 15]), shapes, strict=True))
        return (x @ first.mT @ second.mT - x @ truth.mT).square().sum(-1).mean() / 2

    flat = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(at, flat))
    found = curvatures(model)
    torch.testing.assert_close(found, values[-len(found) :], rtol=1e-6, atol=0)
    assert values[: -len(found)].abs().max() < 1e-6 * found[0]


# The most singular point


@pytest.mark.parametrize(("widths", "rank"), [((4, 3, 5), 2), ((5, 4, 3, 4, 5), 2), ((3, 3), 1), ((3, 4, 3), 0)])
def test_every_factor_has_the_rank_of_the_truth(widths, rank):
    truth = low_rank_matrix(widths[-1], widths[0], rank, generator())
    model = most_singular_point(widths, truth, generator(1))
    torch.testing.assert_close(product(model), truth, rtol=0, atol=1e-12)
    for weight in model.parameters():
        values = torch.linalg.svdvals(weight.detach())
        assert (values[:rank] > 0.9).all()
        assert (values[rank:] < 1e-12).all()
