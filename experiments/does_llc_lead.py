"""Does λ̂ lead? When a monitor calls its transition, against when the behaviour jumps and when that itself is called.

The kept trajectories of the other experiments are seen point by point. A behaviour's jump is the last of its stages
over the whole run that goes in the direction and as far as BEHAVIOURS says; its time is the step at which half of it
is done. The λ̂ transition that goes with it is the one, or the several in a row of one direction, that `coincide` pairs
with it, or else the one whose stretch holds that step. It is called at the first point after which a transition of its
sign that shares more than half of the shorter one's length in log steps is found, and confirmed at the first where such
a one isn't provisional. The jump's own stage is called likewise, from the points of the behaviour alone, and so is the
stage of the loss that goes with it, which costs nothing to watch.

All times are in steps from the half-way step of the jump, negative before it: the median, and from 10 to 90 % of the
cases. They are known no better than the points are apart. A long λ̂ transition that is called early has not seen the
jump: how early it starts stands beside it, how many λ̂ transitions go with no jump below, and how many there are in
control runs in which nothing jumps.

Claim: none; the distribution is the result.

Costs ten minutes on one CPU core, given the trajectories under results/points/.

    python experiments/does_llc_lead.py [--points FOLDER] [--quick]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from campaign import RESULTS
from command_line import command_line
from jumps import Jump, jumps, stretches
from live import Call, Looks, call, replayed
from stages import as_stages
from tables import keep, keep_table, markdown
from tqdm import tqdm

from phasewatch import Trajectory, Transition, coincide, find_transitions
from phasewatch.monitor.trajectories.transitions import Trend

EXPERIMENT = "does_llc_lead"


@dataclass(frozen=True)
class Behaviour:
    """What counts as a jump.

    Attributes:
        experiment: whose runs it is looked for in.
        metric: the behaviour.
        trend: its direction.
        least: how far it goes at least.
        runs: what the names of the runs begin with.
    """

    experiment: str
    metric: str
    trend: Trend
    least: float
    runs: str = ""


BEHAVIOURS = (
    Behaviour("induction_bump", "prefix_matching", "up", 0.2, "2-layers-"),
    Behaviour("induction_bump", "previous_token", "up", 0.2, "2-layers-"),
    Behaviour("induction_bump", "icl_score", "down", 0.15, "2-layers-"),
    Behaviour("induction_substages", "prefix_matching", "up", 0.2),
    Behaviour("induction_substages", "previous_token", "up", 0.2),
    Behaviour("induction_substages", "icl_score", "down", 0.15),
    Behaviour("regression_stages", "icl_score", "down", 0.1),
    Behaviour("regression_stages", "ridge_distance", "down", 0.1),
    Behaviour("grokking", "test_accuracy", "up", 0.3, "seed-"),
    Behaviour("grokking", "rule_share", "up", 0.3, "seed-"),
    Behaviour("parity", "loss", "down", 0.3),
    Behaviour("parity", "accuracy", "up", 0.2),
    Behaviour("parity", "relevant_movement", "up", 0.2),
    Behaviour("superposition", "loss", "down", 0.005),
)
CONTROLS = (("induction_bump", "1-layers-"), ("grokking", "shuffled-seed-"))


@dataclass(frozen=True)
class Case:
    """A jump in a run.

    Attributes:
        run: the run's name.
        jump: the behaviour's.
        own: when the jump's own stage was seen.
        llc: the λ̂ transition that goes with it, if there is one.
        seen: when that was seen.
        loss_seen: when the loss's stage that goes with it was seen.
        apart: steps between the points around the jump's half-way step.
    """

    run: str
    jump: Jump
    own: Call
    llc: Transition | None
    seen: Call
    loss_seen: Call
    apart: int


def last_jump(trajectory: Trajectory, behaviour: Behaviour) -> Jump | None:
    """The last jump of a behaviour that goes far enough."""
    found = jumps(trajectory, behaviour.metric, behaviour.trend, least=0.0)
    far = [jump for jump in found if abs(jump.transition.change.value) >= behaviour.least]
    return far[-1] if far else None


def beside(trajectory: Trajectory, jump: Jump, signal: str) -> Transition | None:
    """The transition of λ̂ or of the loss that goes with a jump."""
    found = stretches(trajectory, signal)
    pairs = coincide(found, find_transitions(trajectory, signal=jump.transition.signal)).pairs
    paired = [pair.first for pair in pairs if pair.second == jump.transition]
    held = [t for t in find_transitions(trajectory, signal=signal) if t.start <= jump.half < t.end]
    return next(iter([*paired, *held]), None)


def case(name: str, trajectory: Trajectory, looks: Mapping[str, Looks], behaviour: Behaviour) -> Case | None:
    """A run's jump, and when it and what goes with it were seen in the looks at each signal."""
    jump = last_jump(trajectory, behaviour)
    if jump is None:
        return None
    llc, loss = (beside(trajectory, jump, signal) for signal in ("llc", "loss"))

    def seen(signal: str, transition: Transition | None) -> Call:
        return call(looks[signal], as_stages([transition])[0]) if transition else Call(None, None)

    after = int(np.searchsorted(trajectory.steps, jump.half).clip(1, len(trajectory) - 1))
    return Case(
        run=name,
        jump=jump,
        own=seen(behaviour.metric, jump.transition),
        llc=llc,
        seen=seen("llc", llc),
        loss_seen=seen("loss", loss),
        apart=int(trajectory.steps[after] - trajectory.steps[after - 1]),
    )


def order(cases: Sequence[tuple[int | None, int | None]]) -> str:
    """How often the first of two is called first, at the same point, and later."""
    known = [(ours, theirs) for ours, theirs in cases if ours is not None and theirs is not None]
    first, same = sum(ours < theirs for ours, theirs in known), sum(ours == theirs for ours, theirs in known)
    return f"{first}, {same}, {len(known) - first - same}"


def spread(values: Sequence[float]) -> str:
    """The median, and from 10 to 90 %."""
    if not values:
        return "-"
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return f"{middle:+.0f} ({low:+.0f} to {high:+.0f})"


def row(behaviour: Behaviour, cases: Sequence[Case], runs: int) -> dict[str, object]:
    """A behaviour's line of the table."""
    with_llc = [c for c in cases if c.llc]
    kinds = sorted(c.llc.kind.label for c in with_llc if c.llc)
    return {
        "experiment": behaviour.experiment,
        "jump": f"{behaviour.metric} {behaviour.trend}",
        "seen in": f"{len(cases)} of {runs} runs",
        "with a λ̂ transition": f"{len(with_llc)} of {len(cases)}",
        "of kind": ", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds)),
        "λ̂ starts": spread([c.llc.start - c.jump.half for c in with_llc if c.llc]),
        "λ̂ called": spread([c.seen.called - c.jump.half for c in with_llc if c.seen.called is not None]),
        "λ̂ confirmed": spread([c.seen.confirmed - c.jump.half for c in with_llc if c.seen.confirmed is not None]),
        "jump starts": spread([c.jump.transition.start - c.jump.half for c in cases]),
        "jump called": spread([c.own.called - c.jump.half for c in cases if c.own.called is not None]),
        "loss called": spread([c.loss_seen.called - c.jump.half for c in cases if c.loss_seen.called is not None]),
        "λ̂ before the jump, at once, after": order([(c.seen.called, c.own.called) for c in cases]),
        "λ̂ before the loss, at once, after": order([(c.seen.called, c.loss_seen.called) for c in cases]),
        "points apart": int(np.median([c.apart for c in cases])) if cases else "",
    }


def record(behaviour: Behaviour, c: Case) -> dict[str, object]:
    """A jump's line of the csv file."""
    t, llc = c.jump.transition, c.llc
    return {
        "experiment": behaviour.experiment,
        "run": c.run,
        "metric": behaviour.metric,
        "start": t.start,
        "half": round(c.jump.half),
        "end": t.end,
        "called": c.own.called,
        "confirmed": c.own.confirmed,
        "llc_kind": llc.kind.label if llc else None,
        "llc_start": llc.start if llc else None,
        "llc_end": llc.end if llc else None,
        "llc_called": c.seen.called,
        "llc_confirmed": c.seen.confirmed,
        "loss_called": c.loss_seen.called,
    }


def alone(experiment: str, prefix: str, runs: dict[str, Trajectory], cases: Sequence[Case]) -> dict[str, object]:
    """How many λ̂ transitions go with no jump, as a line of the table."""
    taken = [(c.run, c.llc) for c in cases if c.llc]
    found = [(name, t) for name, trajectory in runs.items() for t in find_transitions(trajectory)]
    free = [
        t
        for name, t in found
        if not any(run == name and llc.start <= t.start and t.end <= llc.end for run, llc in taken)
    ]
    kinds = [t.kind.label for t in free]
    return {
        "experiment": experiment,
        "runs": f"{prefix}*" if prefix else "all",
        "number": len(runs),
        "λ̂ transitions": len(found),
        "with no jump": len(free),
        **{f"of kind {kind}": kinds.count(kind) for kind in ("A", "B", "other")},
    }


def read(points: Path, experiment: str, prefix: str, quick: bool) -> dict[str, Trajectory]:
    """The kept runs of an experiment, by name."""
    files = sorted((points / experiment).glob(f"{prefix}*.jsonl"))
    return {file.stem: Trajectory.read(file) for file in (files[:2] if quick else files)}


def main() -> None:
    """Print the tables, and keep them."""
    parser = command_line(__doc__, quick="two runs of each, few looks, nothing is kept")
    parser.add_argument("--points", type=Path, default=RESULTS / "points", help="the trajectories of the experiments")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go (default: results/)")
    given = parser.parse_args()
    every = 8 if given.quick else 1

    rows, records, others = [], [], []
    for experiment, prefix in dict.fromkeys((b.experiment, b.runs) for b in BEHAVIOURS):
        runs = read(given.points, experiment, prefix, given.quick)
        of_these = [b for b in BEHAVIOURS if (b.experiment, b.runs) == (experiment, prefix)]
        cases: dict[Behaviour, list[Case]] = {b: [] for b in of_these}
        for name, trajectory in tqdm(runs.items(), desc=experiment):
            signals = dict.fromkeys(["llc", "loss", *(b.metric for b in of_these)])
            looks = {signal: replayed(trajectory, every, signal) for signal in signals}
            for b in of_these:
                found = case(name, trajectory, looks, b)
                cases[b] += [found] if found else []
        if runs:
            rows += [row(b, cases[b], len(runs)) for b in of_these]
            records += [record(b, c) for b in of_these for c in cases[b]]
            others.append(alone(experiment, prefix, runs, [c for b in of_these for c in cases[b]]))
    for experiment, prefix in CONTROLS:
        if runs := read(given.points, experiment, prefix, given.quick):
            others.append(alone(experiment, prefix, runs, []))

    results = given.results if records and not given.quick else None
    keep_table(results, EXPERIMENT, [*markdown(rows), "", *markdown(others)])
    if results:
        keep(results / f"{EXPERIMENT}.csv", records, by=["experiment", "run", "metric"])


if __name__ == "__main__":
    main()
