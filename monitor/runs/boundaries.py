"""How well the boundaries of a partly measured series are known, and what would help."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from phasewatch.monitor.formatting import integer, percent
from phasewatch.monitor.runs.coarse_to_fine import Aim, held
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import CERTAIN, Transition

MOSTLY = 0.5
"""The chains limit an error if at least this share of its variance is theirs."""


def how_well_known(trajectory: Trajectory, found: Sequence[Transition], steps: Sequence[int], aim: Aim) -> list[str]:
    """A sentence for each boundary, and for each change whose sign isn't certain.

    More snapshots narrow an interval. A change whose error is mostly the chains' disagreement about it is known better
    with longer chains, which are measured into a run of their own: one run's points have one setting, since where
    chains still creep, longer ones give another λ̂.

    Args:
        trajectory: the points.
        found: their transitions.
        steps: of the series, increasing.
        aim: how well boundaries were to be known.

    Returns:
        The sentences.
    """
    measured = set(trajectory.steps.tolist())
    unmeasured = [step for step in steps if step not in measured]
    lines = [f"{integer(len(measured))} of {integer(len(steps))} snapshots are measured."]
    for transition in found:
        lines += _of_one(transition, trajectory, steps, unmeasured, aim)
    return lines


def _of_one(
    transition: Transition, trajectory: Trajectory, steps: Sequence[int], unmeasured: Sequence[int], aim: Aim
) -> Iterator[str]:
    name = transition.kind.label
    for side, step, (low, high) in (
        ("starts", transition.start, transition.start_interval),
        ("ends", transition.end, transition.end_interval),
    ):
        known = f"{name} {side} at step {integer(step)}, between {integer(low)} and {integer(high)}"
        if low > 0:
            known += f" (a factor of {high / low:.2g})"
        yield f"{known}: {_advice((low, high), steps, unmeasured, aim)}."
    if transition.confidence < CERTAIN:
        if share_of_chains(trajectory, transition) >= MOSTLY:
            help_ = "longer chains would help, in a run of their own"
        elif held((transition.start, transition.end), unmeasured):
            help_ = "more of its snapshots would help"
        else:
            help_ = "snapshots saved more often would help"
        sure = percent(transition.confidence)
        yield f"{name} from step {integer(transition.start)} has its sign with {sure}: {help_}."


def _advice(interval: tuple[int, int], steps: Sequence[int], unmeasured: Sequence[int], aim: Aim) -> str:
    low, high = interval
    if aim.within is not None and high <= aim.within * low:
        return "as well known as asked"
    if count := held(interval, unmeasured):
        return f"{integer(count)} of the snapshots there {'is' if count == 1 else 'are'} not measured, and would help"
    if low <= steps[0]:
        return "all snapshots there are measured; earlier ones would help"
    if high >= steps[-1]:
        return "all snapshots there are measured; a longer training would tell"
    return "all snapshots there are measured; only snapshots saved more often would help"


def share_of_chains(trajectory: Trajectory, transition: Transition) -> float:
    """Which share of the variance of a transition's change of λ̂ is the chains' disagreement about it, 0 to 1.

    The rest is the scatter of the points, which all chains share: each snapshot's own, however long its chains are.

    Args:
        trajectory: the points.
        transition: one of its transitions.

    Returns:
        The share; 0 without chains at all points.
    """
    usable = trajectory.usable()
    chains = usable.per_chain
    change = transition.changes.get("llc")
    if chains is None or chains.shape[1] < 2 or change is None or not change.error > 0:
        return 0.0
    first, last = np.searchsorted(usable.steps, [transition.start, transition.end])
    reach = min(1, (last - first - 1) // 2)
    ends = [chains[max(i - reach, 0) : i + reach + 1].mean(axis=0) for i in (first, last)]
    error = float(np.std(ends[1] - ends[0], ddof=1)) / math.sqrt(chains.shape[1])
    return min(1.0, (error / change.error) ** 2)
