"""Plateaus with a known λ: does λ̂ along training read what the toy model of superposition is known to have?

Two hidden dimensions learn to hold six features (toy_tasks/superposition.py), ten seeds of the weights and of the
batches. Training comes to rest at regular polygons, whose loss and λ are known exactly. λ̂ is measured with one setting
for all snapshots, on 100 sizes of each of the six inputs, whose mean loss is the population's to a ten-thousandth.

A run rests at a polygon where at least three snapshots in a row have a loss within 0.001 of its own. λ̂ is compared with
the exact λ at the last plateau, over the snapshots within 0.0001. Elsewhere the model still descends, and most of λ̂ is
nβ times the loss that the chains find below it, which its verdict says.

Claims: λ̂ at the last plateau is within 5 % of the exact λ in at least nine of ten seeds. Where a run rests near the
5-gon and then falls to the 5+-gon, a type A transition goes with the fall. It isn't one from λ 7 to 8.5: those rests
still slope, the chains get to the 5+-gon before the training does, and λ̂ there is NEGATIVE.

Measured: ten of ten, the relative error 1.6 % in the middle and 4.3 % at worst; four rest near the 5-gon first, with a
type A in each.

Costs about 2 minutes a seed on one CPU core. The settings were fixed on seeds 100 to 102, 107 and 109.

    python experiments/superposition.py [--seeds 10] [--jobs 2] [--quick] [--wandb]
"""

from functools import cache, partial
from itertools import groupby
from statistics import median

import numpy as np
import torch
from campaign import Options, Run, measured, options
from jumps import jumps, rates
from tables import keep_table, kinds, markdown
from torch import nn

from phasewatch import Langevin, Probe, Trajectory, find_transitions, log_spaced
from phasewatch.toy_tasks import superposition

EXPERIMENT = "superposition"
FEATURES = 6
NEAR, AT = 1e-3, 1e-4
"""How far from a polygon's loss a run rests near it, and is at it."""

SAMPLER = Langevin(step_size=1e-4, localization=5, nbeta=5000, chains=8, draws=1000, burn_in=300, batch_size=None)


def inputs(sizes: int = 100) -> torch.Tensor:
    """Each feature in turn, of every size, shape (size · feature, feature)."""
    size = (torch.arange(sizes) + 0.5) / sizes
    return (size[:, None, None] * torch.eye(FEATURES)).flatten(0, 1)


@cache
def polygons() -> dict[str, tuple[float, float]]:
    """Loss and exact λ of the plateaus where λ is known, by name."""
    known = {}
    for k, positive in ((5, 0), (5, 1), (6, 0)):
        model = superposition.polygon(FEATURES, k, positive=positive)
        loss = superposition.population_loss(model.weight, model.bias).item()
        known[f"{k}{'+' * positive}-gon"] = loss, superposition.local_llc(model)
    return known


def make_probe(model: nn.Module, device: str, *, sampler: Langevin) -> Probe:
    """λ̂, and the loss on the same inputs."""
    return Probe(
        partial(superposition.SuperpositionModel, FEATURES),
        superposition.loss,
        inputs(),
        eval_batch=inputs(),
        sampler=sampler,
        threads=1,
        device=device,
    )


def runs(given: Options) -> list[Run]:
    """Each seed."""
    return [
        given.run(
            seed,
            make_model=partial(superposition.SuperpositionModel, FEATURES),
            training=partial(superposition.training, data=superposition.SuperpositionData(FEATURES)),
            make_probe=make_probe,
            sampler=SAMPLER,
            at=log_spaced(20, 4000, num=50, linear=10),
        )
        for seed in given.seeds
    ]


def rests(trajectory: Trajectory) -> list[tuple[str, Trajectory]]:
    """The polygons that a run rests near, and its points there, in order."""
    names = [
        next((name for name, (loss, _) in polygons().items() if abs(point.loss - loss) <= NEAR), "")
        for point in trajectory
    ]
    stretches = [(name, list(group)) for name, group in groupby(range(len(names)), key=names.__getitem__)]
    return [(name, trajectory[g[0] : g[-1] + 1]) for name, g in stretches if name and len(g) >= 3]


def last_plateau(trajectory: Trajectory) -> tuple[str, float, float] | None:
    """The polygon at which a run ends, λ̂ there and its error, if it comes that near."""
    rested = rests(trajectory)
    if not rested or rested[-1][1][-1].step != trajectory[-1].step:
        return None
    name, points = rested[-1]
    there = [p.llc for p in points if abs(p.loss - polygons()[name][0]) <= AT and p.llc.health.has_level]
    # What is wrong with one level is wrong with all of them, since they share their noise
    return (name, float(np.mean([llc.value for llc in there])), median(llc.error for llc in there)) if there else None


def row(name: str, trajectory: Trajectory) -> dict[str, object]:
    """What a run shows, as a row of the table."""
    rested = rests(trajectory)
    falls = jumps(trajectory, "loss", "down", least=0.0)
    shown: dict[str, object] = {
        "run": name,
        "kinds": kinds(find_transitions(trajectory)),
        "rests near": ", ".join(f"{polygon} {p[0].step} to {p[-1].step}" for polygon, p in rested),
    }
    if end := last_plateau(trajectory):
        polygon, value, error = end
        exact = polygons()[polygon][1]
        shown |= {
            "ends at": polygon,
            "exact λ": exact,
            "λ̂": f"{value:.2f} ± {2 * error:.2f}",
            "relative error": f"{value / exact - 1:+.1%}",
        }
    if [polygon for polygon, _ in rested][-2:] == ["5-gon", "5+-gon"]:
        before, after = rested[-2][1], rested[-1][1]
        with_it = [
            jump.pair.first
            for jump in falls
            if jump.pair and jump.transition.start < after[0].step and jump.transition.end > before[-1].step
        ]
        shown |= {
            "λ̂ near the 5-gon": f"{median(before.llc):.1f} ({before[len(before) // 2].llc.health.name.lower()})",
            "5-gon to 5+-gon": kinds(with_it) or "none",
        }
    return shown


def summary(rows: list[dict[str, object]]) -> list[str]:
    """What the claims come to."""
    errors = [abs(float(str(row["relative error"]).rstrip("%"))) for row in rows if "relative error" in row]
    fell = [row for row in rows if "5-gon to 5+-gon" in row]
    lines = [f"At a polygon in the end: {len(errors)} of {len(rows)} seeds."]
    if errors:
        near = sum(error <= 5 for error in errors)
        lines += [
            f"λ̂ within 5 % of the exact λ there: {near} of {len(rows)} seeds; "
            f"relative error {median(errors):.1f} % in the middle, {max(errors):.1f} % at worst."
        ]
    typed = sum("A" in str(row["5-gon to 5+-gon"]).split() for row in fell)
    return [*lines, f"From the 5-gon to the 5+-gon: {len(fell)} seeds, with a type A in {typed} of them."]


def main() -> None:
    """Train and measure what is missing, and print the tables."""
    given = options(__doc__, EXPERIMENT, seeds=10)
    found = measured(EXPERIMENT, runs(given), given)
    rows = [row(name, trajectory) for name, trajectory in found.items()]
    known = [{"plateau": name, "loss": f"{loss:.5f}", "exact λ": llc} for name, (loss, llc) in polygons().items()]
    lines = [*summary(rows), "", *markdown(rows), "", *markdown([rates(list(found.values()), "loss", "down")])]
    lines += ["", *markdown(known)]
    keep_table(given.results, EXPERIMENT, lines)


if __name__ == "__main__":
    main()
