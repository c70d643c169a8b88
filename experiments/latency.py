"""How far past its start and its end a transition is first called and confirmed, against false alarms a run.

Each trajectory is replayed point by point. A stage of the whole trajectory's own transitions (published) or of the
simulation is called at the first point after which a transition of its sign that shares more than half of the shorter
one's length in log steps is found, and confirmed at the first where that one isn't provisional. Delays are in log
steps: 0.69 is twice the step. A call that fits no stage is a false alarm; one that is confirmed and later gone is
taken back. The curve comes from the confidence asked of a call.

experiments/results/latency.md has the tables.

    python experiments/latency.py [--quick]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from live import Looks, fits, log, replayed
from transitions import Found, points, scenarios

from phasewatch import Trajectory, Transition, find_transitions

PUBLISHED = Path(__file__).parents[1] / "tests" / "data" / "published"
CONFIDENCES = (0.95, 0.99, 0.999, 0.9999)


def table(name: str, runs: Sequence[tuple[Looks, list[Found]]]) -> None:
    """A line for each confidence."""
    print(f"\n## {name}: {len(runs)} runs, {sum(len(stages) for _, stages in runs)} stages\n")
    print("| confidence | called | past start | past end | confirmed | past end | false calls a run | "
          "false confirmed a run | taken back |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for least in CONFIDENCES:
        starts, ends, settled, false, wrong, gone, total = [], [], [], 0, 0, 0, 0
        for replay, stages in runs:
            total += len(stages)
            calls = [(step, t) for step, found in replay for t in found if t.confidence >= least]
            for stage in stages:
                called = next((step for step, t in calls if fits(t, stage.start, stage.end, stage.sign)), None)
                confirmed = next(
                    (step for step, t in calls if fits(t, stage.start, stage.end, stage.sign) and not t.provisional),
                    None,
                )
                if called is not None:
                    starts.append(log(called) - log(stage.start))
                    ends.append(log(called) - log(stage.end))
                if confirmed is not None:
                    settled.append(log(confirmed) - log(stage.end))
            stray = [t for _, t in calls if not any(fits(t, stage.start, stage.end, stage.sign) for stage in stages)]
            false += len(_distinct(stray))
            wrong += len(_distinct([t for t in stray if not t.provisional]))
            gone += _taken_back(replay)
        print(f"| {least:g} | {len(starts) / total:.0%} | {_middle(starts)} | {_middle(ends)} | "
              f"{len(settled) / total:.0%} | {_middle(settled)} | {false / len(runs):.2f} | {wrong / len(runs):.2f} | "
              f"{gone} |", flush=True)  # fmt: skip


def _middle(delays: list[float]) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*np.quantile(delays, [0.5, 0.1, 0.9])) if delays else "-"


def _distinct(calls: list[Transition]) -> list[Transition]:
    """Calls of which none overlaps with one of its sign before it."""
    kept: list[Transition] = []
    for t in calls:
        if not any(t.llc_trend == other.llc_trend and t.start < other.end and other.start < t.end for other in kept):
            kept.append(t)
    return kept


def _taken_back(replay: Looks) -> int:
    """Confirmed transitions that overlap with none of their sign at some later point."""
    gone: set[Transition] = set()
    standing: list[Transition] = []
    for _, found in replay:
        for old in standing:
            if not any(t.llc_trend == old.llc_trend and t.start < old.end and old.start < t.end for t in found):
                gone.add(old)
        standing.extend(t for t in found if not t.provisional)
    return len(_distinct(list(gone)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few trajectories, to see that it runs")
    quick = parser.parse_args().quick
    for seed in (0, 1):
        whole = Trajectory.read(PUBLISHED / f"lr_seed{seed}.csv")
        stages = [Found(t.start, t.end, np.sign(t.llc_change)) for t in find_transitions(whole)]
        table(f"published, seed {seed}", [(replayed(whole, 8 if quick else 1), stages)])
    runs = []
    for seed in range(4 if quick else 40):
        scenario = scenarios.staged(seed, 60)
        stages = [Found(s.start, s.end, np.sign(s.change)) for s in scenario.stages]
        runs.append((replayed(points(scenario), 1), stages))
    table("simulated, 60 points", runs)


if __name__ == "__main__":
    main()
