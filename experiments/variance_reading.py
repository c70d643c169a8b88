"""Is λ̂ by the variance of the loss better than by its mean where a model is at no minimum?

Around a minimum nβ·L(w) is nearly Gamma-distributed with shape λ, so that its variance is λ too, whatever is taken for
L(w*) (Cai 2026, arXiv 2606.22389). Early in training L(w*) is no minimum and the mean has descent in it, so a reading
without L(w*) may order the stages better there. Both toy tasks are trained, some 40 snapshots of each are measured on
one fixed batch, so that minibatches add nothing to the variance, and the same draws are read in three ways:

- mean: the mean of nβ·(L(w) − L(w*)), the estimate that phasewatch gives;
- variance along a chain: of nβ·L(w) over the draws of each chain;
- variance across chains: of nβ·L(w) over the chains at each draw, in which a descent that they share doesn't count.

The full measurement is the mean of three times as many steps with another seed. A row says how a reading orders the
snapshots beside it (Kendall's τ; once more for those at no minimum alone, by the verdict of the full measurement), its
standard error over the range of λ̂, and the stages that are found in it.

Measured on regression, seed 0 (results/variance_reading.md): the mean orders the snapshots as the full measurement,
also those at no minimum (τ 0.97 and 0.95); the variances order them otherwise (0.50 and -0.53 along chains, 0.56 and
-0.60 across them), with errors 6 to 10 times as large, and show one of its two stages at most. Induction wasn't
measured.

Costs about half an hour for regression, and more than forty minutes for induction, on a core.

    python experiments/variance_reading.py [--task regression|induction] [--seed 0] [--quick]
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_llc import target_of
from command_line import command_line
from cost_of_a_curve import TASKS, Task
from scipy.stats import kendalltau
from tables import keep_table, kinds, markdown, stretches

from phasewatch import Langevin, Point, Snapshot, Trajectory, find_transitions
from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.estimates.verdict import estimate_from_losses
from phasewatch.monitor.model.copying import own_copy
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.weights import SampledModel
from phasewatch.monitor.sampling.chains import Chains, run_chains

SAMPLERS = {
    "regression": Langevin(kappa=0.5, localization=6.67, nbeta=66.7, chains=6, burn_in=40, draws=80, momentum=0.9),
    "induction": Langevin(kappa=0.5, localization=100, nbeta=200, chains=6, burn_in=40, draws=80, momentum=0.9),
}
SAMPLES = {"regression": 128, "induction": 32}
"""Of the fixed batch."""

READINGS = ("mean", "variance along a chain", "variance across chains")


def readings(chains: Chains, nbeta: float) -> list[np.ndarray]:
    """What each of `READINGS` has for each chain, shape (chain,), with the reading as their mean."""
    nats = nbeta * (chains.losses - chains.reference)
    count = len(nats)

    def across(which: np.ndarray) -> float:
        return float(nats[which].var(axis=0, ddof=1).mean())

    everyone = np.arange(count)
    without = np.array([across(np.delete(everyone, chain)) for chain in everyone])
    pseudo_values = count * across(everyone) - (count - 1) * without  # of the jackknife
    return [nats.mean(axis=1), nats.var(axis=1, ddof=1), pseudo_values]


def measured(name: str, task: Task, snapshots: Sequence[Snapshot], *, longer: int, seed: int) -> Iterator[Chains]:
    """The chains around each snapshot, on one fixed batch."""
    model = SampledModel(own_copy(task.make_model()))
    batch = task.data(torch.Generator().manual_seed(0), SAMPLES[name])
    target = target_of(model, task.loss, Batches([batch]))
    given = SAMPLERS[name]
    sampler = replace(given, burn_in=longer * given.burn_in, draws=longer * given.draws, batch_size=None)
    for snapshot in snapshots:
        model.load(snapshot)
        (chains,) = run_chains(target, [[weight.detach().clone() for weight in model.weights()]], sampler, seed)
        yield chains


def curves(snapshots: Sequence[Snapshot], found: Sequence[Chains], nbeta: float, parameters: int) -> list[Trajectory]:
    """What each reading makes of the same chains; all have the verdicts of the first, the mean."""
    points: list[list[Point]] = [[] for _ in READINGS]
    for snapshot, chains in zip(snapshots, found, strict=True):
        mean = estimate_from_losses(
            chains.losses, chains.reference, nbeta=nbeta, parameters=parameters, checks=chains.checks
        )
        for of_one, own in zip(points, readings(chains, nbeta), strict=True):
            llc = replace(mean, value=float(own.mean()), error=standard_error(own), per_chain=tuple(own.tolist()))
            of_one.append(Point(snapshot.step, float(chains.reference.mean()), llc))
    return list(map(Trajectory, points))


def row(name: str, reading: str, curve: Trajectory, full: Trajectory) -> dict[str, object]:
    """A line of the table."""
    level, error = np.array([(point.llc.value, point.llc.error) for point in curve]).T
    expected = np.array([point.llc.value for point in full])
    early = np.array([not point.llc.health.has_level for point in full])
    found = find_transitions(curve)
    return {
        "task": name,
        "reading": reading,
        "τ": f"{kendalltau(level, expected)[0]:.2f}",
        "at no minimum": int(early.sum()),
        "τ there": f"{kendalltau(level[early], expected[early])[0]:.2f}",
        "first, largest, last": f"{level[0]:.0f}, {level.max():.0f}, {level[-1]:.0f}",
        "error / range": f"{np.median(error) / np.ptp(expected):.1%}",
        "kinds": kinds(found),
        "steps": stretches(found),
    }


def main() -> None:
    """Train, measure, and print the table."""
    parser = command_line(__doc__, quick="a dozen steps of training and short chains, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", choices=list(SAMPLERS), action="append", help="all if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.task or SAMPLERS:
        task, nbeta = TASKS[name], SAMPLERS[name].nbeta
        snapshots = task.snapshots(options.seed, 12 if options.quick else task.steps)
        parameters = sum(weight.numel() for weight in task.make_model().parameters())
        if options.quick:
            snapshots = snapshots[::4]
        short, long = (
            curves(snapshots, list(measured(name, task, snapshots, longer=longer, seed=seed)), nbeta, parameters)
            for longer, seed in ((1, 1), (3, 2))
        )
        full = long[0]
        for reading, curve in zip(READINGS, short, strict=True):
            rows.append(row(name, reading, curve, full))
        rows.append(row(name, "full measurement", full, full))
        print("\n".join(markdown(rows)), flush=True)
    keep_table(None if options.quick else Path(__file__).parent / "results", "variance_reading", markdown(rows))


if __name__ == "__main__":
    main()
