"""The emergence law on a toy task: finetune early checkpoints, predict when the untuned model leaves chance, then look.

    python experiments/emergence_law.py            # about a minute on one CPU core

A perceptron is pretrained on twelve sparse parities at once (after Michaud et al. 2023, arXiv 2303.13506), each named
by a control bit and rarer than the one before. One of them is the target. Checkpoints from before the model leaves
chance on it are finetuned on growing numbers of its examples, and the law is fitted to their accuracies against the
pretraining loss. Its onset for a handful of examples is the loss at which the untuned model should leave chance; the
pretraining goes on, and shows where it did.

Measured on seeds 0 and 1: the untuned model leaves chance at step 1,273. From checkpoints down to 0.012 nats before
that, the law says steps 1,153 and 1,051, and its intervals hold the truth. From 0.024 nats before it is off by 0.3 nats
and more, and its interval misses the truth by 0.01 nats in one seed of two; from 0.05 nats before it misses in both.
Here finetuning acts like so many more examples of pretraining, so that the elbow hardly moves below a thousand of them:
alpha would have to be far above 1, where the published law and the prior have it.
"""

import argparse
from copy import deepcopy

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from phasewatch import PhasewatchError, emergence

TASKS, BITS, RELEVANT = 12, 24, 2

AMOUNTS = (125, 250, 500, 1000, 2000, 4000)
"""Examples of the target that a checkpoint is finetuned on, each seen once."""

FIRST = 250
"""The first checkpoint. A fresh model learns the target faster than one that has begun on the commoner tasks, so that
earlier checkpoints break the law's assumption that a lower pretraining loss is better."""

TOGETHER = 50
"""Examples in a step of finetuning."""

FEW = 50
"""Examples, of one step, for which the law's onset stands for the untuned model."""


def batch(generator: Generator, size: int, task: int | None = None) -> tuple[Tensor, Tensor]:
    """Control bits and task bits of shape (size, TASKS + BITS), and labels of shape (size,).

    Task k is the parity of its own bits 2k mod BITS and the next, and comes with a frequency of (k + 1)**-1.6.
    """
    frequency = (1.0 + torch.arange(TASKS)) ** -1.6
    tasks = torch.multinomial(frequency, size, replacement=True, generator=generator)
    if task is not None:
        tasks = torch.full((size,), task)
    x = 2.0 * torch.randint(2, (size, BITS), generator=generator) - 1
    own = (RELEVANT * tasks[:, None] + torch.arange(RELEVANT)) % BITS
    label = (x.gather(1, own).prod(1) + 1) / 2
    return torch.cat([F.one_hot(tasks, TASKS).float(), x], dim=1), label


def make_model(seed: int) -> nn.Module:
    """A hidden layer of 256."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(TASKS + BITS, 256), nn.ReLU(), nn.Linear(256, 1), nn.Flatten(0))


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step of gradient descent."""
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(model(x), y).backward()
    optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right labels."""
    return float(((model(x) > 0) == (y > 0.5)).float().mean())


def finetuned(model: nn.Module, amount: int, task: int, held: tuple[Tensor, Tensor], seed: int) -> float:
    """The accuracy on held-out examples after finetuning a copy."""
    copy = deepcopy(model)
    optimizer = torch.optim.Adam(copy.parameters(), lr=1e-3)
    x, y = batch(Generator().manual_seed(seed), amount, task)
    for own in torch.arange(amount).split(TOGETHER):
        step_on(copy, optimizer, x[own], y[own])
    return accuracy(copy, *held)


def main() -> None:
    """Pretrain, finetune, predict, look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--task", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, generator = make_model(options.seed), Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    every = batch(Generator().manual_seed(1), 8000)
    held = batch(Generator().manual_seed(2), 2000, options.task)
    at = {int(step) for step in np.geomspace(FIRST, options.steps, 30).round()}
    loss, untuned, tuned, steps = [], [], [], []
    for step in range(1, options.steps + 1):
        step_on(model, optimizer, *batch(generator, 1000))
        if step in at:
            steps.append(step)
            with torch.no_grad():
                loss.append(float(F.binary_cross_entropy_with_logits(model(every[0]), every[1])))
            untuned.append(accuracy(model, *held))
            tuned.append([finetuned(model, amount, options.task, held, step) for amount in AMOUNTS])
            print(f"step {step:5d}  loss {loss[-1]:.3f}  untuned {untuned[-1]:.3f}  finetuned", *np.round(tuned[-1], 3))
    left = next((i for i, score in enumerate(untuned) if score > 0.5 + 0.1 * 0.5), None)
    if left is None:
        print("The untuned model never left chance; train longer.")
        return
    print(f"\nThe untuned model left chance at step {steps[left]}, at a loss of {loss[left]:.3f}.")
    for before in (1, 2, 4):
        known = slice(0, left - before + 1)
        grid, amounts = np.meshgrid(loss[known], AMOUNTS, indexing="ij")
        try:
            law = emergence.EmergenceLaw.fit(grid.ravel(), amounts.ravel(), np.array(tuned[known]).ravel(), chance=0.5)
            onset = law.onset(amount=FEW)
            when = np.interp(-onset.median, -np.minimum.accumulate(loss), steps)
            print(f"From checkpoints down to a loss of {loss[left - before]:.3f}: {onset}, which is step {when:.0f}.")
        except PhasewatchError as no:
            print(f"From checkpoints down to a loss of {loss[left - before]:.3f}: {no}")


if __name__ == "__main__":
    main()
