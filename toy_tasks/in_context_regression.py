"""In-context linear regression: a transformer that learns to fit a line it is shown (Garg et al. 2022).

The model, the data and the scores are those of Hoogland et al. (arXiv 2402.02364), at any size. Their run (width 64,
500,000 steps) has five stages, A A B B A: it learns the task prior (ŷ = 0), then in-context learning, then its layer
norms and unembedding collapse while the loss hardly moves. At width 32 a type A ends by about step 1,000, and a type
B follows (experiments/demo_seeds.py).

With M tasks instead of ever new ones there are two ways to predict, ridge regression and the discrete estimator dMMSE
(Raventós et al. 2023, arXiv 2306.15063), and between few and many tasks lies a range where a transformer first comes
near ridge and then turns to dMMSE (Carroll et al. 2025, arXiv 2501.17745). Measured at width 32 with `training`, one
seed each, about 18 ms a step: with M = 8 it is nearer to dMMSE from step 500 on (distances 0.36 and 0.65 from ridge at
4,200, loss 1.25, where ridge has 1.71 and dMMSE 0.90, and 3.3 on new tasks); with M = 128 it is nearer to ridge up to
step 9,800 at least (0.32, and 0.63 from dMMSE; loss 1.98, and 2.02 on new tasks).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from phasewatch.toy_tasks.ensemble import Ensemble, steps_together
from phasewatch.toy_tasks.regression_estimators import Batch, dmmse_distance, ridge_distance
from phasewatch.toy_tasks.steps import steps as one_by_one


@dataclass(frozen=True)
class RegressionData:
    """Sequences of K pairs (x, y) with y = w·x + noise, a task w drawn for each sequence.

    Called as `data(generator, batch_size)`, it returns x of shape (batch, K, D) and y of shape (batch, K).

    Attributes:
        dimensions: D, the length of x.
        examples: K, the pairs in a sequence.
        noise_variance: the variance σ² of the noise on y.
        input_scale: variance g of each coordinate of x; 1 in training, more for inputs out of distribution.
        task_scale: variance of each coordinate of w; 1 in training, more for tasks out of distribution.
        tasks: M, how many different tasks there are, all as likely (Raventós et al. 2023); a new one for each sequence
            if not given.
        task_seed: of the M tasks.
    """

    dimensions: int = 4
    examples: int = 8
    noise_variance: float = 0.125
    input_scale: float = 1.0
    task_scale: float = 1.0
    tasks: int | None = None
    task_seed: int = 0

    @cached_property
    def task_vectors(self) -> Tensor | None:
        """The M tasks, shape (M, D), or None where there is no end of them."""
        if self.tasks is None:
            return None
        generator = Generator().manual_seed(self.task_seed)
        return math.sqrt(self.task_scale) * torch.randn(self.tasks, self.dimensions, generator=generator)

    def __call__(self, generator: Generator, batch_size: int) -> Batch:
        """Draw a batch on the generator's device."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=generator.device)

        x = math.sqrt(self.input_scale) * normal(batch_size, self.examples, self.dimensions)
        if self.task_vectors is None:
            w = math.sqrt(self.task_scale) * normal(batch_size, self.dimensions, 1)
        else:
            which = torch.randint(len(self.task_vectors), (batch_size,), generator=generator, device=generator.device)
            w = self.task_vectors.to(generator.device)[which].unsqueeze(-1)
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


def training(model: nn.Module, data: RegressionData, *, seed: int = 0, steps: int | None = None) -> Iterator[int]:
    """Train a model in place with Adam, batch 256, and a learning rate of 3e-3 or up to it.

    Args:
        model: such as `RegressionTransformer(width=32)`, or an `Ensemble` of them, each member on batches of its own.
        data: where the batches are drawn from.
        seed: of the batches, which are drawn on the model's device.
        steps: of a run by the published schedule (500,000 there), whose learning rate rises linearly to 3e-3 at its
            middle and falls back linearly; if not given, the rate is constant, the recipe for width 32.

    Yields:
        The number of steps taken so far, after each of them, without end if `steps` isn't given.
    """
    device = next(model.parameters()).device
    rate = torch.tensor(3e-3, device=device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=on_gpu, fused=on_gpu)

    def set_rate(taken: int) -> None:
        rate.fill_(3e-3 if steps is None else 3e-3 * (1 - abs(2 * (taken + 1) / (steps + 1) - 1)))

    set_rate(0)
    if isinstance(model, Ensemble):
        trained = steps_together(model, data, optimizer, 256, seed)
    else:
        trained = one_by_one(model, loss, data, optimizer, 256, seed)
    for step in islice(trained, steps):
        set_rate(step)
        yield step


def icl_score(model: nn.Module, batch: Batch) -> float:
    """In-context learning score: error at the last example minus error at the first; more negative is more learning."""
    x, y = batch
    error = (model(x, y) - y).square().mean(0)
    return (error[-1] - error[0]).item()


def task_prior_score(model: nn.Module, batch: Batch) -> float:
    """E‖ŷ‖²: 0 for a model that predicts the mean of the task prior, whatever it is shown."""
    return model(*batch).square().mean().item()


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
    """The scores of arXiv 2402.02364 as metrics of a probe, by name, and with M tasks those of Raventós et al. (2023).

    Args:
        data: the training data, whose size and noise the scores share.

    Returns:
        Metrics for `Probe(metrics=...)`: in-context score, task prior, distance to ridge, and the loss on inputs and on
        tasks of four times the variance. With M tasks also the distance to dMMSE and the loss on tasks that aren't
        among the M.
    """
    shape = {"dimensions": data.dimensions, "examples": data.examples, "noise_variance": data.noise_variance}
    metrics = {
        "icl_score": icl_score,
        "task_prior": task_prior_score,
        "ridge_distance": ridge_distance(data.noise_variance),
        "ood_inputs": out_of_distribution(RegressionData(**shape, input_scale=4.0)),
        "ood_tasks": out_of_distribution(RegressionData(**shape, task_scale=4.0)),
    }
    if data.task_vectors is not None:
        metrics["dmmse_distance"] = dmmse_distance(data.task_vectors, data.noise_variance)
        metrics["new_tasks"] = out_of_distribution(RegressionData(**shape))
    return metrics
