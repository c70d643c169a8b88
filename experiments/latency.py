"""How far past its start and its end a transition is first called and confirmed, against false alarms a run.

Each trajectory is replayed point by point. A stage of the whole trajectory's own transitions (published) or of the
simulation is called at the first point after which a transition of its sign that shares more than half of the shorter
one's length in log steps is found, and confirmed at the first where that one isn't provisional. Delays are in log
steps: 0.69 is twice the step. A call that fits no stage is a false alarm; one that is confirmed and later gone is
taken back. The curve comes from the confidence asked of a call.

experiments/results/latency.md has the tables.

    python experiments/latency.py [--quick]
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from command_line import command_line
from live import Looks, call, replayed
from stages import Stage, as_stages, log, same, simulated
from transitions import points, scenarios

from phasewatch import Trajectory, Transition, find_transitions

PUBLISHED = Path(__file__).parents[1] / "tests" / "data" / "published"
CONFIDENCES = (0.95, 0.99, 0.999, 0.9999)


def table(name: str, runs: Sequence[tuple[Looks, list[Stage]]]) -> None:
    """A line for each confidence."""
    print(f"\n## {name}: {len(runs)} runs, {sum(len(stages) for _, stages in runs)} stages\n")
    print("| confidence | called | past start | past end | confirmed | past end | false calls a run | "
          "false confirmed a run | taken back |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for least in CONFIDENCES:
        starts, ends, settled, false, wrong, gone, total = [], [], [], 0, 0, 0, 0
        for replay, stages in runs:
            total += len(stages)
            for stage in stages:
                seen = call(replay, stage, least)
                if seen.called is not None:
                    starts.append(log(seen.called) - log(stage.start))
                    ends.append(log(seen.called) - log(stage.end))
                if seen.confirmed is not None:
                    settled.append(log(seen.confirmed) - log(stage.end))
            called = [t for _, found in replay for t in found if t.confidence >= least]
            stray = [
                t
                for t, its in zip(called, as_stages(called), strict=True)
                if not any(same(its, stage) for stage in stages)
            ]
            false += len(_distinct(stray))
            wrong += len(_distinct([t for t in stray if not t.provisional]))
            gone += _taken_back(replay)
        print(f"| {least:g} | {len(starts) / total:.0%} | {_middle(starts)} | {_middle(ends)} | "
              f"{len(settled) / total:.0%} | {_middle(settled)} | {false / len(runs):.2f} | {wrong / len(runs):.2f} | "
              f"{gone} |", flush=True)  # fmt: skip


def _middle(delays: list[float]) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*np.quantile(delays, [0.5, 0.1, 0.9])) if delays else "-"


def overlap(a: Transition, b: Transition) -> bool:
    """Whether two transitions of one direction share steps."""
    return a.change.trend == b.change.trend and a.start < b.end and b.start < a.end


def _distinct(calls: list[Transition]) -> list[Transition]:
    """Calls of which none overlaps with one of its sign before it."""
    kept: list[Transition] = []
    for t in calls:
        if not any(overlap(t, other) for other in kept):
            kept.append(t)
    return kept


def _taken_back(replay: Looks) -> int:
    """Confirmed transitions that overlap with none of their sign at some later point."""
    gone: set[Transition] = set()
    standing: list[Transition] = []
    for _, found in replay:
        for old in standing:
            if not any(overlap(old, t) for t in found):
                gone.add(old)
        standing.extend(t for t in found if not t.provisional)
    return len(_distinct(list(gone)))


def main() -> None:
    """Print the tables."""
    parser = command_line(__doc__, quick="few trajectories, to see that it runs")
    quick = parser.parse_args().quick
    for seed in (0, 1):
        whole = Trajectory.read(PUBLISHED / f"lr_seed{seed}.csv")
        table(f"published, seed {seed}", [(replayed(whole, 8 if quick else 1), as_stages(find_transitions(whole)))])
    runs = []
    for seed in range(4 if quick else 40):
        scenario = scenarios.staged(seed, 60)
        runs.append((replayed(points(scenario)), simulated(scenario.stages)))
    table("simulated, 60 points", runs)


if __name__ == "__main__":
    main()
