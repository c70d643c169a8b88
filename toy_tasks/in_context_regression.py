"""In-context linear regression: a transformer that learns to fit a line it is shown (Garg et al. 2022).

The model, the data and the scores are those of Hoogland et al. (arXiv 2402.02364), at any size. Their run (width 64,
500,000 steps) has five stages, A A B B A: it learns the task prior (ŷ = 0), then in-context learning, then its layer
norms and unembedding collapse while the loss hardly moves. At width 32 a type A ends by about step 1,000, and a type
B follows (experiments/demo_seeds.py).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RegressionData:
    """Sequences of K pairs (x, y) with y = w·x + noise, a new task w for each sequence.

    Called as `data(generator, batch_size)`, it returns x of shape (batch, K, D) and y of shape (batch, K).

    Attributes:
        dimensions: D, the length of x.
        examples: K, the pairs in a sequence.
        noise_variance: the variance σ² of the noise on y.
        input_scale: variance g of each coordinate of x; 1 in training, more for inputs out of distribution.
        task_scale: variance of each coordinate of w; 1 in training, more for tasks out of distribution.
    """

    dimensions: int = 4
    examples: int = 8
    noise_variance: float = 0.125
    input_scale: float = 1.0
    task_scale: float = 1.0

    def __call__(self, generator: Generator, batch_size: int) -> Batch:
        """Draw a batch on the generator's device."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=generator.device)

        x = math.sqrt(self.input_scale) * normal(batch_size, self.examples, self.dimensions)
        w = math.sqrt(self.task_scale) * normal(batch_size, self.dimensions, 1)
        noise = math.sqrt(self.noise_variance) * normal(batch_size, self.examples)
        return x, (x @ w).squeeze(-1) + noise


class RegressionTransformer(HookedRootModule):
    """A causal transformer that reads x₁ y₁ x₂ y₂ … and predicts each y_k from what came before it.

    Each token has D + 1 numbers: (0, x) or (y, 0). The prediction is the first of the D + 1 outputs at the token of
    x_k. With the defaults it has 51,717 parameters, as published: biases in the MLPs, the layer norms and the
    unembedding alone.

    Args:
        dimensions: D, the length of x.
        examples: K, the most pairs in a sequence.
        layers: number of transformer blocks.
        heads: attention heads in a block; must divide `width`.
        width: size of the residual stream.
        mlp_width: hidden size of the MLPs; `width` if not given.
    """

    def __init__(
        self,
        dimensions: int = 4,
        examples: int = 8,
        *,
        layers: int = 2,
        heads: int = 4,
        width: int = 64,
        mlp_width: int | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"RegressionTransformer(width={width}, heads={heads}): the heads must divide the width.")
        self.embed = nn.Linear(dimensions + 1, width, bias=False)
        self.positions = nn.Parameter(torch.randn(2 * examples, width) / math.sqrt(width))
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width or width) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, dimensions + 1)
        self.setup()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Predict every y from its own x and the pairs before it.

        Args:
            x: shape (batch, K, D).
            y: shape (batch, K).

        Returns:
            ŷ of shape (batch, K).
        """
        x_tokens = F.pad(x, (1, 0))
        y_tokens = F.pad(y.unsqueeze(-1), (0, x.shape[-1]))
        tokens = torch.stack((x_tokens, y_tokens), dim=-2).flatten(-3, -2)
        residual = self.hook_embed(self.embed(tokens) + self.positions[: tokens.shape[-2]])
        for block in self.blocks:
            residual = block(residual)
        return self.unembed(self.ln_final(residual))[..., ::2, 0]


class Block(nn.Module):
    """Causal attention and an MLP, each reading the residual stream through a layer norm and adding to it."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.ln2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.hook_attn_out = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, residual: Tensor) -> Tensor:
        """Shape (batch, position, width) in and out."""
        residual = residual + self.hook_attn_out(self.attn(self.ln1(residual)))
        residual = residual + self.hook_mlp_out(self.mlp_out(F.relu(self.mlp_in(self.ln2(residual)))))
        return self.hook_resid_post(residual)


class CausalAttention(nn.Module):
    """Multi-head attention to the present and the past, with its pattern at a hook point."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.hook_pattern = HookPoint()

    def forward(self, residual: Tensor) -> Tensor:
        """Shape (batch, position, width) in and out."""
        q, k, v = self.qkv(residual).unflatten(-1, (3, self.heads, -1)).movedim(-4, -2).unbind(-4)
        future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
        pattern = self.hook_pattern(scores.softmax(-1))
        return self.out((pattern @ v).movedim(-3, -2).flatten(-2))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of ŷ over the batch and the K positions."""
    x, y = batch
    return F.mse_loss(model(x, y), y)


def training(model: nn.Module, data: RegressionData, *, seed: int = 0) -> Iterator[int]:
    """Train a model in place, by the recipe for width 32: Adam, constant learning rate 3e-3, batch 256.

    Args:
        model: such as `RegressionTransformer(width=32)`.
        data: where the batches are drawn from.
        seed: of the batches.

    Yields:
        The number of steps taken so far, after each of them, without end.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = Generator().manual_seed(seed)
    for step in count(1):
        optimizer.zero_grad()
        loss(model, data(generator, 256)).backward()
        optimizer.step()
        yield step


def icl_score(model: nn.Module, batch: Batch) -> float:
    """In-context learning score: error at the last example minus error at the first; more negative is more learning."""
    x, y = batch
    error = (model(x, y) - y).square().mean(0)
    return (error[-1] - error[0]).item()


def task_prior_score(model: nn.Module, batch: Batch) -> float:
    """E‖ŷ‖²: 0 for a model that predicts the mean of the task prior, whatever it is shown."""
    return model(*batch).square().mean().item()


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


def out_of_distribution(
    data: RegressionData, *, size: int = 1024, seed: int = 0
) -> Callable[[nn.Module, Batch], float]:
    """A metric: the loss on a fixed batch of other data, such as `RegressionData(input_scale=4)`.

    Args:
        data: where the batch is drawn from.
        size: sequences in the batch.
        seed: seed of the draw.

    Returns:
        The metric, which takes a model and a batch and looks at the model alone.
    """

    def out_of_distribution_loss(model: nn.Module, batch: Batch) -> float:
        device = batch[0].device
        x, y = data(Generator().manual_seed(seed), size)
        return loss(model, (x.to(device), y.to(device))).item()

    return out_of_distribution_loss


def published_metrics(data: RegressionData) -> dict[str, Callable[[nn.Module, Batch], float]]:
    """The scores of arXiv 2402.02364 as metrics of a probe, by name.

    Args:
        data: the training data, whose size and noise the scores share.

    Returns:
        Metrics for `Probe(metrics=...)`: in-context score, task prior, distance to ridge, and the loss on inputs and on
        tasks of four times the variance.
    """
    shape = {"dimensions": data.dimensions, "examples": data.examples, "noise_variance": data.noise_variance}
    return {
        "icl_score": icl_score,
        "task_prior": task_prior_score,
        "ridge_distance": ridge_distance(data.noise_variance),
        "ood_inputs": out_of_distribution(RegressionData(**shape, input_scale=4.0)),
        "ood_tasks": out_of_distribution(RegressionData(**shape, task_scale=4.0)),
    }
