"""A trajectory seen point by point, as a monitor sees it: what is found after each point."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phasewatch import Trajectory, Transition, find_transitions

Looks = Sequence[tuple[int, list[Transition]]]
"""The step of each look, and what was found in the points up to it."""


def replayed(trajectory: Trajectory, every: int = 1, metric: str = "llc") -> Looks:
    """What is found after each point, with that point's step."""
    return [
        (trajectory[n - 1].step, find_transitions(trajectory[:n], metric=metric))
        for n in range(5, len(trajectory) + 1, every)
    ]


def log(step: float) -> float:
    """Log step, with step 0 at half a step."""
    return float(np.log(max(step, 0.5)))


def fits(t: Transition, start: float, end: float, sign: float) -> bool:
    """Whether a transition is of a stage: it has its sign, and shares more than half of the shorter one's log steps."""
    common = log(min(t.end, end)) - log(max(t.start, start))
    shorter = min(log(t.end) - log(t.start), log(end) - log(start))
    return np.sign(t.after - t.before) == sign and common > 0.5 * shorter


@dataclass(frozen=True)
class Call:
    """When a stage was seen.

    Attributes:
        called: the step of the first look at which a transition that fits it is found.
        confirmed: that of the first at which such a one isn't provisional.
    """

    called: int | None
    confirmed: int | None


def call(looks: Looks, stage: Transition) -> Call:
    """When a transition of the whole trajectory was seen in the looks at its signal."""
    sign = float(np.sign(stage.after - stage.before))
    seen = [(step, t) for step, found in looks for t in found if fits(t, stage.start, stage.end, sign)]
    return Call(
        next((step for step, _ in seen), None),
        next((step for step, t in seen if not t.provisional), None),
    )
