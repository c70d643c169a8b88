"""Stages of a trajectory, as they are simulated or as any method finds them, and which of them are the same."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from phasewatch import Trajectory, Transition
from phasewatch.monitor.trajectories.smoothing import log_steps, smooth


class Simulated(Protocol):
    """A stage of tests/scenarios.py."""

    start: float
    end: float
    change: float


class Stage(NamedTuple):
    """Where a signal rises or falls.

    Attributes:
        start: step at which it begins.
        end: step at which it is over.
        sign: of the change, -1 or 1.
    """

    start: float
    end: float
    sign: float


def as_stages(transitions: Iterable[Transition]) -> list[Stage]:
    """Transitions as stages of their own signal."""
    return [Stage(t.start, t.end, float(np.sign(t.change.value))) for t in transitions]


def simulated(stages: Iterable[Simulated]) -> list[Stage]:
    """What is to be found in a simulated trajectory."""
    return [Stage(stage.start, stage.end, float(np.sign(stage.change))) for stage in stages]


def log(step: float) -> float:
    """Log step, with step 0 at half a step."""
    return float(np.log(max(step, 0.5)))


def same(a: Stage, b: Stage) -> bool:
    """Whether two stages have one sign, and share more than half of the shorter one's log steps."""
    common = log(min(a.end, b.end)) - log(max(a.start, b.start))
    shorter = min(log(a.end) - log(a.start), log(b.end) - log(b.start))
    return a.sign == b.sign and common > 0.5 * shorter


def matched(some: Sequence[Stage], others: Sequence[Stage]) -> list[tuple[int, int]]:
    """Numbers of those that are the same, each with one other at most."""
    pairs: list[tuple[int, int]] = []
    for i, stage in enumerate(some):
        taken = {j for _, j in pairs}
        match = next((j for j, other in enumerate(others) if j not in taken and same(stage, other)), None)
        pairs += [] if match is None else [(i, match)]
    return pairs


def change_between(trajectory: Trajectory, signal: str, before: float, after: float) -> float:
    """How much a signal changes from one step to another, smoothed over log step and interpolated."""
    usable = trajectory.usable(signal)
    curve = smooth(log_steps(usable.steps), usable.signal(signal)).value
    first, last = np.interp(np.log([max(before, 1), max(after, 1)]), np.log(usable.steps.clip(min=1)), curve)
    return float(last - first)
