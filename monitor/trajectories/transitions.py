"""Transitions between the plateaus of a trajectory, and their kinds."""

import enum
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t: degrees of freedom, then t or the probability below it

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import json_number
from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.formatting import integer, percent
from phasewatch.monitor.trajectories.chain_tests import disagreement, wander
from phasewatch.monitor.trajectories.smoothing import ALONE, WITNESSED, Curve, log_steps, smooth, smooth_with_each
from phasewatch.monitor.trajectories.stages import Segment, stages
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory

Trend = Literal["up", "flat", "down"]

FEWEST = 5
"""Fewer usable points than this have no transitions yet."""

CONFIDENT = 0.95
"""The least confidence at which a change counts."""

CLEAR = 1.5
"""Of how many standard errors a slow-down is at least."""

FEWEST_FREEDOM = 2.5
"""A curve that follows its points closely leaves its noise this many degrees of freedom (measured)."""

PICKED = 16
"""Chains' p-values are multiplied by this, since the two ends of a stage were picked for being far apart (measured)."""

ENOUGH = 20
"""Before there are this many usable points, all transitions are provisional ..."""

SETTLED = 5
"""... and until this many lie behind the last one that may be its end ..."""

CERTAIN = 0.998
"""... and while its sign is less sure than this ..."""

SUBSTANTIAL = 0.03
"""... or its change is less than this share of the range so far."""

LOOK = 1.2
"""Times as many points as at one look there are at the next one that may confirm."""

MOST_LOOKS = 1000
"""Looks at the first points of trajectories that are remembered, so that asking after every point costs one fit."""

_LOOKS: dict[bytes, tuple["Transition", ...]] = {}


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
        llc_error: `llc_change ± 2 * llc_error` is to hold the true change in 95 % of cases (of simulated ones, 95.1 %):
            the scatter of the points around the smoothed curve, and the paired differences of the chains, together.
        loss_trend: "up", "flat" or "down".
        llc_trend: "up", "flat" or "down".
        confidence: probability that the sign of the signal's change is right, by the most doubtful of the curve, of one
            that takes more of the points' scatter for noise that neighbours share, and of the chains.
        provisional: True while later points may still move it or take it back.
        start_interval: a 95 % interval of `start` in training steps. Such intervals held 93 % of simulated boundaries,
            and 91 % where chains wander (experiments/transitions.py). It reaches far into a stage that may be two.
        end_interval: the same of `end`.
        metric: the signal whose stage this is: "llc", "loss" or the name of a metric. The other changes are those over
            the same stretch.
        before: the smoothed signal at `start`.
        after: the smoothed signal at `end`.
        error: the error of the signal's change, as `llc_error` is of λ̂'s.
        trend: "up", "flat" or "down", of the signal.
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
    trajectory: Trajectory | Iterable[Point], *, metric: str = "llc", min_effect: float = 0.005
) -> list[Transition]:
    """The transitions of a trajectory, in order, judged on the points so far.

    The signal is smoothed against log step and cut at its milestones: its extrema, and where it slows down between two
    stages of one direction (Hoogland et al. 2024, arXiv 2402.02364, chose such points by eye). Plateaus belong to no
    transition. The kind follows from the signs: λ̂ up and loss down is A; λ̂ down and loss flat or
    down is B, however far the loss falls. The loss is flat when its change is within 2.33 standard errors of the
    smoothed loss, or within 0.2 % of its range so far.

    Points whose estimate failed, or whose loss or λ̂ is not finite, are left out; of another signal, those that lack it,
    and its kinds are by what is known of λ̂ and loss. With fewer than five others there are no transitions, so that a
    monitor can ask after every point.

    Args:
        trajectory: points of one run measured with one setting, in any order.
        metric: the signal whose stages are looked for: "llc", "loss" or a metric of the points.
        min_effect: the smallest change that counts, as a share of the signal's range up to the end of the stage. That
            range is taken as at least a quarter of its largest absolute value, for a run that has not moved yet.

    Returns:
        Transitions by increasing step; neighbours may have the same kind, and may leave a plateau between them. One
        that isn't provisional was confirmed by a look at the first 20 points, or a fifth more, and so on: whatever
        points follow, a transition of its sign stays there. Its boundaries may still move.

    Raises:
        PhasewatchError: `min_effect` is not a share, or no point has the metric.
    """
    if not 0 <= min_effect < 1:
        raise PhasewatchError(f"find_transitions(min_effect={min_effect!r}) must be at least 0 and below 1.")
    usable = Trajectory(p for p in trajectory if metric != "llc" or not p.llc.health.failed).usable(metric)
    standing = _standing(usable, metric, min_effect)
    return _together(standing, [replace(t, provisional=True) for t in _judged_now(usable, metric, min_effect)])


def _standing(usable: Trajectory, metric: str, min_effect: float) -> tuple[Transition, ...]:
    """What looks at the first ENOUGH points, at a fifth more, and so on, confirmed, as they were then."""
    standing: tuple[Transition, ...] = ()
    seen, digest, points = 0, hashlib.blake2b(f"{metric} {min_effect!r}".encode()), ENOUGH
    values = usable.signal(metric) if len(usable) else np.empty(0)
    while points <= len(usable):
        for point, value in zip(usable[seen:points], values[seen:points], strict=True):
            digest.update(np.array([point.step, point.loss, point.llc.value, value, *point.llc.per_chain]).tobytes())
        key, seen = digest.digest(), points
        if key not in _LOOKS:
            while len(_LOOKS) >= MOST_LOOKS:
                del _LOOKS[next(iter(_LOOKS))]
            sure = [t for t in _judged_now(usable[:points], metric, min_effect) if not t.provisional]
            _LOOKS[key] = *standing, *(t for t in sure if not any(_is_again(t, old) for old in standing))
        standing = _LOOKS[key]
        points = math.ceil(LOOK * points)
    return standing


def _together(standing: Iterable[Transition], found: Sequence[Transition]) -> list[Transition]:
    """What is found, with each confirmed transition as it is now, or as it was where it isn't found any more."""
    confirmed, missing = [], []
    for old in standing:
        shared = {t: min(t.end, old.end) - max(t.start, old.start) for t in found if _is_again(t, old)}
        if shared:
            confirmed.append(max(shared, key=shared.__getitem__))
            confirmed += [t for t, steps in shared.items() if 2 * steps >= t.end - t.start]  # it was split since
        else:
            missing.append(old)
    kept = [
        replace(t, provisional=t.provisional and t not in confirmed)
        for t in found
        if t in confirmed or all(t.end <= old.start or old.end <= t.start for old in missing)
    ]
    return sorted([*kept, *missing], key=lambda t: t.start)


def _is_again(transition: Transition, old: Transition) -> bool:
    return transition.trend == old.trend and transition.start < old.end and old.start < transition.end


def _judged_now(usable: Trajectory, metric: str, min_effect: float) -> list[Transition]:
    """The transitions of these points by themselves; one that isn't `provisional` is sure enough to be confirmed."""
    if len(usable) < FEWEST:
        return []
    x = log_steps(usable.steps)
    judged = _Judged.signal(x, usable, metric)

    def holds(start: int, end: int) -> bool:
        least = min_effect * judged.range_so_far[end]
        return (
            end - start >= 3  # three points of noise are in order once in three times
            and 0 < abs(judged.change(start, end)) >= least
            and judged.error_and_confidence(start, end)[1] >= CONFIDENT
        )

    found = stages(judged.curve, holds, judged.surely)
    if not found:
        return []
    loss, llc = judged.curve if metric == "loss" else None, judged if metric == "llc" else None
    if loss is None and np.isfinite(usable.loss).all():
        loss = smooth(x, usable.loss, WITNESSED.shape)
    if llc is None and np.isfinite(usable.llc).all():
        llc = _Judged.signal(x, usable, "llc")
    transitions = (_transition(usable, judged, llc, loss, stage, metric) for stage in found)
    return [transition for transition in transitions if transition.confidence >= CONFIDENT]


def _usable_chains(usable: Trajectory) -> np.ndarray | None:
    """λ̂ of the chains that never failed, shape (point, chain), if there are two."""
    chains = usable.per_chain
    if chains is None:
        return None
    chains = chains[:, np.isfinite(chains).all(axis=0)]
    return chains if chains.shape[1] > 1 else None


class _Judged:
    """A signal's curves, and its chains if it has any: what it takes to judge a change between two indices.

    Args:
        curve: with its likeliest shape.
        cautious: with more of it taken for noise that neighbours share, which has a say in what is sure.
        chains: shape (point, chain).
    """

    def __init__(self, curve: Curve, cautious: Curve, chains: np.ndarray | None) -> None:
        self.curve = curve
        self.cautious = cautious
        self.chains = chains
        highest, lowest = np.maximum.accumulate(curve.value), np.minimum.accumulate(curve.value)
        self.range_so_far = np.maximum(highest - lowest, 0.25 * np.maximum(highest, -lowest))

    @classmethod
    def signal(cls, x: np.ndarray, usable: Trajectory, metric: str) -> "_Judged":
        """That of the points, at positions x."""
        chains = _usable_chains(usable) if metric == "llc" else None
        doubts = WITNESSED if metric == "loss" or chains is not None else ALONE
        curve, cautious = smooth_with_each(x, usable.signal(metric), doubts)
        return cls(curve, cautious, chains)

    def change(self, start: int, end: int) -> float:
        return float(self.curve.value[end] - self.curve.value[start])

    def error_and_confidence(self, start: int, end: int) -> tuple[float, float]:
        """An error such that ± 2 of it hold the change in 95 % of cases, and the probability that its sign is right.

        The scatter of the points around the curve holds each checkpoint's own jitter, which all chains share. Its t has
        as many degrees of freedom as the curve leaves, and its p-value is multiplied by those that the curve has:
        between so many places the two were picked for being far apart. How far neighbours share their noise is badly
        known, so that the cautious curve is asked too whether there is a change of this sign.

        The chains hold the sampling noise that neighbouring points share, which no curve sees. They are averaged over
        three points at each place. How far they disagree about the change is all that they tell: the change itself is
        the curve's. That they agree is judged by Student's t and by Wilcoxon's signed ranks, of which the surer counts:
        few chains have no small rank probability, and a single stray one spoils a t. The p-value is multiplied by
        `PICKED`.

        The largest doubt counts. The errors of curve and chains are independent, and add up as variances.
        """
        change = self.change(start, end)
        doubts = [
            2 * self.curve.freedom * _doubt(self.curve, start, end, change),
            _doubt(self.cautious, start, end, change),
        ]
        error = self.curve.change_error(start, end) * float(stdtrit(_freedom(self.curve), 0.975)) / 2
        if self.chains is not None:
            along = _along(self.chains, start, end)
            variance, freedom = wander(along)
            differences = (along[-1] - along[0]) * np.sign(change)
            differences += abs(change) - differences.mean()
            doubts.append(2 * PICKED * disagreement(differences, variance, freedom))
            error = math.hypot(error, standard_error(along[-1] - along[0]))
        return error, 1 - min(0.5, max(doubts))

    def surely(self, weights: np.ndarray) -> bool:
        """Whether a weighted sum of the series is not zero, by the curve and by the chains."""
        total = float(weights @ self.curve.value)
        if abs(total) <= CLEAR * np.linalg.norm(weights @ self.curve.value_root):
            return False
        return self.chains is None or disagreement(weights @ self.chains * np.sign(total)) <= 1 - CONFIDENT


def _freedom(curve: Curve) -> float:
    """The degrees of freedom with which the noise around a curve is known."""
    return max(len(curve.x) - curve.freedom, FEWEST_FREEDOM)


def _doubt(curve: Curve, start: int, end: int, change: float) -> float:
    """The probability that noise alone would make a curve change so much in the direction of `change`."""
    error = curve.change_error(start, end)
    moved = float(curve.value[end] - curve.value[start]) * math.copysign(1, change)
    return float(stdtr(_freedom(curve), -moved / error)) if error > 0 else 0.0


def _along(chains: np.ndarray, start: int, end: int) -> np.ndarray:
    """λ̂ of each chain at both ends, and between them where there are points enough, shape (place, chain)."""
    length = end - start
    parts = 4 if length >= 12 else 2 if length >= 6 else 1
    reach = min(1, (length - 1) // 2)
    places = np.linspace(start, end, parts + 1).round().astype(int)
    return np.array([chains[max(i - reach, 0) : i + reach + 1].mean(axis=0) for i in places])


def _transition(
    usable: Trajectory, signal: _Judged, llc: _Judged | None, loss: Curve | None, stage: Segment, metric: str
) -> Transition:
    start, end = stage.start, stage.end
    error, confidence = signal.error_and_confidence(start, end)
    llc_error, llc_confidence = llc.error_and_confidence(start, end) if llc else (math.nan, 0.0)
    llc_trend: Trend = "flat"
    if llc and llc_confidence >= CONFIDENT:
        llc_trend = "up" if llc.change(start, end) > 0 else "down"
    loss_trend: Trend = _loss_trend(loss, start, end) if loss else "flat"
    kind = Kind.OTHER
    if (llc_trend, loss_trend) == ("up", "down"):
        kind = Kind.A
    elif llc_trend == "down" and loss_trend != "up":
        kind = Kind.B
    settled = (
        len(usable) >= ENOUGH
        and len(usable) - 1 - stage.end_interval[1] >= SETTLED
        and confidence >= CERTAIN
        and abs(signal.change(start, end)) >= SUBSTANTIAL * signal.range_so_far[end]
    )
    steps = usable.steps.tolist()
    loss_before, loss_after = loss.value[[start, end]] if loss else (math.nan, math.nan)
    llc_before, llc_after = llc.curve.value[[start, end]] if llc else (math.nan, math.nan)
    return Transition(
        kind=kind,
        start=steps[start],
        end=steps[end],
        loss_before=float(loss_before),
        loss_after=float(loss_after),
        llc_before=float(llc_before),
        llc_after=float(llc_after),
        llc_error=llc_error,
        loss_trend=loss_trend,
        llc_trend=llc_trend,
        confidence=confidence,
        provisional=not settled,
        start_interval=(steps[stage.start_interval[0]], steps[stage.start_interval[1]]),
        end_interval=(steps[stage.end_interval[0]], steps[stage.end_interval[1]]),
        metric=metric,
        before=float(signal.curve.value[start]),
        after=float(signal.curve.value[end]),
        error=error,
        trend="up" if signal.change(start, end) > 0 else "down",
    )


def _loss_trend(loss: Curve, start: int, end: int) -> Trend:
    change = loss.value[end] - loss.value[start]
    if abs(change) <= max(0.002 * np.ptp(loss.value), 2.33 * loss.change_error(start, end)):
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
