"""What each constant of the search for transitions does: one at a time is changed, on known stages.

150 trajectories of tests/scenarios.py with one to five stages each, 60 of them with four chains; 120 with no stage or
one. A stage counts as found as in experiments/transitions.py. The standard error of a share of the 358 stages is 0.02;
all rows are of the same trajectories.
experiments/results/constants.md has the table.

    python experiments/constants.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from stages import as_stages, matched, simulated
from transitions import is_false_alarm, points, scenarios

from phasewatch import Trajectory, find_transitions
from phasewatch.monitor.trajectories import evidence, jumps, noise, smoothing, stages, transitions
from phasewatch.monitor.trajectories.smoothing import Slack, Slacks

ROOT = Path(__file__).parents[1]

VARIED: Sequence[tuple[str, Sequence[Any]]] = [
    ("MOST_KNOTS", [32, 128]),
    ("CORRELATIONS", [(0.0, 0.3)]),
    ("ROUNDS", [1, 3]),
    ("UNKNOWN", [1.0, 2.0]),
    ("ALONE", [Slacks(Slack(0, 3), Slack(0.25, 4.5)), Slacks(Slack(0.25, 0), Slack(0.25, 4.5))]),
    ("ALONE", [Slacks(Slack(0.25, 3), Slack(0.25, 3))]),
    ("WITNESSED", [Slacks(Slack(0.25, 2), Slack(0.1, 4.5)), Slacks(Slack(0, 0), Slack(0.1, 4.5))]),
    ("WITNESSED", [Slacks(Slack(0, 2), Slack(0, 2))]),
    ("OUTLIER", [2.0, 100.0]),
    ("WINDOW", [10, 40]),
    ("COUNTS", [1, 16]),
    ("LEAST_BEND", [0.003, 0.3]),
    ("SLOWED", [0.3, 0.7]),
    ("PART", [0.005, 0.1]),
    ("MAY_SLOW", [0.5, 0.9]),
    ("FLAT", [0.003, 0.1]),
    ("DRAWS", [30, 300]),
    ("CLEAR", [0.5, 3.0]),
    ("FEWEST_FREEDOM", [1.0, 5.0]),
    ("PICKED", [1, 64]),
    ("MIN_EFFECT", [0.0, 0.02]),
    ("ENOUGH", [10, 40]),
    ("SETTLED", [2, 10]),
    ("CERTAIN", [0.95, 0.9999]),
    ("SUBSTANTIAL", [0.0, 0.1]),
    ("LOOK", [1.05, 1.5]),
    ("MOST_GAPS", [3]),
    ("MOST_ROUND", [5]),
    ("LONGEST", [8]),
    ("STANDS_OUT", [4, 6]),
    ("STEEPER", [0.2, 0.5]),
    ("BESIDE", [2]),
    ("LEAST_HEIGHT", [0.0, 9.0]),
    ("PLATEAU", [0.03, 0.1]),
    ("MOST_SUSPECTS", [1]),
    ("MOSTLY", [0.3, 0.9]),
]
"""Each constant with the values that are tried in its place."""


Trial = tuple[scenarios.Scenario, Trajectory]


def scores(staged: Sequence[Trial], quiet: Sequence[Trial]) -> str:
    """A row of the table."""
    stages_there = all_found = confirmed = alarms = 0
    changes, intervals, hits = [], [], 0
    for scenario, trajectory in staged:
        transitions = find_transitions(trajectory)
        truth = dict(zip(scenario.steps.astype(int), scenario.truth, strict=True))
        changes += [abs(t.llc_change - (truth[t.end] - truth[t.start])) <= 2 * t.change.error for t in transitions]
        for i, j in matched(as_stages(transitions), simulated(scenario.stages)):
            t, stage = transitions[i], scenario.stages[j]
            hits += 1
            intervals += [
                t.start_interval[0] <= stage.start <= t.start_interval[1],
                t.end_interval[0] <= stage.end <= t.end_interval[1],
            ]
        stages_there, all_found = stages_there + len(scenario.stages), all_found + len(transitions)
        confirmed += sum(not t.provisional for t in transitions)
    for scenario, trajectory in quiet:
        alarms += is_false_alarm(as_stages(find_transitions(trajectory)), scenario)
    published = (Trajectory.read(ROOT / "tests" / "data" / "published" / f"lr_seed{seed}.csv") for seed in (0, 1))
    kinds = " ".join("".join(t.kind.label for t in find_transitions(run)) for run in published)
    return (
        f"{hits / stages_there:.3f} | {2 * hits / (all_found + stages_there):.3f} | {confirmed} | {alarms} | "
        f"{np.mean(changes):.3f} | {np.mean(intervals):.3f} | {kinds} |"
    )


def main() -> None:
    """Print the table."""
    many = [scenarios.staged(seed) for seed in range(80_000, 80_090)]
    many += [scenarios.staged(seed, chains=4) for seed in range(81_000, 81_060)]
    few = [
        make(seed, 40, 0.4 * (seed % 2), chains=4 * (seed % 3 == 0))
        for make in (scenarios.flat, scenarios.monotone)
        for seed in range(82_000, 82_060)
    ]
    staged, quiet = ([(scenario, points(scenario)) for scenario in some] for some in (many, few))
    columns = ["constant", "stages found", "F1", "confirmed", "false alarms", "changes within error"]
    print(f"| {' | '.join([*columns, 'boundaries within interval', 'published'])} |")
    print(f"|{8 * '---|'}")
    print(f"| as they are | {scores(staged, quiet)}")
    for name, values in VARIED:
        for value in values:
            with mock.patch.object(transitions, "_LOOKS", {}):
                modules = [m for m in (evidence, jumps, noise, smoothing, stages, transitions) if hasattr(m, name)]
                patches = [mock.patch.object(module, name, value) for module in modules]
                for patch in patches:
                    patch.start()
                print(f"| {name} = {value} | {scores(staged, quiet)}", flush=True)
                for patch in patches:
                    patch.stop()


if __name__ == "__main__":
    main()
