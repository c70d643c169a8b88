"""Ridge and dMMSE: each the posterior mean of its own prior."""

import math

import numpy as np
import pytest
import torch
from torch import Generator, nn

from phasewatch.toy_tasks.in_context_regression import RegressionData
from phasewatch.toy_tasks.regression_estimators import (
    dmmse_distance,
    dmmse_predictions,
    ridge_distance,
    ridge_predictions,
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Fixed(nn.Module):
    """Predicts what it is given."""

    def __init__(self, predictions):
        super().__init__()
        self.predictions = predictions

    def forward(self, x, y):
        return self.predictions


@pytest.mark.parametrize("noise_variance", [0.125, 2.0])
def test_ridge_is_the_solution_for_each_prefix(noise_variance):
    x, y = RegressionData(dimensions=3, examples=6, noise_variance=noise_variance)(generator(), 5)
    found = ridge_predictions(x, y, noise_variance)
    assert found.shape == (5, 6)
    for b in range(5):
        for k in range(6):
            past_x, past_y = (part[b, :k].double().numpy() for part in (x, y))
            w = np.linalg.solve(past_x.T @ past_x + noise_variance * np.eye(3), past_x.T @ past_y)
            assert found[b, k].item() == pytest.approx(w @ x[b, k].double().numpy(), rel=1e-3, abs=1e-5)
    assert (found[:, 0] == 0).all()


def test_ridge_has_the_loss_of_the_posterior_mean():
    """E(y − ŷ_k)² = σ² + E[xᵀ(XᵀX/σ² + I)⁻¹x], the posterior variance of the task (Bayes-optimal)."""
    data, size = RegressionData(), 20_000
    x, y = (part.double() for part in data(generator(1), size))
    squared = (ridge_predictions(x, y, 0.125) - y).square()
    for k in (0, 3, 7):
        covariance = torch.linalg.inv(x[:, :k].mT @ x[:, :k] / 0.125 + torch.eye(4, dtype=torch.float64))
        optimal = 0.125 + torch.einsum("bi,bij,bj->b", x[:, k], covariance, x[:, k])
        difference = squared[:, k] - optimal
        error = difference.std() / math.sqrt(size)
        assert abs(difference.mean()) < 4 * error
        assert error < 0.02 * optimal.mean()
        assert squared[:, k].mean() < (1.3 * ridge_predictions(x, y, 0.125) - y)[:, k].square().mean() + (k == 0)


def test_ridge_distance_by_hand():
    x, y = RegressionData(noise_variance=0.5)(generator(), 5)
    best = ridge_predictions(x, y, 0.5)
    assert ridge_distance(0.5)(Fixed(best), (x, y)) == 0
    assert ridge_distance(0.5)(Fixed(best + 3.0), (x, y)) == pytest.approx(9.0, rel=1e-5)
    assert ridge_distance(0.125)(Fixed(best), (x, y)) > 0


@pytest.mark.parametrize("noise_variance", [0.125, 2.0])
def test_dmmse_weighs_the_tasks_by_their_likelihood(noise_variance):
    data = RegressionData(dimensions=3, examples=6, noise_variance=noise_variance, tasks=7)
    x, y = data(generator(), 5)
    found = dmmse_predictions(x, y, data.task_vectors, noise_variance)
    assert found.shape == (5, 6)
    tasks = data.task_vectors.double().numpy()
    for b in range(5):
        for k in range(6):
            past_x, past_y, now = x[b, :k].double().numpy(), y[b, :k].double().numpy(), x[b, k].double().numpy()
            likelihood = [np.exp(-((past_y - past_x @ w) ** 2).sum() / (2 * noise_variance)) for w in tasks]
            w = np.average(tasks, axis=0, weights=likelihood)
            assert found[b, k].item() == pytest.approx(w @ now, rel=1e-3, abs=1e-5)


def test_dmmse_of_one_task_is_that_task():
    data = RegressionData(tasks=1)
    x, y = data(generator(), 5)
    torch.testing.assert_close(dmmse_predictions(x, y, data.task_vectors, 0.125), x @ data.task_vectors[0])


def test_dmmse_of_very_many_tasks_is_ridge():
    data = RegressionData(dimensions=2, examples=4, noise_variance=0.5, tasks=100_000)
    x, y = (part.double() for part in data(generator(), 20))
    found = dmmse_predictions(x, y, data.task_vectors.double(), 0.5)
    torch.testing.assert_close(found, ridge_predictions(x, y, 0.5), rtol=0, atol=0.06)


def test_each_is_the_best_for_its_own_prior():
    few, endless, size = RegressionData(tasks=8, noise_variance=0.5), RegressionData(noise_variance=0.5), 4000
    for data, sign in ((few, 1), (endless, -1)):
        x, y = data(generator(1), size)
        ridge = (ridge_predictions(x, y, 0.5) - y).square()
        dmmse = (dmmse_predictions(x, y, few.task_vectors, 0.5) - y).square()
        advantage = sign * (ridge - dmmse).mean(1)
        assert advantage.mean() > 4 * advantage.std() / math.sqrt(size)


def test_dmmse_ends_at_the_noise():
    """With 8 tasks and 60 pairs there is no doubt left of which it is."""
    data, size = RegressionData(examples=60, noise_variance=0.3, tasks=8), 4000
    x, y = data(generator(2), size)
    squared = (dmmse_predictions(x, y, data.task_vectors, 0.3) - y).square()[:, -1]
    error = squared.std() / math.sqrt(size)
    assert abs(squared.mean() - 0.3) < 4 * error
    assert error < 0.01


def test_dmmse_distance_by_hand():
    data = RegressionData(noise_variance=0.5, tasks=3)
    x, y = data(generator(), 5)
    best = dmmse_predictions(x, y, data.task_vectors, 0.5)
    assert dmmse_distance(data.task_vectors, 0.5)(Fixed(best), (x, y)) == 0
    assert dmmse_distance(data.task_vectors, 0.5)(Fixed(best + 3.0), (x, y)) == pytest.approx(9.0, rel=1e-5)
    assert dmmse_distance(data.task_vectors, 0.125)(Fixed(best), (x, y)) > 0
