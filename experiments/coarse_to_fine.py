"""How many points a series takes coarse to fine, on stored curves: what it finds beside what all points show.

The points of a curve stand in for measuring: `next_step` chooses, `find_transitions` judges the points so far, as
`replay(budget=...)` does. A start is the grid of the first snapshots moved by a share of its gaps. A boundary between
two kinds counts as right when the end before it and the start after it lie in the intervals that all points give them.
"A|B" asks for the first of them, "A B A" for the kinds with neighbours alike taken together, "all stages" for each
stage, "kinds" for the kinds of all stages alone. A grid of as many points, evenly by rank, stands beside it, and
the same plan told beforehand what all points show: where that is no better, the points limit what is found, and not
where they are placed.

The two published curves were looked at while the rules were chosen, as were the runs of our own numbers 0 and 2; the
runs 1 and 3 were not.

experiments/results/coarse_to_fine.md has the table.

    python experiments/coarse_to_fine.py [--quick] [--starts 8]
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from command_line import command_line
from tables import keep_table, markdown

from phasewatch import Trajectory, Transition, find_transitions
from phasewatch.monitor.runs.coarse_to_fine import FIRST, next_step

ROOT = Path(__file__).parents[1]

BUDGETS = (24, 40, 47, 64)
"""Points at which it is judged; 47 is a quarter of 190."""

Boundaries = list[tuple[Transition, Transition]]


def curves() -> dict[str, Trajectory]:
    """The stored curves of 190 points."""
    published = {f"published, seed {n}": ROOT / f"tests/data/published/lr_seed{n}.csv" for n in (0, 1)}
    own = {f"own run {n}": ROOT / f"experiments/results/points/regression_stages/seed-{n}.jsonl" for n in range(4)}
    return {name: Trajectory.read(path) for name, path in {**published, **own}.items()}


def kinds(found: Sequence[Transition], *, together: bool) -> str:
    """The kinds in order, neighbours alike counted once if taken together."""
    labels = [t.kind.label for t in found]
    return "".join(label for label, _ in itertools.groupby(labels)) if together else "".join(labels)


def boundaries(found: Sequence[Transition], *, together: bool) -> Boundaries:
    """The neighbours that meet, those of different kinds alone if taken together."""
    return [(a, b) for a, b in itertools.pairwise(found) if not together or a.kind is not b.kind]


def lie_within(some: Boundaries, of_all: Boundaries) -> list[bool]:
    """Whether each boundary lies in the intervals that all points give it."""
    return [
        all_a.end_interval[0] <= a.end <= all_a.end_interval[1]
        and all_b.start_interval[0] <= b.start <= all_b.start_interval[1]
        for (a, b), (all_a, all_b) in zip(some, of_all, strict=False)
    ]


def judged(found: Sequence[Transition], full: Sequence[Transition]) -> dict[str, bool]:
    """What is right."""
    merged, all_merged = (kinds(some, together=True) for some in (found, full))
    right = lie_within(boundaries(found, together=True), boundaries(full, together=True))
    same = kinds(found, together=False) == kinds(full, together=False)
    return {
        "A\\|B": merged[:2] == all_merged[:2] and right[:1] == [True],
        "A B A": merged == all_merged and all(right),
        "all stages": same and all(lie_within(boundaries(found, together=False), boundaries(full, together=False))),
        "kinds": same,
    }


def started(steps: Sequence[int], shift: float) -> list[int]:
    """The first steps, all but the ends moved by a share of the gap between them."""
    ranks = (np.arange(FIRST + 2) + shift) * (len(steps) - 1) / (FIRST + 1)
    return sorted({steps[0], steps[-1], *(steps[round(rank)] for rank in ranks[1:-1])})


def coarse_to_fine(
    trajectory: Trajectory, shift: float, full: Sequence[Transition] | None = None
) -> dict[int, list[Transition]]:
    """What is found at each budget; if `full` is given, it tells the plan where the boundaries are."""
    points = {point.step: point for point in trajectory}
    steps, found = list(points), {}
    measured = started(steps, shift)
    while len(measured) <= max(BUDGETS):
        if full is None or len(measured) in BUDGETS:
            found[len(measured)] = find_transitions(points[step] for step in measured)
        step = next_step(steps, measured, found[len(measured)] if full is None else full)
        assert step is not None
        measured.append(step)
    return {budget: found[budget] for budget in BUDGETS}


def told(trajectory: Trajectory, shift: float) -> dict[int, list[Transition]]:
    """What is found when the plan knows what all points show."""
    return coarse_to_fine(trajectory, shift, find_transitions(trajectory))


def grid(trajectory: Trajectory, shift: float) -> dict[int, list[Transition]]:
    """What is found on an even grid of as many points."""
    found = {}
    for budget in BUDGETS:
        ranks = np.linspace(0, len(trajectory) - 1, budget)
        ranks[1:-1] += shift * (ranks[1] - ranks[0])
        found[budget] = find_transitions(trajectory[int(i)] for i in np.unique(ranks.round()))
    return found


WAYS = (coarse_to_fine, told, grid)


def scatter(trajectory: Trajectory) -> list[dict[str, object]]:
    """How far points lie off the line through their neighbours, and how much of that the chains disagree about.

    The rest is each snapshot's own jitter, which all chains share.
    """
    x, chains = np.log(np.maximum(trajectory.steps, 0.5)), trajectory.per_chain
    assert chains is not None
    share = ((x[1:-1] - x[:-2]) / (x[2:] - x[:-2]))[:, None]
    off = (chains[1:-1] - (1 - share) * chains[:-2] - share * chains[2:]) / np.sqrt(1 + share**2 + (1 - share) ** 2)
    rows: list[dict[str, object]] = []
    for first, last in ((3_000, 40_000), (40_000, 120_000), (120_000, 330_000), (330_000, 500_000)):
        there = off[(trajectory.steps[1:-1] >= first) & (trajectory.steps[1:-1] < last)]
        whole = float(np.mean(there.mean(axis=1) ** 2))
        of_chains = float(np.mean(there.var(axis=1, ddof=1))) / there.shape[1]
        rows.append({"steps": f"{first} to {last}", "scatter": whole**0.5, "share of the chains": of_chains / whole})
    return rows


def main() -> None:
    """Print the tables and keep them."""
    parser = command_line(__doc__, quick="one curve and one start, to see that it runs")
    parser.add_argument("--starts", type=int, default=8)
    options = parser.parse_args()
    shifts = np.linspace(-0.45, 0.45, 1 if options.quick else options.starts)
    rows: list[dict[str, object]] = []
    for name, trajectory in list(curves().items())[: 1 if options.quick else None]:
        full = find_transitions(trajectory)
        for way in WAYS:
            right = [[judged(found[b], full) for b in BUDGETS] for found in (way(trajectory, s) for s in shifts)]
            for i, budget in enumerate(BUDGETS):
                shares = {what: float(np.mean([of_one[i][what] for of_one in right])) for what in right[0][i]}
                rows.append({"curve": name, "points": f"{budget}, {way.__name__.replace('_', ' ')}", **shares})
    for way in WAYS:
        for budget in BUDGETS:
            points = f"{budget}, {way.__name__.replace('_', ' ')}"
            those = [row for row in rows if row["points"] == points and row["curve"] != "all"]
            mean = {what: sum(float(str(row[what])) for row in those) / len(those) for what in list(those[0])[2:]}
            rows.append({"curve": "all", "points": points, **mean})
    lines = [f"Shares of {len(shifts)} starts in which it is right.", "", *markdown(rows)]
    lines += ["", "The scatter of λ̂, and the share of its variance that the chains disagree about.", ""]
    lines += markdown([{"curve": name, **row} for name, curve in curves().items() for row in scatter(curve)])
    keep_table(None if options.quick else ROOT / "experiments" / "results", "coarse_to_fine", lines)


if __name__ == "__main__":
    main()
