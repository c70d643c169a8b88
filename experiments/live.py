"""A trajectory seen point by point, as a monitor sees it: what is found after each point."""

from collections.abc import Sequence
from dataclasses import dataclass

from stages import Stage, as_stages, same

from phasewatch import Trajectory, Transition, find_transitions

Looks = Sequence[tuple[int, list[Transition]]]
"""The step of each look, and what was found in the points up to it."""


def replayed(trajectory: Trajectory, every: int = 1, signal: str = "llc") -> Looks:
    """What is found after each point, with that point's step."""
    return [
        (trajectory[n - 1].step, find_transitions(trajectory[:n], signal=signal))
        for n in range(5, len(trajectory) + 1, every)
    ]


@dataclass(frozen=True)
class Call:
    """When a stage was seen.

    Attributes:
        called: the step of the first look at which a transition that is the same stage is found.
        confirmed: that of the first at which such a one isn't provisional.
    """

    called: int | None
    confirmed: int | None


def call(looks: Looks, stage: Stage, confidence: float = 0.0) -> Call:
    """When a stage of the whole trajectory was seen in the looks at its signal, with at least some confidence."""
    seen = [
        (step, t)
        for step, transitions in looks
        for t, its in zip(transitions, as_stages(transitions), strict=True)
        if t.confidence >= confidence and same(its, stage)
    ]
    return Call(
        next((step for step, _ in seen), None),
        next((step for step, t in seen if not t.provisional), None),
    )
