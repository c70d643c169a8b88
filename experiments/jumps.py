"""The jumps of a behaviour, and the transition of λ̂ that goes with each."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from campaign import halfway

from phasewatch import Trajectory, Transition, coincide, find_transitions
from phasewatch.monitor.coincide import Coincidence
from phasewatch.monitor.transitions import Trend


@dataclass(frozen=True)
class Jump:
    """A large change of a behaviour.

    Attributes:
        transition: of the behaviour's own signal.
        half: the step at which half of it is done.
        pair: with the λ̂ transition that goes with it, which comes first in it; None if there is none.
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
    found = find_transitions(trajectory, metric=metric)
    partners = {pair.second: pair for pair in coincide(find_transitions(trajectory), found).pairs}
    usable = trajectory.usable(metric).signal(metric)
    enough = least * (usable.max() - usable.min()) if len(usable) else 0.0
    return [
        Jump(t, halfway(trajectory, t), partners.get(t))
        for t in found
        if t.trend == trend and abs(t.after - t.before) >= enough
    ]


def largest(found: Sequence[Jump]) -> Jump | None:
    """The largest of several."""
    return max(found, key=lambda jump: abs(jump.transition.after - jump.transition.before), default=None)


def beside(trajectory: Trajectory, metric: str, trend: Trend) -> dict[str, object]:
    """The largest jump of a behaviour and what λ̂ does beside it, as columns of a table."""
    jump = largest(jumps(trajectory, metric, trend))
    name = metric.replace("_", " ")
    if jump is None:
        return {name: "no jump"}
    t = jump.transition
    shown: dict[str, object] = {
        name: f"{t.before:.2f} to {t.after:.2f}",
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
