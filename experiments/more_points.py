"""Whether more points of one curve take confirmed boundaries away, when points are added in random order.

Eight real trajectories (the two published, and the six longest of results/points) and simulated ones of
tests/scenarios.py. At 24 points, at 15 % more, and so on, `find_transitions` looks at the points so far. Each boundary
of a transition that was confirmed at one size is compared with every later size. It has *left* if no boundary there, of
the same side and sign, has a 95 % interval that overlaps its own. It is *outside* if one does, but lies beyond the
earlier interval itself. Costs about a minute on a core.

Of the real ones 0.75 % have left and 3.2 % are outside, of the simulated ones 0.75 % and 3.9 %. Nearly all that have
left are of stages that only some sizes show, or lie between two stages of one direction that others show as one.

    python experiments/more_points.py [--quick]
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from command_line import command_line

from phasewatch import Point, Trajectory, find_transitions
from phasewatch.monitor.estimates.estimate import Estimate, Health

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
import scenarios  # noqa: E402  # pyright: ignore[reportMissingImports] - the tests' folder is no package

FIRST_SEED = 70_000


class Boundary(NamedTuple):
    """A start or an end of a transition.

    Attributes:
        side: "start" or "end".
        rises: whether the signal rises there.
        step: where it is.
        interval: its 95 % interval.
    """

    side: str
    rises: bool
    step: int
    interval: tuple[int, int]


def real() -> list[Trajectory]:
    """The two published trajectories, and the six longest of our own."""
    published = [Trajectory.read(ROOT / f"tests/data/published/lr_seed{seed}.csv") for seed in (0, 1)]
    own = [Trajectory.read(path) for path in sorted((ROOT / "experiments/results/points").glob("*/*.jsonl"))]
    return published + sorted(own, key=len, reverse=True)[:6]


def simulated(number: int) -> Trajectory:
    """A simulated trajectory of 120 to 250 points; every second one has chains."""
    scenario = scenarios.staged(FIRST_SEED + number, 120 + number * 7 % 130, chains=6 * (number % 2))
    chains = scenario.chains if scenario.chains is not None else [()] * len(scenario.steps)
    return Trajectory(
        Point(int(s), float(y), Estimate(float(v), 1.0, tuple(map(float, c)), 1.0, 1.0, 100.0, Health.OK))
        for s, y, v, c in zip(scenario.steps, scenario.loss, scenario.llc, chains, strict=True)
    )


def compared(trajectory: Trajectory, growth: float = 1.15) -> np.ndarray:
    """How many boundaries were compared with later ones, how many have left, and how many are outside."""
    order = np.random.default_rng([0, len(trajectory)]).permutation(len(trajectory))
    counts, confirmed, size = np.zeros(3, int), [], 24
    while size <= len(trajectory):
        found = find_transitions([trajectory[int(i)] for i in order[:size]])
        pairs = [
            (Boundary(side, t.change.value > 0, step, interval), t.provisional)
            for t in found
            for side, step, interval in (("start", t.start, t.start_interval), ("end", t.end, t.end_interval))
        ]
        for old in confirmed:
            same = [new for new, _ in pairs if (new.side, new.rises) == (old.side, old.rises)]
            low, high = old.interval
            near = any(new.interval[0] <= high and new.interval[1] >= low for new in same)
            counts += [1, not near, near and not any(low <= new.step <= high for new in same)]
        confirmed += [boundary for boundary, is_provisional in pairs if not is_provisional]
        size = len(trajectory) if size < len(trajectory) < growth * size else math.ceil(growth * size)
    return counts


def row(name: str, trajectories: Sequence[Trajectory], growth: float) -> None:
    """Print a line of the table."""
    pairs, left, outside = np.sum([compared(trajectory, growth) for trajectory in trajectories], axis=0)
    print(f"| {len(trajectories)} {name} | {pairs} | {left / pairs:.2%} | {outside / pairs:.2%} |", flush=True)


def main() -> None:
    """Print the table."""
    quick = command_line(__doc__, quick="few trajectories and sizes, to see that it runs").parse_args().quick
    print("| trajectories | comparisons | left | outside |\n|---|---|---|---|")
    row("real", real()[: 1 if quick else 8], 2 if quick else 1.15)
    row("simulated", [simulated(number) for number in range(1 if quick else 50)], 2 if quick else 1.15)


if __name__ == "__main__":
    main()
