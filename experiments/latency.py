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
from transitions import Found, points, scenarios

from phasewatch import Trajectory, Transition, find_transitions

PUBLISHED = Path(__file__).parents[1] / "tests" / "data" / "published"
CONFIDENCES = (0.95, 0.99, 0.999, 0.9999)


def _log(step: float) -> float:
    return float(np.log(max(step, 0.5)))


def fits(t: Transition, stage: Found) -> bool:
    """Whether a transition is of a stage."""
    common = _log(min(t.end, stage.end)) - _log(max(t.start, stage.start))
    shorter = min(_log(t.end) - _log(t.start), _log(stage.end) - _log(stage.start))
    return np.sign(t.llc_change) == stage.sign and common > 0.5 * shorter


def replayed(trajectory: Trajectory, every: int) -> list[tuple[int, list[Transition]]]:
    """What is found after each point, with that point's step."""
    return [(trajectory[n - 1].step, find_transitions(trajectory[:n])) for n in range(5, len(trajectory) + 1, every)]


def table(name: str, runs: Sequence[tuple[list[tuple[int, list[Transition]]], list[Found]]]) -> None:
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
                called = next((step for step, t in calls if fits(t, stage)), None)
                confirmed = next((step for step, t in calls if fits(t, stage) and not t.provisional), None)
                if called is not None:
                    starts.append(_log(called) - _log(stage.start))
                    ends.append(_log(called) - _log(stage.end))
                if confirmed is not None:
                    settled.append(_log(confirmed) - _log(stage.end))
            stray = [t for _, t in calls if not any(fits(t, stage) for stage in stages)]
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


def _taken_back(replay: list[tuple[int, list[Transition]]]) -> int:
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
