"""The jumps of a behaviour, and the transition of λ̂ that goes with each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import numpy as np

from phasewatch import Change, Kind, Trajectory, Transition, coincide, find_transitions
from phasewatch.monitor.trajectories.coincide import Coincidence
from phasewatch.monitor.trajectories.smoothing import log_steps, smooth
from phasewatch.monitor.trajectories.transitions import Trend


@dataclass(frozen=True)
class Jump:
    """A large change of a behaviour.

    Attributes:
        transition: of the behaviour's own signal.
        half: the step at which half of it is done.
        pair: with the λ̂ transition that goes with it, which comes first in it, or with several in a row of one
            direction as one; None if there is none.
    """

    transition: Transition
    half: float
    pair: Coincidence | None


def jumps(trajectory: Trajectory, metric: str, trend: Trend, *, least: float = 0.25) -> list[Jump]:
    """The stages in which a behaviour changes most, and what λ̂ does beside them.

    Args:
        trajectory: of a whole run.
        metric: the behaviour.
        trend: the direction that counts.
        least: the smallest change that is a jump, as a share of the metric's range over the run.

    Returns:
        Them, in order.
    """
    found = find_transitions(trajectory, signal=metric)
    partners = {pair.second: pair for pair in coincide(stretches(trajectory), found).pairs}
    usable = trajectory.usable(metric).signal(metric)
    enough = least * (usable.max() - usable.min()) if len(usable) else 0.0
    return [
        Jump(t, halfway(trajectory, t), partners.get(t))
        for t in found
        if t.change.trend == trend and abs(t.change.value) >= enough
    ]


def halfway(trajectory: Trajectory, transition: Transition) -> float:
    """The step at which the smoothed signal of a transition has made half of its change.

    Args:
        trajectory: whose transition it is.
        transition: of any metric.

    Returns:
        A step between its start and its end.
    """
    usable = trajectory.usable(transition.signal)
    x = log_steps(usable.steps)
    inside = (usable.steps >= transition.start) & (usable.steps <= transition.end)
    curve = smooth(x, usable.signal(transition.signal)).value[inside]
    done = np.maximum.accumulate((curve - curve[0]) / (curve[-1] - curve[0]))
    return float(np.interp(0.5, done, usable.steps[inside]))


def stretches(trajectory: Trajectory, metric: str = "llc") -> list[Transition]:
    """A signal's transitions, and large ones that follow each other in one direction also as one.

    A long rise may be found in two stages, of which neither is what a jump goes with.
    """
    found = find_transitions(trajectory, signal=metric)
    steps = trajectory.usable(metric).steps.tolist()
    every = list(found)
    for i, first in enumerate(found):
        for n, (before, last) in enumerate(pairwise(found[i:]), start=2):
            apart = steps.index(last.start) - steps.index(before.end)
            inside = found[i : i + n]
            if apart > 1 or last.change.trend != first.change.trend or without_small(found, inside) != inside:
                break
            every.append(_as_one(inside))
    return every


def _as_one(inside: Sequence[Transition]) -> Transition:
    first, last = inside[0], inside[-1]
    kinds = {t.kind for t in inside}
    return replace(
        first,
        kind=kinds.pop() if len(kinds) == 1 else Kind.OTHER,
        end=last.end,
        end_interval=last.end_interval,
        changes={name: _as_one_change([t.changes[name] for t in inside]) for name in first.changes},
        confidence=min(t.confidence for t in inside),
        provisional=any(t.provisional for t in inside),
    )


def _as_one_change(inside: Sequence[Change]) -> Change:
    return replace(inside[0], after=inside[-1].after, error=sum(c.error**2 for c in inside) ** 0.5)


def merged(found: Sequence[Transition]) -> list[Transition]:
    """The transitions without those whose kind repeats the one before."""
    return [t for before, t in zip([None, *found], found, strict=False) if before is None or t.kind is not before.kind]


def without_small(found: Sequence[Transition], some: Sequence[Transition] | None = None) -> list[Transition]:
    """Transitions of a signal, or some of them, that change it by a tenth of its largest change at least."""
    enough = 0.1 * max((abs(t.change.value) for t in found), default=0)
    return [t for t in (found if some is None else some) if abs(t.change.value) >= enough]


def largest(found: Sequence[Jump]) -> Jump | None:
    """The largest of several."""
    return max(found, key=lambda jump: abs(jump.transition.change.value), default=None)


def goes_with_largest(trajectory: Trajectory, metric: str, trend: Trend) -> Kind | None:
    """The kind of the λ̂ transition that goes with the largest jump of a behaviour, if one does."""
    jump = largest(jumps(trajectory, metric, trend))
    return jump.pair.first.kind if jump and jump.pair else None


def beside(trajectory: Trajectory, metric: str, trend: Trend) -> dict[str, object]:
    """The largest jump of a behaviour and what λ̂ does beside it, as columns of a table."""
    jump = largest(jumps(trajectory, metric, trend))
    name = metric.replace("_", " ")
    if jump is None:
        return {name: "no jump"}
    t = jump.transition
    shown: dict[str, object] = {
        name: f"{t.change.before:.2f} to {t.change.after:.2f}",
        f"{name}, steps": f"{t.start} to {t.end}",
        f"{name}, half": round(jump.half),
    }
    if jump.pair is None:
        return shown | {f"λ̂ beside {name}": "none"}
    llc, (low, high) = jump.pair.first, jump.pair.start_lag_interval
    return shown | {
        f"λ̂ beside {name}": f"{llc.kind.label}, {llc.start} to {llc.end}, half at {halfway(trajectory, llc):.0f}",
        f"λ̂ starts before {name} by": f"{jump.pair.start_lag} ({low} to {high})",
    }


def rates(trajectories: Sequence[Trajectory], metric: str, trend: Trend) -> dict[str, object]:
    """How often λ̂ goes with the largest jump of a behaviour, and which comes first, as a row of a table."""
    largest_ones = [(t, largest(jumps(t, metric, trend))) for t in trajectories]
    seen = [(trajectory, jump) for trajectory, jump in largest_ones if jump]
    pairs = [(trajectory, jump, jump.pair) for trajectory, jump in seen if jump.pair]
    kinds = sorted(pair.first.kind.label for _, _, pair in pairs)
    firsts = [pair.starts_first for _, _, pair in pairs]
    lags = [jump.half - halfway(trajectory, pair.first) for trajectory, jump, pair in pairs]
    return {
        "jump": f"{metric.replace('_', ' ')} {trend}",
        "seen": f"{len(seen)} of {len(largest_ones)}",
        "a λ̂ transition goes with it": f"{len(pairs)} of {len(seen)}",
        "of kind": ", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds)),
        "λ̂ starts first": firsts.count("first"),
        "the jump starts first": firsts.count("second"),
        "unclear": firsts.count("unclear"),
        "steps from λ̂'s half to the jump's, median": round(median(lags)) if lags else "",
        "from, to": f"{min(lags):.0f} to {max(lags):.0f}" if lags else "",
    }
