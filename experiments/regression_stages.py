"""The published stages of in-context linear regression, trained and measured anew at the published size.

The model, the data, the schedule (500,000 steps) and the 190 checkpoints are those of Hoogland et al. (arXiv
2402.02364), and so are ε, nβ, γ and the batch of the sampler. Chains are shorter: 5 of 600 draws after 500, where the
paper has 10 of 5,000 after 1,000, which are taken at the published ends of stages alone. On a GPU the loss is taken in
bfloat16, which changes λ̂ by 0.1 of 150, and training multiplies in TF32, as float32 takes 1.7 times as long.

Claims: the kinds are A A B B A, as in the published trajectories, and λ̂ changes by as much within 20 % in each stage.
The standard error of λ̂ is below 1 % of its range.

Measured on H200s, 4 seeds. The kinds are A A B B A in all of them. The median error is 0.8 to 0.9 % of the range, and
58 to 60 % of the points have one below 1 % (of the published ones 66 and 68 %). Of the changes between the published
ends of stages,

- the second and the third are the published ones within 2 % and 10 %: +151 to +152 (published +151 and +150) and -11.3
  to -13.3 (-12.2 both);
- the first is +10 to +18, between the published +7 and +20;
- the fourth is -36, -49 and -48 in three seeds and -20 in one (published -45 and -35), the fifth +1.5 to +8 (+4 and
  +2). By the nearer published seed the claim holds for the fourth in three of four seeds, and for the fifth, which is
  hardly larger than its error, in one. On average the fourth is -38, the published one -40.

How long chains run decides the fourth. From step 200,000 on they begin below the level of 158 that λ̂ had before, and
go up to it: at step 318,181 λ̂ is 86 to 100 by the steps 151 to 360 of cheap_monitor.py, 112 to 141 by steps 500 to
1,100, and 127 to 158 by the published 1,000 to 6,000. By then all ten chains of seed 0 are there, so that its λ̂ doesn't
fall at all, and most of seed 1, whose λ̂ falls by 10. The published chains are as far apart there, from 105 to 139.

Costs 7 minutes of training on one GPU for two seeds together, 4 minutes a seed for measuring, and one for the ends by
the published chains. On a CPU the training alone takes hours.

    python experiments/regression_stages.py --device cuda [--seeds 4] [--quick]
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from campaign import Options, Run, measured, options, snapshots_of
from stages import change_between
from tables import keep_table, kinds, llc_changes, markdown, stretches, with_error
from torch import nn
from tqdm import tqdm

from phasewatch import SGLD, Probe, Snapshot, Trajectory, difference, find_transitions
from phasewatch.callbacks.trainers.schedule import Steps
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.toy_tasks import in_context_regression as regression
from phasewatch.toy_tasks.ensemble import Ensemble

EXPERIMENT = "regression_stages"
AT_ENDS = "regression_stages_ends"
STEPS = 500_000
DATA = regression.RegressionData()
SAMPLER = SGLD(step_size=3e-4, localization=6.67, nbeta=66.7, chains=5, draws=600, burn_in=500, batch_size=1024)
AS_PUBLISHED = replace(SAMPLER, chains=10, draws=5_000, burn_in=1_000)

PUBLISHED = Path(__file__).parents[1] / "tests" / "data" / "published"
ENDS = (1_000, 40_000, 126_000, 320_000, 500_000)
"""Where the published stages of seed 1 end."""

LATE = (126_262, 318_181, 499_999)
"""Checkpoints before chains part, and after."""


def published_steps() -> frozenset[int]:
    """The published checkpoints."""
    with (PUBLISHED / "lr_seed1.csv").open(newline="", encoding="utf-8") as file:
        return frozenset(int(row["step"]) for row in csv.DictReader(file))


def make_probe(model: nn.Module, device: str, *, sampler: Sampler) -> Probe:
    """λ̂ and the published scores."""
    return Probe(
        regression.RegressionTransformer,
        regression.loss,
        DATA,
        sampler=sampler,
        metrics=regression.published_metrics(DATA),
        threads=1,
        device=device,
        autocast=torch.bfloat16 if device.startswith("cuda") else None,
    )


def run_of(seed: int, given: Options) -> Run:
    """The published run with a seed."""
    return given.run(
        seed,
        make_model=regression.RegressionTransformer,
        training=partial(regression.training, data=DATA, steps=12 if given.quick else STEPS),
        make_probe=make_probe,
        sampler=SAMPLER,
        at=Steps(published_steps()),
    )


def runs(given: Options) -> list[Run]:
    """The published run, each seed."""
    return [run_of(seed, given) for seed in given.seeds]


def runs_at_ends(given: Options) -> list[Run]:
    """The first snapshot and those nearest to the published ends of stages, by chains as many and as long as there."""
    steps = sorted(published_steps())
    nearest = {min(steps, key=lambda step: abs(step - end)) for end in (0, *ENDS)}
    probe = partial(make_probe, sampler=AS_PUBLISHED)
    return [replace(run, at=Steps(frozenset(nearest)), make_probe=probe, trained_by=EXPERIMENT) for run in runs(given)]


def train_in_pairs(wanted: Sequence[Run], given: Options) -> None:
    """Train the runs that have no snapshots yet, each with the other of its pair: seeds 0 and 1, 2 and 3.

    A run's batches depend on which other it is trained with.
    """
    kept = given.results / "points" / EXPERIMENT
    missing = [
        run
        for run in wanted
        if run.name.startswith(given.only)
        and not (kept / f"{run.name}.jsonl").exists()
        and not set(snapshots_of(run, given.runs).steps) >= run.at.steps
    ]
    for first in sorted({run.seed // 2 * 2 for run in missing}):
        train_together([run_of(first, given), run_of(first + 1, given)], given)


def train_together(pair: Sequence[Run], given: Options) -> None:
    """Train runs as one ensemble."""
    models = [run.initial_model() for run in pair]
    for run, model in zip(pair, models, strict=True):
        snapshots_of(run, given.runs).save(Snapshot.of(model, 0))
    ensemble = Ensemble([model.to(given.device) for model in models], regression.loss)
    at = pair[0].at
    last = max(at.steps)
    training = regression.training(ensemble, DATA, seed=pair[0].seed, steps=STEPS)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for step in tqdm(islice(training, last), desc="training", total=last, mininterval=5):
            if at(step):
                for index, run in enumerate(pair):
                    snapshots_of(run, given.runs).save(Snapshot.of(ensemble.member(index), step))
    finally:
        torch.set_float32_matmul_precision(precision)


def rows_between_ends(trajectories: Mapping[str, Trajectory], mean: str) -> list[dict[str, object]]:
    """How much the smoothed λ̂ changes between the published ends of stages, in each and on average."""
    of_each = {name: changes(trajectory, ENDS) for name, trajectory in trajectories.items()}
    if of_each:
        of_each[mean] = np.mean(list(of_each.values()), axis=0).tolist()
    rows: list[dict[str, object]] = []
    for name, values in of_each.items():
        rows.append({"λ̂ between the published ends": name})
        rows[-1] |= {f"to step {end}": value for end, value in zip(ENDS, values, strict=True)}
    return rows


def changes(trajectory: Trajectory, ends: Sequence[int]) -> list[float]:
    """How much the smoothed λ̂ changes between the published ends of stages."""
    first = trajectory.usable().steps[0]
    return [change_between(trajectory, "llc", before, after) for before, after in pairwise([first, *ends])]


def row(name: str, trajectory: Trajectory) -> dict[str, object]:
    """A run's stages, as `find_transitions` finds them."""
    found = find_transitions(trajectory)
    errors = trajectory.llc_error[np.isfinite(trajectory.llc_error)] / np.ptp(trajectory.usable().llc)
    return {
        "run": name,
        "kinds": kinds(found),
        "steps": stretches(found),
        "Δλ̂": llc_changes(found),
        "Δloss": ", ".join(f"{t.loss_change:+.3f}" for t in found),
        "error of λ̂ / its range": float(np.median(errors)) if len(errors) else "",
        "points where it is below 1 %": f"{np.mean(errors < 0.01):.0%}" if len(errors) else "",
    }


def row_at_ends(name: str, trajectory: Trajectory) -> dict[str, object]:
    """How λ̂ changes from each end of a published stage to the next, by the published chains."""
    row: dict[str, object] = {"by the published chains": name}
    for before, after in pairwise(trajectory):
        change = difference(after.llc, before.llc)
        row[f"to step {after.step}"] = with_error(change.value, change.error)
    return row


def chains_at(name: str, trajectory: Trajectory, steps: Sequence[int]) -> dict[str, object]:
    """λ̂ of each chain at some steps, from the lowest to the highest."""
    points = {point.step: sorted(point.llc.per_chain) for point in trajectory}
    row: dict[str, object] = {"λ̂ of each chain": name}
    return row | {f"step {step}": " ".join(f"{value:.0f}" for value in points[step]) for step in steps}


def main() -> None:
    """Train and measure what is missing, and print the tables."""
    given = options(__doc__, EXPERIMENT, seeds=4)
    wanted = runs(given)
    if given.device.startswith("cuda"):
        train_in_pairs(wanted, given)
    found = measured(EXPERIMENT, wanted, given)
    published = {f"published, seed {seed}": Trajectory.read(PUBLISHED / f"lr_seed{seed}.csv") for seed in (1, 0)}
    lines = markdown([row(name, trajectory) for name, trajectory in (published | found).items()])
    if not given.quick:
        ends = measured(AT_ENDS, runs_at_ends(given), given)
        lines += ["", *markdown([*rows_between_ends(published, "mean, published"), *rows_between_ends(found, "mean")])]
        lines += ["", *markdown([row_at_ends(name, trajectory) for name, trajectory in ends.items()])]
        chains = published | found | {f"{name}, published chains": trajectory for name, trajectory in ends.items()}
        lines += ["", *markdown([chains_at(name, trajectory, LATE) for name, trajectory in chains.items()])]
    keep_table(given.results, EXPERIMENT, lines)


if __name__ == "__main__":
    main()
