"""How much of λ̂'s jitter late in training averaged weights or another reference take away, and what they bend.

Both toy tasks are trained once. Around a few places of each run, six points lie close together; each is measured as it
is, as a running average of the weights (with a fixed decay, or over the last few per cent of the steps so far), as the
mean of five snapshots around it, and with another reference loss. Jitter is the standard deviation of a cluster's
points around their own line, pooled over the late places. Bend is what the average over a cluster differs
from that of the plain points, and what the times of the curve's milestones differ by.

Claims (experiments/results/smooth_curves.md has the tables):
- An average over the last 2 % of the steps cuts the jitter 3.0 times (regression) and 1.9 times (induction), that
  over the last 5 % 6.4 and 3.8 times. Where λ̂ moves fast it comes later by about that share of the step.
- A decay of 0.99 does as much late, and bends what comes early; 0.999 moves the top by 70 % or loses it.
- Five snapshots ten steps apart or less cut it 1.2 to 1.5 times, since they share most of their noise, and move no
  milestone: what counts is how many steps a window spans.
- Another reference loss cuts it 1.6 times at most, in induction nothing: with these short chains E[L(w)] jitters
  nearly as much as L(w*), or more.
- Averaged weights have λ̂ higher by about nβ times what their loss is lower: 3 to 5 in regression (of a top of 71), up
  to 3 in induction. In regression it is 2 more at the top than at the end, and half of the fall, 23, seems to be
  reached 5 to 9 % earlier, by one to two standard errors; else the curves keep their shape.

Costs about twenty minutes on one idle core.

    python experiments/smooth_curves.py [--task regression|induction] [--output experiments/results/smooth_curves.md]
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import command_line
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import phasewatch as pw
from phasewatch.monitor.snapshots.averaging import RunningAverage
from phasewatch.toy_tasks import in_context_regression as regression
from phasewatch.toy_tasks import induction

POINTS = 6
GROUP = 5
"""Snapshots that a point is the mean of; groups don't overlap, so that neither do the points' errors."""
DECAYS = (0.9, 0.99, 0.999)
SHARES = (0.02, 0.05)


@dataclass(frozen=True)
class Task:
    """What is trained, and where it is looked at."""

    make_model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    data: Callable[[torch.Generator, int], Any]
    training: Callable[[nn.Module, Any], Iterator[int]]
    places: tuple[int, ...]
    late: int
    sampler: pw.Langevin
    metrics: Mapping[str, Callable[[nn.Module, Any], float]] = field(default_factory=dict)


TASKS = {
    "regression": Task(
        make_model=partial(regression.RegressionTransformer, width=32),
        loss=regression.loss,
        data=regression.RegressionData(),
        training=regression.training,
        places=(200, 700, 1500, 2800, 4500, 6800),
        late=1500,
        sampler=pw.Langevin(
            step_size=3e-4, localization=100, nbeta=66.7, chains=4, draws=30, burn_in=20, batch_size=32
        ),
    ),
    "induction": Task(
        make_model=induction.make_model,
        loss=induction.loss,
        data=induction.InductionData(),
        training=induction.training,
        places=(300, 700, 900, 1300, 2000, 2800),
        late=1300,
        sampler=pw.Langevin(step_size=1e-4, localization=100, nbeta=200, chains=2, draws=15, burn_in=15, batch_size=16),
        metrics=induction.published_metrics(induction.InductionData()),
    ),
}


def cluster(place: int) -> list[list[int]]:
    """The steps of the groups around a place: neighbours a three-hundredth of it apart, ten steps at most."""
    spacing = min(max(place // 300, 1), 10)
    first = place - spacing * (POINTS * GROUP // 2)
    steps = [first + i * spacing for i in range(POINTS * GROUP)]
    return [steps[i : i + GROUP] for i in range(0, len(steps), GROUP)]


def snapshots_of_run(task: Task) -> Iterator[dict[str, pw.Snapshot]]:
    """Train, and give the weights and their running averages by name at each step of each cluster."""
    torch.manual_seed(0)
    model = task.make_model()
    wanted = {step for place in task.places for group in cluster(place) for step in group}
    decayed = {decay: {name: torch.zeros_like(p) for name, p in model.named_parameters()} for decay in DECAYS}
    averages = {share: RunningAverage(share) for share in SHARES}
    for step in islice(task.training(model, task.data), max(wanted)):
        for average in averages.values():
            average.update(model, step)
        with torch.no_grad():
            for decay, mean in decayed.items():
                for name, p in model.named_parameters():
                    # The average of the first steps is their mean, until the decay's own horizon is reached
                    mean[name].lerp_(p, max(1 - decay, 1 / step))
        if step in wanted:
            plain = pw.Snapshot.of(model, step)
            yield (
                {"plain": plain}
                | {f"decay {decay}": with_tensors(plain, mean) for decay, mean in decayed.items()}
                | {f"last {share:.0%} of the steps": a.snapshot(model, step) for share, a in averages.items()}
            )


def with_tensors(snapshot: pw.Snapshot, tensors: Mapping[str, Tensor]) -> pw.Snapshot:
    """A snapshot with copies of other tensors in the place of its own."""
    return replace(snapshot, tensors={**snapshot.tensors, **{name: t.clone() for name, t in tensors.items()}})


def mean_of(snapshots: Sequence[pw.Snapshot]) -> pw.Snapshot:
    """The mean of snapshots, at the step of the one in the middle."""
    middle = snapshots[len(snapshots) // 2]
    floating = [name for name, tensor in middle.tensors.items() if tensor.is_floating_point()]
    return with_tensors(middle, {name: torch.stack([s.tensors[name] for s in snapshots]).mean(0) for name in floating})


def minibatches(task: Task) -> Any:
    """All the minibatches that the chains' losses are taken on, as one batch: a point's loss is then their mean L(w*).

    So λ̂ plus nβ times the loss is nearly nβ times the mean of L(w) along the chains.
    """
    drawn = []

    def data(generator: torch.Generator, batch_size: int) -> Any:
        drawn.append(task.data(generator, batch_size))
        return drawn[-1]

    subject = pw.Probe(task.make_model, task.loss, data, sampler=task.sampler).subject
    kept = len(subject.kept(task.sampler))
    return tree_map(lambda *leaves: torch.cat(leaves), *drawn[-kept:])


def measure(task: Task) -> dict[str, dict[int, pw.Trajectory]]:
    """The points of each way of averaging around each place."""
    probe = pw.Probe(
        task.make_model,
        task.loss,
        task.data,
        eval_batch=minibatches(task),
        sampler=task.sampler,
        metrics=task.metrics,
        threads=1,
    )
    began = time.perf_counter()
    run = {snapshots["plain"].step: snapshots for snapshots in snapshots_of_run(task)}
    print(f"trained in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    found: dict[str, dict[int, pw.Trajectory]] = {}
    for place in task.places:
        points: dict[str, list[pw.Point]] = {}
        for group in cluster(place):
            own = run[group[GROUP // 2]]
            mean = mean_of([run[step]["plain"] for step in group])
            for name, snapshot in {"plain": own["plain"], f"mean of {GROUP} snapshots": mean, **own}.items():
                points.setdefault(name, []).append(probe(snapshot))
        for name, measured in points.items():
            found.setdefault(name, {})[place] = pw.Trajectory(measured)
        print(f"place {place} at {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Curve:
    """λ̂ of the points of a cluster, for each place."""

    steps: dict[int, np.ndarray]
    llc: dict[int, np.ndarray]

    def jitter(self, places: list[int]) -> tuple[float, float]:
        """Standard deviation around each cluster's line, pooled, and its own standard error."""
        residuals = [without_line(self.steps[place], self.llc[place]) for place in places]
        freedom = len(places) * (POINTS - 2)
        deviation = math.sqrt(sum((r**2).sum() for r in residuals) / freedom)
        return deviation, deviation / math.sqrt(2 * freedom)

    def level(self, place: int) -> float:
        """Mean over a cluster."""
        return float(self.llc[place].mean())


def without_line(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What a straight line leaves."""
    return values - np.polyval(np.polyfit(steps - steps.mean(), values, 1), steps - steps.mean())


def curves(found: dict[str, dict[int, pw.Trajectory]], nbeta: float) -> dict[str, Curve]:
    """λ̂ of every way of averaging, and of the plain points with other references."""
    plain = found["plain"]
    steps = {place: points.steps for place, points in plain.items()}
    measured = {name: Curve(steps, {p: t.llc for p, t in by_place.items()}) for name, by_place in found.items()}
    smoothed = {
        p: t.llc + nbeta * (t.loss - np.convolve(np.pad(t.loss, 1, "edge"), np.ones(3) / 3, "valid"))
        for p, t in plain.items()
    }
    line = {p: t.llc + nbeta * without_line(t.steps, t.loss) for p, t in plain.items()}
    return measured | {
        "plain, reference: mean of 3 neighbours' losses": Curve(steps, smoothed),
        "plain, reference: line through 6 losses": Curve(steps, line),
        "plain, reference: none, nβ·E[L(w)]": Curve(steps, {p: t.llc + nbeta * t.loss for p, t in plain.items()}),
    }


def milestones(curve: Curve) -> dict[str, np.ndarray]:
    """Log steps of half of the rise of λ̂, its top, and half of its later fall: one for each point of the clusters."""
    places = sorted(curve.llc)
    found: dict[str, list[float]] = {}
    for i in range(POINTS):
        log_step = np.log([curve.steps[place][i] for place in places])
        level = np.array([curve.llc[place][i] for place in places])
        top = int(level.argmax())
        if top > 0:
            half = _crossing(log_step[: top + 1], level[: top + 1], (level[0] + level[top]) / 2)
            found.setdefault("half of the rise", []).append(half)
        if 0 < top < len(places) - 1:
            a, b, _ = np.polyfit(log_step[top - 1 : top + 2] - log_step[top], level[top - 1 : top + 2], 2)
            found.setdefault("top", []).append(log_step[top] - b / (2 * a))
            half = _crossing(log_step[top:], level[top:], (level[top] + level[-1]) / 2)
            found.setdefault("half of the fall", []).append(half)
    return {name: np.array(values) for name, values in found.items() if len(values) == POINTS}


def _crossing(log_step: np.ndarray, level: np.ndarray, at: float) -> float:
    rising = level[-1] > level[0]
    after = next(i for i in range(1, len(level)) if (level[i] >= at) == rising)
    share = (at - level[after - 1]) / (level[after] - level[after - 1])
    return float(log_step[after - 1] + share * (log_step[after] - log_step[after - 1]))


def report(title: str, task: Task, found: dict[str, dict[int, pw.Trajectory]]) -> Iterator[str]:
    """The lines of a task's tables, in Markdown."""
    places = sorted(found["plain"])
    late = [place for place in places if place >= task.late]
    nbeta = task.sampler.nbeta
    plain = found["plain"]
    losses = np.concatenate([without_line(plain[p].steps, plain[p].loss) for p in late])
    llcs = np.concatenate([without_line(plain[p].steps, plain[p].llc) for p in late])
    by_name = curves(found, nbeta)
    base, _ = by_name["plain"].jitter(late)
    own = milestones(by_name["plain"])
    yield f"\n## {title}\n"
    yield (
        f"- plain λ̂ against −nβ times its own loss, late: correlation {np.corrcoef(-losses, llcs)[0, 1]:.3f}, "
        f"slope {-(losses @ llcs) / (losses @ losses) / nbeta:.2f} nβ"
    )
    yield f"- plain, mean λ̂ at {listed({p: by_name['plain'].level(p) for p in places}, '.1f')}"
    yield f"- plain, mean loss at {listed({p: plain[p].loss.mean() for p in places}, '.4f')}"
    for metric in task.metrics:
        scores = {p: np.mean([point.metrics[metric] for point in plain[p]]) for p in places}
        yield f"- plain, mean {metric} at {listed(scores, '.3f')}"
    at_steps = ", ".join(f"{milestone} {math.exp(at.mean()):.0f}" for milestone, at in own.items())
    yield f"- plain, milestones at {at_steps}"
    yield f"\n| λ̂ of | jitter from step {late[0]} on | times less | level − plain, by place | {' | '.join(own)} |"
    yield "|---|---|---|---|" + "---|" * len(own)
    for name, curve in by_name.items():
        jitter, error = curve.jitter(late)
        bend = " ".join(f"{curve.level(p) - by_name['plain'].level(p):+.1f}" for p in places)
        moved = milestones(curve)
        shift = " | ".join(later(moved[m] - at) if m in moved else "gone" for m, at in own.items())
        yield f"| {name} | {jitter:.2f} ± {error:.2f} | {base / jitter:.1f} | {bend} | {shift} |"
    yield "\njitter by place:\n"
    for name, curve in by_name.items():
        yield f"- {name}: {listed({p: curve.jitter([p])[0] for p in places}, '.2f')}"
    yield "\nloss − plain, by place:\n"
    for name, by_place in found.items():
        yield f"- {name}: {listed({p: by_place[p].loss.mean() - plain[p].loss.mean() for p in places}, '+.4f')}"


def listed(by_place: Mapping[int, Any], form: str) -> str:
    """Numbers by their place."""
    return "  ".join(f"{place}: {value:{form}}" for place, value in by_place.items())


def later(shifts: np.ndarray) -> str:
    """How much later a milestone comes, with its standard error over the points of the clusters."""
    return f"{shifts.mean():+.1%} ± {shifts.std(ddof=1) / math.sqrt(len(shifts)):.1%}"


def main() -> None:
    """Train, measure and print a table for each task."""
    parser = command_line(__doc__, quick="two early places and short chains, to see that it runs")
    parser.add_argument("--task", choices=list(TASKS), action="append")
    parser.add_argument("--output", type=Path, help="a file to write what is printed to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["# Output of `python experiments/smooth_curves.py`"]
    for name in arguments.task or TASKS:
        task = TASKS[name]
        if arguments.quick:
            sampler = replace(task.sampler, draws=4, burn_in=1)
            task = replace(task, places=(60, 120), late=60, sampler=sampler)
        lines += report(name, task, measure(task))
    text = "\n".join(lines)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
