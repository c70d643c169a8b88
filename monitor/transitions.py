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
        start_interval: the steps between which `start` lies with 95 % probability.
        end_interval: the steps between which `end` lies with 95 % probability.
        metric: the signal that changed: "llc", "loss" or the name of a metric.
        before: that signal at `start`, smoothed.
        after: that signal at `end`, smoothed.
        error: standard error of its change.
        trend: "up", "flat" or "down".
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
    start_interval: tuple[int, int] = (0, 0)
    end_interval: tuple[int, int] = (0, 0)
    metric: str = "llc"
    before: float = math.nan
    after: float = math.nan
    error: float = math.nan
    trend: Trend = "flat"

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
        intervals = {"start_interval": list(self.start_interval), "end_interval": list(self.end_interval)}
        return record | intervals | {"kind": self.kind.name}

    def __str__(self) -> str:
        known = "" if math.isnan(self.llc_after) else f" (loss {self.loss_trend}, llc {self.llc_trend})"
        seen = f"OTHER{known}" if self.kind is Kind.OTHER else self.kind.name
        signals = [
            ("loss", self.loss_before, self.loss_after, self.loss_trend, 3),
            ("llc", self.llc_before, self.llc_after, self.llc_trend, 1),
        ]
        if self.metric not in {"loss", "llc"}:
            signals.insert(0, (self.metric, self.before, self.after, self.trend, 3))
        text = f"{seen}  steps {integer(self.start)} -> {integer(self.end)}"
        for name, before, after, trend, decimals in signals:
            if not math.isnan(after):
                first, last = _pair(before, after, decimals)
                sure = f", {percent(self.confidence)}" if name == self.metric else ""
                text += f"  {name} {first} -> {last} ({trend}{sure})"
        return text + (" provisional" if self.provisional else "")

    def sentence(self) -> str:
        """What happened, in plain English for a reader who has not met the notation."""
        clauses = []
        if self.metric not in {"loss", "llc"}:
            clauses.append(f"{self.metric} {_moved(self.trend, *_pair(self.before, self.after, 3))}")
        if not math.isnan(self.loss_after):
            slightly = " slightly," if abs(self.loss_change) < 0.1 * abs(self.loss_before) else ","
            before_and_after = _pair(self.loss_before, self.loss_after, decimals=3)
            clauses.append(f"the loss {_moved(self.loss_trend, *before_and_after, slightly)}")
        if not math.isnan(self.llc_after):
            before_and_after = _pair(self.llc_before, self.llc_after, decimals=1)
            clauses.append(f"the complexity λ̂ {_moved(self.llc_trend, *before_and_after)}")
        verdict = {
            Kind.A: ": a type A transition, the model became more complex to fit the data better",
            Kind.B: ": a type B transition, the model simplified itself",
            Kind.OTHER: "" if math.isnan(self.llc_after) else ": neither a type A nor a type B transition",
        }[self.kind]
        signal = {"llc": "the complexity", "loss": "the loss"}.get(self.metric, self.metric)
        return (
            f"Between steps {integer(self.start)} and {integer(self.end)} {clauses[0]}"
            f"{', while ' if clauses[1:] else ''}{' and '.join(clauses[1:])}{verdict}. "
            f"The sign of {signal}'s change is right with probability {percent(self.confidence)}."
            f"{' Later points may still move it.' if self.provisional else ''}"
        )


def find_transitions(
    trajectory: Trajectory | Iterable[Point], *, metric: str = "llc", min_effect: float = 0.02
) -> list[Transition]:
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
        metric: the signal whose stages are found: "llc", "loss" or the name of a metric of the points. Of another than
            λ̂, points may lack λ̂ and loss; the kind is by what is known of them.
        min_effect: the smallest change of λ̂ that counts, as a share of the range of λ̂ so far. That range is taken as at
            least a quarter of the largest |λ̂|, for a run that has not moved yet.

    Returns:
        Transitions by increasing step; neighbours may have the same kind, and may leave a plateau between them.

    Raises:
        PhasewatchError: `min_effect` is not a share.
    """
    if not 0 <= min_effect < 1:
        raise PhasewatchError(f"find_transitions(min_effect={min_effect!r}) must be at least 0 and below 1.")
    whole = Trajectory(p for p in trajectory if metric != "llc" or not p.llc.health.failed)
    usable = whole.usable(metric)
    values = usable.signal(metric)
    if len(usable) < FEWEST or not wanders(values):
        return []
    x = log_steps(usable.steps)
    curve, loss, llc = smooth(x, values), _smooth_known(x, usable.loss), _smooth_known(x, usable.llc)
    chains = usable.per_chain if metric == "llc" else None
    least = min_effect * max(np.ptp(values), 0.25 * np.abs(values).max())

    def holds(start: int, end: int) -> bool:
        change = abs(curve.value[end] - curve.value[start])
        return (
            end - start >= 2
            and 0 < change >= least
            and _error_and_confidence(curve, chains, start, end)[1] >= CONFIDENT
        )

    found = (_transition(usable, metric, curve, llc, loss, chains, start, end) for start, end in stages(curve, holds))
    return [transition for transition in found if transition.confidence >= CONFIDENT]


def _smooth_known(x: np.ndarray, values: np.ndarray) -> Curve | None:
    return smooth(x, values) if np.isfinite(values).all() else None


def _transition(
    usable: Trajectory,
    metric: str,
    curve: Curve,
    llc: Curve | None,
    loss: Curve | None,
    chains: np.ndarray | None,
    start: int,
    end: int,
) -> Transition:
    error, confidence = _error_and_confidence(curve, chains, start, end)
    trend: Trend = "up" if curve.value[end] > curve.value[start] else "down"
    llc_trend: Trend = trend if metric == "llc" else _trend(llc, start, end)
    loss_trend = _trend(loss, start, end)
    if llc_trend == "up" and loss_trend == "down":
        kind = Kind.A
    else:
        kind = Kind.B if llc_trend == "down" and loss_trend != "up" else Kind.OTHER
    steps, last = usable.steps.tolist(), len(usable) - 1
    return Transition(
        kind=kind,
        start=steps[start],
        end=steps[end],
        loss_before=float(loss.value[start]) if loss else math.nan,
        loss_after=float(loss.value[end]) if loss else math.nan,
        llc_before=float(llc.value[start]) if llc else math.nan,
        llc_after=float(llc.value[end]) if llc else math.nan,
        llc_error=error if metric == "llc" else llc.change_error(start, end) if llc else math.nan,
        loss_trend=loss_trend,
        llc_trend=llc_trend,
        confidence=confidence,
        provisional=len(usable) < ENOUGH or last - end < SETTLED,
        start_interval=(steps[max(start - 1, 0)], steps[start + 1]),
        end_interval=(steps[end - 1], steps[min(end + 1, last)]),
        metric=metric,
        before=float(curve.value[start]),
        after=float(curve.value[end]),
        error=error,
        trend=trend,
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


def _trend(curve: Curve | None, start: int, end: int) -> Trend:
    if curve is None:
        return "flat"
    change = curve.value[end] - curve.value[start]
    if abs(change) <= max(0.002 * np.ptp(curve.value), 2.33 * curve.change_error(start, end)):
        return "flat"
    return "up" if change > 0 else "down"


def _pair(before: float, after: float, decimals: int) -> tuple[str, str]:
    """Two numbers with as many decimals as it takes to tell them apart, and not fewer than given."""
    change = abs(after - before)
    if 0 < change < math.inf:
        decimals = max(decimals, 1 - math.floor(math.log10(change)))
    return f"{before:z.{decimals}f}", f"{after:z.{decimals}f}"


def _moved(trend: Trend, before: str, after: str, how: str = " from") -> str:
    if trend == "flat":
        return f"stayed flat at {after}"
    return f"{'rose' if trend == 'up' else 'fell'}{how} {before} to {after}"
