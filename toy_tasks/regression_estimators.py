"""The best predictions there are in in-context linear regression, for one prior over the tasks or another.

With tasks w ~ N(0, I) it is ridge regression. With M equally likely tasks it is the discrete minimum-mean-squared-error
estimator, dMMSE, which weighs each of the M by how well it fits the pairs so far. Trained on M tasks, a transformer can
come to do either (Raventós et al. 2023, arXiv 2306.15063).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def ridge_distance(noise_variance: float = 0.125) -> Callable[[nn.Module, Batch], float]:
    """A metric: mean squared distance to the ridge predictor, the best there is for tasks w ~ N(0, I).

    Args:
        noise_variance: σ² of the data; the ridge penalty that makes it the posterior mean.

    Returns:
        The metric, which takes a model and a batch.
    """

    def distance_to_ridge(model: nn.Module, batch: Batch) -> float:
        x, y = batch
        return (model(x, y) - ridge_predictions(x, y, noise_variance)).square().mean().item()

    return distance_to_ridge


def ridge_predictions(x: Tensor, y: Tensor, noise_variance: float) -> Tensor:
    """Posterior mean of each y_k given the pairs before it (Raventós et al. 2023, eq. 3).

    Args:
        x: shape (batch, K, D).
        y: shape (batch, K).
        noise_variance: σ², the ridge penalty.

    Returns:
        Predictions of shape (batch, K); the first is 0, the prior's.
    """
    outer = x.unsqueeze(-1) * x.unsqueeze(-2)
    gram = outer.cumsum(1) - outer + noise_variance * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    moment = (x * y.unsqueeze(-1)).cumsum(1) - x * y.unsqueeze(-1)
    return (torch.linalg.solve(gram, moment) * x).sum(-1)


def dmmse_distance(tasks: Tensor, noise_variance: float = 0.125) -> Callable[[nn.Module, Batch], float]:
    """A metric: mean squared distance to the dMMSE predictor, the best there is for M equally likely tasks.

    Args:
        tasks: the M tasks, shape (M, D).
        noise_variance: σ² of the data.

    Returns:
        The metric, which takes a model and a batch.
    """

    def distance_to_dmmse(model: nn.Module, batch: Batch) -> float:
        x, y = batch
        return (model(x, y) - dmmse_predictions(x, y, tasks.to(x), noise_variance)).square().mean().item()

    return distance_to_dmmse


def dmmse_predictions(x: Tensor, y: Tensor, tasks: Tensor, noise_variance: float) -> Tensor:
    """Posterior mean of each y_k given the pairs before it, for M equally likely tasks.

    Args:
        x: shape (batch, K, D).
        y: shape (batch, K).
        tasks: shape (M, D).
        noise_variance: σ².

    Returns:
        Predictions of shape (batch, K); the first is that of the tasks' mean.
    """
    by_task = x @ tasks.mT
    misfit = (y.unsqueeze(-1) - by_task).square()
    before = misfit.cumsum(1) - misfit
    return ((-before / (2 * noise_variance)).softmax(-1) * by_task).sum(-1)
