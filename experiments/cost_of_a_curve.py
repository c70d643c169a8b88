"""What the points of a curve cost by the setting that `calibrate` chooses, and how well λ̂ and its changes are known.

A toy task is trained, and some 40 of its snapshots are kept, evenly spaced in log step. `calibrate` gets one from a
third, one from two thirds of them and the last. Then every snapshot is measured: by what it chose, by as few of those
chains as have an error of 2 % of the range, and by four chains of 12 draws. A row says what a point costs, the standard
error of λ̂ and that of the difference of neighbours as shares of λ̂'s range, and the stages that are found.

Measured on regression, seed 1: 598 gradients a point have an error of 1.4 % of the range in the median and 2.4 % at
most; between neighbours 0.4 %, within 1 % in 31 of 33. Six of these eight chains take 454: 1.7 %, and 0.5 % between
neighbours. Four chains of 12 draws take 179: 2.7 %, and 1.0 % between neighbours, within 1 % in 16 of 33. All find A,
A, B, the B from step 1,139 on. What sets the price of a level: a draw
scatters by about 1/√λ̂ of λ̂, and an independent one comes every nine steps (experiments/cost_of_a_point.py), so that
2 % of a λ̂ of 65 take some 8 chains of 19 + 45 steps. Kept minibatches, curvature and noise take a sixth more.

On induction, seed 0, at four snapshots alone (steps 23, 284, 2,839, 3,500): chains of 19 + 10 steps, which the error
would allow, drift; 6 of 19 + 29 don't, cost 432, and have errors of 0.3 to 0.8 % of the largest λ̂, 326, and of 0.14 %
for the difference of the last two. Its whole curve wasn't measured.

On the GPT-2 of 120,576 parameters, seed 0, every other snapshot: 4 chains of 19 + 25 steps cost 275, and have errors of
1.1 % of the range in the median and 1.7 % at most; between neighbours 0.5 %, within 1 % in 10 of 10. One A.

Costs about half an hour on a core.

    python experiments/cost_of_a_curve.py [--task regression|induction|gpt2] [--seed 0] [--every 1] [--quick]
"""

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import command_line
from scipy.special import stdtrit
from tables import kinds, markdown, stretches
from torch import Tensor, nn

from phasewatch import Point, Probe, Snapshot, Trajectory, calibrate, difference, find_transitions, log_spaced
from phasewatch.monitor.sampling.chains import gradients_of_a_point
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.toy_tasks import in_context_regression as regression
from phasewatch.toy_tasks import induction

SHORT = {"chains": 4, "draws": 12}

ASKED = 0.02
"""The standard error of λ̂ that is asked for, as a share of its range."""


@dataclass(frozen=True)
class Task:
    """What is trained, and for how long."""

    make_model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    data: Callable[[torch.Generator, int], Any]
    training: Callable[..., Iterator[int]]
    steps: int

    def snapshots(self, seed: int, steps: int) -> list[Snapshot]:
        """Train, and keep the first weights and about 40 later ones."""
        torch.manual_seed(seed)
        model, at = self.make_model(), log_spaced(1, steps, num=40)
        kept = [Snapshot.of(model, 0)]
        for step in islice(self.training(model, self.data, seed=seed), steps):
            if at(step):
                kept.append(Snapshot.of(model, step))
        return kept


class SourceCode:
    """Windows of 64 bytes of the standard library's source."""

    @cached_property
    def text(self) -> Tensor:
        """All of it as bytes, shape (byte,)."""
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)

    def __call__(self, generator: torch.Generator, batch_size: int) -> dict[str, Tensor]:
        """Draw a batch, input_ids of shape (batch_size, 64)."""
        starts = torch.randint(len(self.text) - 64, (batch_size, 1), generator=generator)
        return {"input_ids": self.text[starts + torch.arange(64)].long()}


def gpt2() -> nn.Module:
    """A small Hugging Face GPT-2 for bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
    )


def gpt2_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Next-byte cross-entropy."""
    return model(**batch, labels=batch["input_ids"]).loss


def gpt2_training(
    model: nn.Module, data: Callable[[torch.Generator, int], dict[str, Tensor]], *, seed: int = 0
) -> Iterator[int]:
    """Train, and yield the steps done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    for step in count(1):
        loss = gpt2_loss(model, data(generator, 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


TASKS = {
    "regression": Task(
        make_model=partial(regression.RegressionTransformer, width=32),
        loss=regression.loss,
        data=regression.RegressionData(),
        training=regression.training,
        steps=7000,
    ),
    "induction": Task(
        make_model=induction.make_model,
        loss=induction.loss,
        data=induction.InductionData(),
        training=induction.training,
        steps=3500,
    ),
    "gpt2": Task(make_model=gpt2, loss=gpt2_loss, data=SourceCode(), training=gpt2_training, steps=2000),
}


def row(name: str, points: Sequence[Point], sampler: Sampler, gradients: int) -> dict[str, object]:
    """A line of the table; points that have no level don't count in its errors."""
    with_level = [point for point in points if point.llc.health.has_level]
    levels = np.array([(point.llc.value, point.llc.error) for point in with_level]).T
    span = np.ptp(levels[0])
    changes = np.array([difference(later.llc, earlier.llc).error for earlier, later in pairwise(with_level)])
    found = find_transitions(Trajectory(points))
    return {
        "setting": name,
        "chains": f"{sampler.chains} x ({sampler.burn_in} + {sampler.draws})",
        "gradients of a point": gradients,
        "range of λ̂": float(span),
        "error / range: median, worst": f"{np.median(levels[1]) / span:.2%}, {levels[1].max() / span:.2%}",
        "of difference: median, worst": f"{np.median(changes) / span:.2%}, {changes.max() / span:.2%}",
        "differences within 1 %": f"{(changes <= 0.01 * span).sum()} of {len(changes)}",
        "kinds": kinds(found),
        "steps": stretches(found),
    }


def chains_for(share: float, points: Sequence[Point], chains: int) -> int:
    """The fewest chains by which the error of the median point would be at most a share of λ̂'s range.

    Errors of k chains go as Student's factor of k − 1 degrees of freedom over the root of k.
    """
    with_level = [point.llc for point in points if point.llc.health.has_level]
    error = np.median([llc.error for llc in with_level]) / np.ptp([llc.value for llc in with_level])

    def factor(k: int) -> float:
        return float(stdtrit(k - 1, 0.975)) / k**0.5

    return next(k for k in range(2, chains + 1) if k == chains or error * factor(k) <= share * factor(chains))


def main() -> None:
    """Train, calibrate, measure and print the table."""
    parser = command_line(__doc__, quick="a dozen steps and a small budget, to see that it runs")
    parser.add_argument("--task", choices=list(TASKS), default="regression")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="measure every so many of the snapshots")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[options.task]
    snapshots = task.snapshots(options.seed, 12 if options.quick else task.steps)
    few = [snapshots[len(snapshots) // 3], snapshots[2 * len(snapshots) // 3], snapshots[-1]]
    probe = Probe(task.make_model, task.loss, task.data, threads=1)
    chosen = calibrate(few, probe, budget=5000 if options.quick else 20_000)
    rows: list[dict[str, object]] = []

    def measure(name: str, sampler: Sampler) -> list[Point]:
        measuring = probe.with_sampler(sampler)
        points = [measuring(snapshot) for snapshot in snapshots[:: options.every]]
        cost = gradients_of_a_point(sampler, len(measuring.subject.kept(sampler)))
        rows.append(row(name, points, sampler, cost))
        return points

    fewer = chains_for(ASKED, measure("calibrate", chosen), chosen.chains)
    if fewer < chosen.chains:
        measure(f"{fewer} of its chains", replace(chosen, chains=fewer))
    measure("4 chains of 12 draws", replace(chosen, **SHORT))
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
