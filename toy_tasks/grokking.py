"""Grokking: a perceptron that memorises a table of additions, and much later finds the rule (Power et al. 2022).

It learns a + b mod p from a share of all p² pairs. Weight decay then prefers the rule, which Nanda et al. (2023) found
to be written in Fourier components: logits that depend on a + b − c alone. How much of the model that rule already is
shows long before the test loss does.

Measured with the defaults and `training` on three seeds, about 2 ms a step: all training pairs are right by step 1,000
and at most 0.2 % of the test pairs; half of these are right by step 2,200 to 3,000, and 98 % by 3,100 to 5,000. The
rule's share of the logits is 0.03 to 0.06 at step 1,000, 0.18 to 0.45 at 2,000 and above 0.9 at 7,000.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from phasewatch.toy_tasks.steps import steps

Batch = tuple[Tensor, Tensor]
Metric = Callable[[nn.Module, Batch], float]


@dataclass(frozen=True)
class AdditionData:
    """All pairs (a, b) with their sum mod p, split at random into those that are trained on and those that aren't.

    Called as `data(generator, batch_size)`, it returns training pairs of shape (batch, 2), drawn with replacement, and
    their sums of shape (batch,).

    Attributes:
        modulus: p.
        train_share: of the p² pairs.
        split_seed: which pairs those are.
    """

    modulus: int = 53
    train_share: float = 0.4
    split_seed: int = 0

    @cached_property
    def table(self) -> Batch:
        """All pairs in order, of shape (p², 2), and their sums mod p, of shape (p²,)."""
        pairs = torch.cartesian_prod(torch.arange(self.modulus), torch.arange(self.modulus))
        return pairs, pairs.sum(-1) % self.modulus

    @cached_property
    def train(self) -> Batch:
        """The pairs that are trained on, and their sums."""
        return self._rows(self._order[: self._train_size])

    @cached_property
    def test(self) -> Batch:
        """The pairs that are held out, and their sums."""
        return self._rows(self._order[self._train_size :])

    def __call__(self, generator: Generator, batch_size: int) -> Batch:
        """Draw a batch on the generator's device."""
        x, y = (part.to(generator.device) for part in self.train)
        rows = torch.randint(len(x), (batch_size,), generator=generator, device=generator.device)
        return x[rows], y[rows]

    @property
    def _order(self) -> Tensor:
        return torch.randperm(self.modulus**2, generator=Generator().manual_seed(self.split_seed))

    @property
    def _train_size(self) -> int:
        return round(self.train_share * self.modulus**2)

    def _rows(self, rows: Tensor) -> Batch:
        x, y = self.table
        return x[rows], y[rows]


class AdditionMLP(nn.Module):
    """Embeds both numbers, adds what a linear layer each makes of them, and reads the sum off after a GELU.

    With the defaults it has 16,928 parameters.

    Args:
        modulus: p.
        embedding: size of a number's embedding, one table for both.
        hidden: size of the hidden layer.
    """

    def __init__(self, modulus: int = 53, *, embedding: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(modulus, embedding)
        self.left = nn.Linear(embedding, hidden)
        self.right = nn.Linear(embedding, hidden)
        self.unembed = nn.Linear(hidden, modulus, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits of shape (..., p) from pairs of shape (..., 2)."""
        a, b = self.embed(pairs).unbind(-2)
        return self.unembed(F.gelu(self.left(a) + self.right(b)))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the sums, in nats."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def training(model: nn.Module, data: AdditionData, *, seed: int = 0) -> Iterator[int]:
    """Train a model in place: AdamW, learning rate 5e-3, weight decay 0.5, batch 128.

    Args:
        model: such as `AdditionMLP()`.
        data: where the batches are drawn from.
        seed: of the batches, which are drawn on the model's device.

    Yields:
        The number of steps taken so far, after each of them, without end.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.5)
    yield from steps(model, loss, data, optimizer, 128, seed)


def accuracy(model: nn.Module, batch: Batch) -> float:
    """Share of the sums that have the largest logit."""
    x, y = batch
    return (model(x).argmax(-1) == y).double().mean().item()


def rule_logits(logits: Tensor) -> Tensor:
    """The part of a whole table's logits that depends on a + b − c alone: their mean over all a, b, c that share it.

    It is their projection on the waves cos and sin of 2πk(a + b − c)/p over all frequencies k; Nanda et al. (2023)
    keep only those that the trained model uses.

    Args:
        logits: of c for each pair in the order of `AdditionData.table`, shape (p², p).

    Returns:
        Shape (p², p).
    """
    p = logits.shape[-1]
    a, b = (part.to(logits.device) for part in torch.cartesian_prod(torch.arange(p), torch.arange(p)).mT)
    difference = (a[:, None] + b[:, None] - torch.arange(p, device=logits.device)) % p
    means = torch.zeros(p, dtype=logits.dtype, device=logits.device).index_add(
        0, difference.flatten(), logits.flatten()
    )
    return (means / p**2)[difference]


def rule_share(data: AdditionData) -> Metric:
    """A metric of progress: how much of the variance of the logits over the whole table the rule explains.

    Args:
        data: the training data.

    Returns:
        The metric, which looks at the model alone: 1/p² for logits at random, 1 for the rule itself.
    """

    def share_of_rule(model: nn.Module, batch: Batch) -> float:
        pairs, _ = _on_device(data.table, model)
        logits = model(pairs)
        centred = logits - logits.mean(-1, keepdim=True)  # what all answers share isn't seen by the softmax
        return (rule_logits(centred).square().sum() / centred.square().sum()).item()

    return share_of_rule


def metrics(data: AdditionData) -> dict[str, Metric]:
    """Loss and accuracy on all training and all test pairs, and the progress measure, as metrics of a probe, by name.

    Args:
        data: the training data.

    Returns:
        Metrics for `Probe(metrics=...)`, which look at the model alone.
    """
    return {
        "train_loss": lambda model, batch: loss(model, _on_device(data.train, model)).item(),
        "test_loss": lambda model, batch: loss(model, _on_device(data.test, model)).item(),
        "train_accuracy": lambda model, batch: accuracy(model, _on_device(data.train, model)),
        "test_accuracy": lambda model, batch: accuracy(model, _on_device(data.test, model)),
        "rule_share": rule_share(data),
    }


def _on_device(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    x, y = batch
    return x.to(device), y.to(device)
