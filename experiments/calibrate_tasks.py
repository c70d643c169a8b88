"""Does calibration need help? Ten small tasks, each trained here and calibrated from three of its snapshots.

Claim: on all ten, `calibrate` chooses settings without help and within its default budget, and the estimate at the last
snapshot is usable: it doesn't diverge, drift or drown in noise, and it changes by 12 % at most with steps half or twice
as long. Verdicts other than OK and LOCALIZED remain at early snapshots at no minimum, which no sampler mends. λ̂ is not
flat in nβ at a fixed γ, by up to 56 %, and by more where steps at twice nβ are too long: in as few steps as the budget
allows, chains settle only where γ holds the softer directions back. Where the truth is known, it is 24.1 of 25 and 16.1
of 16.5.

For each task: what was chosen; λ̂ and its verdict at the three snapshots, from a seed that the calibration didn't see;
what λ̂ at the last snapshot changes by with ε, or nβ, halved and doubled and all else the same; the gradient evaluations
that the calibration and then each point take. Costs about half an hour on a core.

    python experiments/calibrate_tasks.py [--quick] [--only NAME] [--tables]
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from command_line import command_line
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from phasewatch import Langevin, PhasewatchError, PhasewatchWarning, Probe, Snapshot, calibrate
from phasewatch.monitor.formatting import integer, value_and_error
from phasewatch.monitor.probing.calibration import Calibration
from phasewatch.toy_tasks import deep_linear, in_context_regression, induction


@dataclass(frozen=True)
class Task:
    """A model to train, and what is known of it.

    Attributes:
        name: in the table.
        make: builds the model.
        loss: of the model on a batch.
        data: tensors with the sample axis first, or a function that draws a batch.
        steps: of Adam.
        rate: its learning rate.
        decay: its weight decay.
        batch: samples in a batch of training.
        minibatch: samples in a minibatch of the chains.
        truth: the learning coefficient where training ends, from the model there.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    data: Any
    steps: int
    rate: float = 3e-3
    decay: float = 0.0
    batch: int = 256
    minibatch: int = 64
    truth: Callable[[Any], float] = lambda model: math.nan

    def snapshots(self, share: float) -> tuple[list[Snapshot], nn.Module]:
        """Train, and keep an early, a middle and a late snapshot.

        Args:
            share: of the steps to take.
        """
        torch.manual_seed(0)
        model, draw, last = self.make(), Generator().manual_seed(1), max(round(share * self.steps), 20)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=self.decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 4 * (1 - step / last)))
        kept, wanted = [], {last // 20, last // 4, last}
        for step in range(1, last + 1):
            optimizer.zero_grad()
            self.loss(model, self._batch(draw)).backward()
            optimizer.step()
            schedule.step()
            if step in wanted:
                kept.append(Snapshot.of(model, step))
        return kept, model

    def _batch(self, draw: Generator) -> Any:
        if callable(self.data):
            return self.data(draw, self.batch)
        first = next(iter(self.data.values())) if isinstance(self.data, dict) else self.data[0]
        rows = torch.randint(len(first), (self.batch,), generator=draw)
        if isinstance(self.data, dict):
            return {name: tensor[rows] for name, tensor in self.data.items()}
        return tuple(tensor[rows] for tensor in self.data)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Of classes."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def bigrams(vocabulary: int, length: int) -> Callable[[Generator, int], Tensor]:
    """Sequences of a fixed random Markov chain."""
    table = (2 * torch.randn(vocabulary, vocabulary, generator=Generator().manual_seed(2))).softmax(-1)

    def draw(generator: Generator, batch_size: int) -> Tensor:
        tokens = [torch.randint(vocabulary, (batch_size,), generator=generator)]
        for _ in range(length - 1):
            tokens.append(torch.multinomial(table[tokens[-1]], 1, generator=generator).squeeze(-1))
        return torch.stack(tokens, dim=1)

    return draw


def gpt2() -> nn.Module:
    """A Hugging Face GPT-2 from a config."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=32, n_layer=2, n_head=2))


def gpt2_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As the Trainer takes it."""
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def linear_data(samples: int) -> tuple[Tensor, Tensor]:
    """50 inputs of unequal variance, one noisy output."""
    draw = Generator().manual_seed(3)
    x = torch.randn(samples, 50, generator=draw) * torch.linspace(0.5, 1.5, 50)
    return x, x @ torch.randn(50, 1, generator=draw) + torch.randn(samples, 1, generator=draw)


def labelled(samples: int) -> tuple[Tensor, Tensor]:
    """Points in 10 dimensions, labelled by a random network that isn't sure."""
    draw = Generator().manual_seed(4)
    x, hidden = torch.randn(samples, 10, generator=draw), torch.randn(10, 16, generator=draw)
    logits = (x @ hidden).tanh() @ torch.randn(16, 4, generator=draw)
    return x, torch.multinomial(logits.softmax(-1), 1, generator=draw).squeeze(-1)


def images(samples: int) -> tuple[Tensor, Tensor]:
    """Waves of 8 by 8 pixels in four orientations, under noise."""
    draw = Generator().manual_seed(5)
    y = torch.randint(4, (samples,), generator=draw)
    angle, phase = y * math.pi / 4, 2 * math.pi * torch.rand(samples, generator=draw)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    along = angle.cos()[:, None, None] * row + angle.sin()[:, None, None] * column
    x = (1.5 * along + phase[:, None, None]).sin() + torch.randn(samples, 8, 8, generator=draw)
    return x.unsqueeze(1), y


def cnn() -> nn.Module:
    """Two convolutions, a pool and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


class Factorisation(nn.Module):
    """A 30 by 30 matrix as a product of rank 4, where two suffice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(30, 4), nn.Embedding(30, 4)

    def forward(self, places: Tensor) -> Tensor:
        """Entries of shape (sample, 1) at places of shape (sample, 2)."""
        return (self.left(places[:, 0]) * self.right(places[:, 1])).sum(-1, keepdim=True)


def entries(samples: int) -> tuple[Tensor, Tensor]:
    """Noisy entries of a matrix of rank 2."""
    draw = Generator().manual_seed(6)
    matrix = torch.randn(30, 2, generator=draw) @ torch.randn(2, 30, generator=draw)
    places = torch.randint(30, (samples, 2), generator=draw)
    values = matrix[places[:, 0], places[:, 1]].unsqueeze(-1)
    return places, values + torch.randn(values.shape, generator=draw)


class Recurrent(nn.Module):
    """A GRU that reads bits and says a class at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(1, 12, batch_first=True), nn.Linear(12, 2)

    def forward(self, bits: Tensor) -> Tensor:
        """Logits of shape (sample, 2) from bits of shape (sample, time, 1)."""
        return self.out(self.gru(bits)[0][:, -1])


def bit_strings(samples: int) -> tuple[Tensor, Tensor]:
    """Whether the ones outnumber the zeros, one answer in ten wrong."""
    draw = Generator().manual_seed(7)
    bits = torch.randint(2, (samples, 9, 1), generator=draw)
    wrong = torch.rand(samples, generator=draw) < 0.1
    return bits.float(), ((bits.sum((1, 2)) > 4) ^ wrong).long()


class Addition(nn.Module):
    """Adds two numbers modulo 23 by a hidden layer over their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.body = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 23))

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits of shape (sample, 23) from pairs of shape (sample, 2)."""
        return self.body(self.embed(pairs).flatten(1))


def sums(share: float) -> tuple[Tensor, Tensor]:
    """A share of all pairs."""
    pairs = torch.cartesian_prod(torch.arange(23), torch.arange(23))
    kept = torch.randperm(len(pairs), generator=Generator().manual_seed(8))[: round(share * len(pairs))]
    return pairs[kept], pairs[kept].sum(1) % 23


def deep_linear_data() -> tuple[Tensor, Tensor]:
    """Targets of a matrix of rank 2, without noise."""
    draw = Generator().manual_seed(9)
    x, y = deep_linear.regression_data(deep_linear.low_rank_matrix(6, 6, 2, draw), 4096, draw)
    return x.float(), y.float()


TASKS = [
    Task(
        "linear regression",
        lambda: nn.Linear(50, 1, bias=False),
        deep_linear.loss,
        linear_data(4096),
        600,
        rate=1e-2,
        batch=4096,
        truth=lambda _: 25.0,
    ),
    Task(
        "deep linear",
        lambda: deep_linear.DeepLinear((6, 6, 6)),
        deep_linear.loss,
        deep_linear_data(),
        2000,
        rate=1e-2,
        truth=deep_linear.local_llc,
    ),
    Task("factorisation", Factorisation, deep_linear.loss, entries(8192), 1500, rate=1e-2),
    Task(
        "classifier",
        lambda: nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)),
        cross_entropy,
        labelled(8192),
        1500,
    ),
    Task("convolutions", cnn, cross_entropy, images(4096), 600),
    Task("modular addition", Addition, cross_entropy, sums(0.8), 3000, rate=5e-3, decay=0.1, batch=128),
    Task("recurrent", Recurrent, cross_entropy, bit_strings(4096), 800),
    Task(
        "bigrams, attention",
        lambda: induction.make_model(3, heads=2, width=32, vocabulary=16, context=16),
        induction.loss,
        bigrams(16, 16),
        600,
    ),
    Task("bigrams, GPT-2", gpt2, gpt2_loss, {"input_ids": bigrams(16, 16)(Generator().manual_seed(10), 8192)}, 400),
    Task(
        "in-context regression",
        lambda: in_context_regression.RegressionTransformer(width=32),
        in_context_regression.loss,
        in_context_regression.RegressionData(),
        1000,
    ),
]


def calibrate_and_report(task: Task, share: float, budget: int, *, tables: bool) -> str:
    """Train, calibrate, and say what came of it.

    Args:
        task: which.
        share: of its training steps to take.
        budget: for `calibrate`.
        tables: print what `calibrate` tried as well.

    Returns:
        Lines of a table.
    """
    snapshots, model = task.snapshots(share)
    probe = Probe(task.make(), task.loss, task.data, sampler=Langevin(batch_size=task.minibatch), threads=1)
    calibrations: list[Calibration] = []
    started = time.monotonic()
    try:
        sampler = calibrate(snapshots, probe, budget=budget, show=calibrations.append)
    except PhasewatchError as error:
        return f"{task.name}: {error}"
    finally:
        if tables:
            print(f"\n{task.name}", *calibrations, sep="\n", flush=True)
    took = time.monotonic() - started
    (calibration,) = calibrations
    assert calibration.chosen is not None
    fresh = Probe(task.make(), task.loss, task.data, sampler=sampler, seed=1, threads=1)
    points = [fresh(snapshot) for snapshot in snapshots]
    level, eps = points[-1].llc.value, sampler.step_size or math.nan
    others = {
        "ε/2": replace(sampler, step_size=eps / 2),
        "2ε": replace(sampler, step_size=2 * eps),
        "nβ/2": replace(sampler, nbeta=sampler.nbeta / 2),
        "2nβ": replace(sampler, nbeta=2 * sampler.nbeta),
    }
    changes = [
        f"{name} {100 * (fresh.with_sampler(other)(snapshots[-1]).llc.value / level - 1):+.0f} %"
        for name, other in others.items()
    ]
    found = [f"{value_and_error(p.llc.value, p.llc.error)} {p.llc.health.name.lower()}" for p in points]
    truth = task.truth(model)
    return "\n    ".join(
        [
            f"{task.name}, {probe.subject.model.size} parameters" + ("" if math.isnan(truth) else f", truth {truth:g}"),
            f"ε {eps:g}, γ {sampler.localization:g}, nβ {sampler.nbeta:g}, "
            f"{sampler.chains} chains of {sampler.burn_in} + {sampler.draws}",
            "λ̂  " + ",  ".join(found),
            "changes  " + ",  ".join(changes),
            f"cost  {integer(calibration.spent)} to calibrate ({took:.0f} s), "
            f"{integer(calibration.chosen.cost // len(points))} a point",
        ]
    )


def main() -> None:
    """Calibrate each task."""
    parser = command_line(__doc__, quick="train half as long, with half the budget")
    parser.add_argument("--only", default="", help="tasks with this in their name")
    parser.add_argument("--tables", action="store_true", help="print what was tried")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", PhasewatchWarning)  # the GRU's chains run one after another
    torch.set_num_threads(1)
    for task in TASKS:
        if arguments.only in task.name:
            share, budget = (0.5, 10_000) if arguments.quick else (1.0, 20_000)
            print(calibrate_and_report(task, share, budget, tables=arguments.tables), flush=True)


if __name__ == "__main__":
    main()
