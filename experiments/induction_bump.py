"""The induction bump: does λ̂ rise as a transformer's induction heads form, and only then?

Attention-only transformers of two layers, and of one layer as a control, learn sequences in which what followed a
token before follows it again (toy_tasks/induction.py), ten seeds each of the model and of its batches.

Claims: with two layers, prefix matching goes from chance to above 0.3, the in-context score falls, and a type A
transition of λ̂ comes with both: each of the three has made half of its change within a factor 1.3 of the others, in
step. At least nine of ten seeds show that. One layer shows none of it.

Measured: ten of ten, and none of ten. With two layers λ̂ goes from 135 to 151 before to 224 to 238 after, and has made
half of that 1 to 7 % of the step before prefix matching and the in-context score have. With one layer no transition
that starts after step 200 changes it by more than 15.

Costs about six minutes a seed of two layers and four of one, on one CPU core. The settings were fixed on seed 100.

    python experiments/induction_bump.py [--seeds 10] [--jobs 2] [--quick] [--wandb]
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from campaign import Options, Run, measured, options
from jumps import halfway
from tables import keep_table, markdown
from torch import Generator, nn

from phasewatch import Kind, Langevin, Probe, Trajectory, Transition, find_transitions, log_spaced
from phasewatch.toy_tasks import induction

EXPERIMENT = "induction_bump"
LEAST = 0.3
"""The prefix-matching score of a head that counts as an induction head."""

FACTOR = 1.3
"""How far apart, in step, what comes together may be."""

DATA = induction.InductionData()
SAMPLER = Langevin(step_size=1e-4, localization=100, nbeta=200, chains=4, draws=30, burn_in=30, batch_size=32)


def make_probe(model: nn.Module, device: str, *, layers: int, sampler: Langevin) -> Probe:
    """λ̂ and the published scores."""
    return Probe(
        partial(induction.make_model, layers=layers),
        induction.loss,
        DATA,
        eval_batch=DATA(Generator().manual_seed(1), 512),
        sampler=sampler,
        metrics=induction.published_metrics(DATA),
        threads=1,
        device=device,
    )


def runs(given: Options) -> list[Run]:
    """Two layers and one, each seed."""
    return [
        given.run(
            seed,
            setting=f"{layers}-layers",
            make_model=partial(induction.make_model, seed, layers=layers),
            training=partial(induction.training, data=DATA),
            make_probe=partial(make_probe, layers=layers),
            sampler=SAMPLER,
            at=log_spaced(10, 2000, num=24, linear=20),
        )
        for seed in given.seeds
        for layers in (2, 1)
    ]


def bump(trajectory: Trajectory) -> dict[str, object]:
    """What a run shows of it, as a row of the table.

    The fall of the in-context score and the type A transition are those that are nearest to the rise of prefix
    matching: the first fall, of what the positions say, comes long before.
    """
    scores = trajectory.signal("prefix_matching")
    rise = max(_changes(trajectory, "prefix_matching", "up"), key=lambda t: t.change.value, default=None)
    row: dict[str, object] = {"prefix matching": f"{scores[0]:.2f} to {scores.max():.2f}"}
    if rise is None or scores.max() <= LEAST:
        return row | {"bump": "no"}
    at = halfway(trajectory, rise)
    row["half of it by step"] = round(at)

    def nearest(transitions: Sequence[Transition]) -> tuple[Transition | None, float]:
        steps = {t: halfway(trajectory, t) for t in transitions}
        found = min(steps, key=lambda t: abs(math.log(steps[t] / at)), default=None)
        return found, steps[found] if found else math.nan

    fall, fall_at = nearest(_changes(trajectory, "icl_score", "down"))
    grown, grown_at = nearest([t for t in find_transitions(trajectory) if t.kind is Kind.A])
    if fall:
        row |= {"in-context score": f"{fall.change.before:.2f} to {fall.change.after:.2f}", "by step": round(fall_at)}
    if grown:
        row |= {
            "type A, λ̂": f"{grown.change.before:.0f} to {grown.change.after:.0f}",
            "steps": f"{grown.start} to {grown.end}",
            "by step ": round(grown_at),
        }
    steps = np.array([at, fall_at, grown_at])
    return row | {"bump": "yes" if steps.max() <= FACTOR * steps.min() else "no"}


def _changes(trajectory: Trajectory, metric: str, trend: str) -> list[Transition]:
    return [t for t in find_transitions(trajectory, signal=metric) if t.change.trend == trend]


def main() -> None:
    """Train and measure what is missing, and print the table."""
    given = options(__doc__, EXPERIMENT, seeds=10)
    found = measured(EXPERIMENT, runs(given), given)
    rows = {name: bump(trajectory) for name, trajectory in found.items()}
    lines = markdown([{"run": name} | row for name, row in rows.items()])
    for layers in (2, 1):
        shown = [row["bump"] == "yes" for name, row in rows.items() if name.startswith(f"{layers}-")]
        lines += ["", f"{layers} layer{'s' * (layers > 1)}: the bump in {sum(shown)} of {len(shown)} seeds."]
    keep_table(given.results, EXPERIMENT, lines)


if __name__ == "__main__":
    main()
