"""Transitions between the plateaus of a trajectory, and their kinds."""

import enum
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import stdtr  # Student's t: degrees of freedom, then t

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimate import json_number
from phasewatch.monitor.numerals import integer, percent
from phasewatch.monitor.segments import Curve, log_steps, smooth, stages, wanders
from phasewatch.monitor.trajectory import Point, Trajectory

Trend = Literal["up", "flat", "down"]

FEWEST = 5
"""Fewer usable points than this have no transitions yet."""

CONFIDENT = 0.95
"""The least confidence at which a change of λ̂ counts."""

SETTLED = 5
"""A transition is provisional until this many usable points lie behind its end."""

ENOUGH = 12
"""Before there are this many usable points, all transitions are provisional: too little is known of λ̂'s range."""


class Kind(enum.Enum):
    """What loss and complexity did across a transition (Hoogland et al. 2024, arXiv 2402.02364)."""

    A = "loss down, complexity up"
    B = "loss flat or down, complexity down"
    OTHER = "neither type A nor type B"

    @property
    def label(self) -> str:
        """The kind as a word of a table: A, B or other."""
        return "other" if self is Kind.OTHER else self.name


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
        llc_error: standard error of `llc_change`: the larger of what the paired differences of the chains and the
            scatter of the points around the smoothed curve give.
        loss_trend: "up", "flat" or "down".
        llc_trend: "up", "flat" or "down".
        confidence: probability that the sign of `llc_change` is right, by the more doubtful of the same two.
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

    def as_json(self) -> dict[str, Any]:
        """This transition as plain JSON types."""
        record = {name: json_number(v) if isinstance(v, float) else v for name, v in asdict(self).items()}
        return record | {"kind": self.kind.name}

    def __str__(self) -> str:
        loss_before, loss_after = _pair(self.loss_before, self.loss_after, decimals=3)
        llc_before, llc_after = _pair(self.llc_before, self.llc_after, decimals=1)
        seen = f"OTHER (loss {self.loss_trend}, llc {self.llc_trend})" if self.kind is Kind.OTHER else self.kind.name
        return (
            f"{seen}  steps {integer(self.start)} -> {integer(self.end)}"
            f"  loss {loss_before} -> {loss_after} ({self.loss_trend})"
            f"  llc {llc_before} -> {llc_after} ({self.llc_trend}, {percent(self.confidence)})"
            f"{' provisional' if self.provisional else ''}"
        )

    def sentence(self) -> str:
        """What happened, in plain English for a reader who has not met the notation."""
        before, after = _pair(self.loss_before, self.loss_after, decimals=3)
        slightly = " slightly" if abs(self.loss_change) < 0.1 * abs(self.loss_before) else ""
        loss = {
            "up": f"rose{slightly}, {before} to {after}",
            "flat": f"stayed flat at {after}",
            "down": f"fell{slightly}, {before} to {after}",
        }[self.loss_trend]
        before, after = _pair(self.llc_before, self.llc_after, decimals=1)
        verdict = {
            Kind.A: "a type A transition, the model became more complex to fit the data better",
            Kind.B: "a type B transition, the model simplified itself",
            Kind.OTHER: "neither a type A nor a type B transition",
        }[self.kind]
        return (
            f"Between steps {integer(self.start)} and {integer(self.end)} the loss {loss}, while the complexity λ̂ "
            f"{'rose' if self.llc_trend == 'up' else 'fell'} from {before} to {after}: {verdict}. "
            f"The sign of the complexity's change is right with probability {percent(self.confidence)}."
            f"{' Later points may still move it.' if self.provisional else ''}"
        )


def find_transitions(trajectory: Trajectory | Iterable[Point], *, min_effect: float = 0.02) -> list[Transition]:
    """The transitions of a trajectory, in order, judged on the points so far.

    λ̂ is smoothed against log step and cut at its milestones: its extrema, and where it slows down between two stages of
    one direction (Hoogland et al. 2024, arXiv 2402.02364, chose such points by eye). The plateaus at a stage's two ends
    belong to no transition. The kind follows from the signs: λ̂ up and loss down is A; λ̂ down and loss flat or down is
    B, however far the loss falls. The loss is flat when its change is within 2.33 standard errors of the smoothed loss,
    or within 0.2 % of its range so far.

    Points whose estimate failed, or whose loss or λ̂ is not finite, are left out. With fewer than five others, or when
    λ̂ can't be told from independent noise around one value, there are no transitions, so that a monitor can ask after
    every point.

    Args:
        trajectory: points of one run measured with one setting, in any order.
        min_effect: the smallest change of λ̂ that counts, as a share of the range of λ̂ so far. That range is taken as at
            least a quarter of the largest |λ̂|, for a run that has not moved yet.

    Returns:
        Transitions by increasing step; neighbours may have the same kind, and may leave a plateau between them.

    Raises:
        PhasewatchError: `min_effect` is not a share.
    """
    if not 0 <= min_effect < 1:
        raise PhasewatchError(f"find_transitions(min_effect={min_effect!r}) must be at least 0 and below 1.")
    usable = Trajectory(p for p in trajectory if not p.llc.health.failed and math.isfinite(p.llc.value + p.loss))
    values = usable.llc
    if len(usable) < FEWEST or not wanders(values):
        return []
    x = log_steps(usable.steps)
    llc, loss = smooth(x, values), smooth(x, usable.loss)
    chains = usable.per_chain
    least = min_effect * max(np.ptp(values), 0.25 * np.abs(values).max())

    def holds(start: int, end: int) -> bool:
        change = abs(llc.value[end] - llc.value[start])
        return (
            end - start >= 2 and 0 < change >= least and _error_and_confidence(llc, chains, start, end)[1] >= CONFIDENT
        )

    found = (_transition(usable, llc, loss, chains, start, end) for start, end in stages(llc, holds))
    return [transition for transition in found if transition.confidence >= CONFIDENT]


def _transition(
    usable: Trajectory, llc: Curve, loss: Curve, chains: np.ndarray | None, start: int, end: int
) -> Transition:
    error, confidence = _error_and_confidence(llc, chains, start, end)
    llc_trend: Trend = "up" if llc.value[end] > llc.value[start] else "down"
    loss_trend = _loss_trend(loss, float(np.ptp(usable.loss)), start, end)
    if llc_trend == "up":
        kind = Kind.A if loss_trend == "down" else Kind.OTHER
    else:
        kind = Kind.OTHER if loss_trend == "up" else Kind.B
    return Transition(
        kind=kind,
        start=usable[start].step,
        end=usable[end].step,
        loss_before=float(loss.value[start]),
        loss_after=float(loss.value[end]),
        llc_before=float(llc.value[start]),
        llc_after=float(llc.value[end]),
        llc_error=error,
        loss_trend=loss_trend,
        llc_trend=llc_trend,
        confidence=confidence,
        provisional=len(usable) < ENOUGH or len(usable) - 1 - end < SETTLED,
    )


def _error_and_confidence(llc: Curve, chains: np.ndarray | None, start: int, end: int) -> tuple[float, float]:
    """Standard error of the change of λ̂ between two points, and the probability that its sign is right.

    Two doubts, of which the larger counts. The scatter of the points around the curve holds each checkpoint's own
    jitter, which all chains share; its p-value is multiplied by the curve's degrees of freedom, since the two points
    were picked for being far apart. The chains' differences hold the sampling noise that neighbouring points share;
    they are averaged over three points at each end, with Student's t for their number.
    """
    change = abs(llc.value[end] - llc.value[start])
    error, confidence = llc.change_error(start, end), 1.0
    if error > 0:
        confidence -= min(0.5, 2 * llc.freedom * float(stdtr(len(llc.x) - 2, -change / error)))
    if chains is not None and chains.shape[1] > 1 and np.isfinite(chains).all():
        reach = min(1, (end - start - 1) // 2)
        before, after = (chains[max(i - reach, 0) : i + reach + 1].mean(axis=0) for i in (start, end))
        paired = float(np.std(after - before, ddof=1)) / math.sqrt(chains.shape[1])
        if paired > 0:
            confidence = min(confidence, float(stdtr(chains.shape[1] - 1, change / paired)))
        error = max(error, paired)
    return error, confidence


def _loss_trend(loss: Curve, span: float, start: int, end: int) -> Trend:
    change = loss.value[end] - loss.value[start]
    if abs(change) <= max(0.002 * span, 2.33 * loss.change_error(start, end)):
        return "flat"
    return "up" if change > 0 else "down"


def _pair(before: float, after: float, decimals: int) -> tuple[str, str]:
    """Two numbers with as many decimals as it takes to tell them apart, and not fewer than given."""
    change = abs(after - before)
    if 0 < change < math.inf:
        decimals = max(decimals, 1 - math.floor(math.log10(change)))
    return f"{before:z.{decimals}f}", f"{after:z.{decimals}f}"
