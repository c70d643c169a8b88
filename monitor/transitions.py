"""Transitions between the plateaus of a trajectory, and their kinds."""

import enum
from dataclasses import dataclass
from typing import Any, Literal

Trend = Literal["up", "flat", "down"]


class Kind(enum.Enum):
    """What loss and complexity did across a transition (Hoogland et al. 2024, arXiv 2402.02364)."""

    A = "loss down, complexity up"
    B = "loss flat or slightly down, complexity down"
    OTHER = "neither type A nor type B"


@dataclass(frozen=True)
class Transition:
    """A stretch of training across which the model's complexity changed.

    Attributes:
        kind: A, B or OTHER.
        start: the training step at which it begins.
        end: the training step before which it is over (half-open).
        loss_before: smoothed loss at `start`.
        loss_after: smoothed loss at `end`.
        llc_before: smoothed λ̂ at `start`.
        llc_after: smoothed λ̂ at `end`.
        llc_error: standard error of `llc_change`, from paired differences of the chains.
        loss_trend: "up", "flat" or "down".
        llc_trend: "up", "flat" or "down".
        confidence: probability that the sign of `llc_change` is right.
        provisional: True while later points may still move it.
    """

    kind: Kind
    start: int
    end: int
    loss_before: float
    loss_after: float
    llc_before: float
    llc_after: float
    llc_error: float
    loss_trend: Trend
    llc_trend: Trend
    confidence: float
    provisional: bool

    @property
    def loss_change(self) -> float:
        """Loss at the end minus loss at the start."""
        return self.loss_after - self.loss_before

    @property
    def llc_change(self) -> float:
        """λ̂ at the end minus λ̂ at the start."""
        return self.llc_after - self.llc_before
