"""The search for transitions: the stages of a signal, their kinds, and which of them later points can't take back."""

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from phasewatch.monitor.trajectories.changes import UNKNOWN_CHANGE, Change, Transition
from phasewatch.monitor.trajectories.columns import Columns
from phasewatch.monitor.trajectories.evidence import CONFIDENT, Evidence, error_of_change, unit_of
from phasewatch.monitor.trajectories.kinds import Kind, Trend
from phasewatch.monitor.trajectories.smoothing import WITNESSED, Curve, log_steps, smooth
from phasewatch.monitor.trajectories.stages import Segment, stages
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory

FEWEST = 5
"""With fewer usable points than this there are no transitions."""

MIN_EFFECT = 0.005
"""The smallest change that counts, as a share of the signal's range so far.

How it was chosen is not recorded.
"""

FLAT_LOSS = 0.002
"""The loss counts as flat if it changes by at most this share of its range. How it was chosen is not recorded."""

FLAT_LOSS_ERRORS = 2.33
"""The loss also counts as flat within this many of its standard errors: 99 % of a normal distribution lie below it."""

ENOUGH = 20
"""A transition stays provisional before there are this many usable points.

This and the next three trade early confirmation against confirming noise. Settings were chosen on the simulated
trajectories of experiments/latency.py, which counts both.
"""

SETTLED = 5
"""A transition stays provisional before this many points lie behind the 95 % interval of its end."""

CERTAIN = 0.998
"""A transition stays provisional while its confidence, a probability, is below this."""

SUBSTANTIAL = 0.03
"""A transition stays provisional while its change is below this share of the signal's range so far."""

LOOK = 1.2
"""Transitions are confirmed at the first `ENOUGH` points, and each time there are this many times as many.

Not at each point, since each look is another chance to confirm noise. How it was chosen is not recorded.
"""

MOST_LOOKS = 1000
"""How many such results are kept in memory, so that asking after every point costs one fit and not one for each.

The oldest is dropped first, and costs one fit if it is needed again.
"""

LOOKED_AT = 200
"""Such a look is at no more points than this, each the mean of as many neighbours."""

_LOOKS: dict[bytes, tuple["_Confirmed", ...]] = {}


def find_transitions(trajectory: Trajectory | Iterable[Point], *, signal: str = "llc") -> list[Transition]:
    """The transitions of a trajectory, in order, judged on the points so far.

    The signal is smoothed against log step and cut into stages: at its extrema, and where it slows down between two
    stages of one direction (Hoogland et al. 2024, arXiv 2402.02364, chose such points by eye). Plateaus belong to no
    transition. The kind follows from the signs: λ̂ up and loss down is A; λ̂ down and loss flat or
    down is B, however far the loss falls. The loss is flat when its change is within 2.33 standard errors of the
    smoothed loss, or within 0.2 % of its range so far.

    Points whose estimate failed, or whose loss or λ̂ is not finite, are left out. For another signal, the points that
    lack it are left out, and its kinds follow from what is known of λ̂ and loss. With fewer than five points there are
    no transitions, so that a monitor can ask after every point. A change below 0.5 % of the signal's range up to the
    end of the stage doesn't count; that range is taken as at least a quarter of the largest absolute value, for a run
    that has not moved yet.

    Args:
        trajectory: points of one run measured with one setting, in any order.
        signal: the signal whose stages are searched: "llc", "loss" or a metric of the points.

    Returns:
        Transitions by increasing step. Neighbours may have the same kind, and may leave a plateau between them. One
        that isn't provisional was confirmed on the first 20 points, or on a fifth more, and so on: whatever points
        follow, a transition of its sign stays there. Its boundaries may still move.

    Raises:
        PhasewatchError: no point has the signal.

    Example:
        >>> import numpy as np
        >>> import phasewatch as pw
        >>> steps = np.unique(np.geomspace(1, 100_000, 60).round())
        >>> learned = 1 / (1 + (100 / steps) ** 3)
        >>> noise = np.random.default_rng(0).normal(size=(2, len(steps)))
        >>> trajectory = pw.Trajectory.from_values(
        ...     steps, loss=3 - learned + 0.01 * noise[0], llc=10 + 80 * learned + 0.3 * noise[1]
        ... )
        >>> [transition] = pw.find_transitions(trajectory)
        >>> transition.kind.label, transition.start < 100 < transition.end, round(transition.llc_change, -1)
        ('A', True, 80.0)
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = Trajectory(p for p in trajectory if signal != "llc" or not p.llc.health.failed)
    usable = trajectory.usable(signal)
    if len(usable) < FEWEST:
        return []
    columns = Columns.of(usable, signal)
    now = _Search(columns.shortened(), signal)
    found = _merged(_confirmed_before(columns, signal), [now.transition(stage) for stage in now.stages])
    return _with_doubts(found, usable)


def is_same_transition(a: Transition, b: Transition) -> bool:
    """Whether two results, of one run at different times, are the same transition.

    Args:
        a: one.
        b: the other.

    Returns:
        Whether they have the same signal and kind, and more than half of the shorter one's steps in common.

    Example:
        >>> from dataclasses import replace
        >>> import phasewatch as pw
        >>> from phasewatch.monitor.trajectories.transitions import is_same_transition
        >>> rise = {"llc": pw.Change(10.0, 50.0, 1.0, "up")}
        >>> early = pw.Transition(pw.Kind.OTHER, "llc", 100, 1000, (80, 120), (800, 1200), 0.99, True, rise)
        >>> is_same_transition(early, replace(early, end=5000))
        True
        >>> is_same_transition(early, replace(early, start=900, end=5000))
        False
    """
    common = min(a.end, b.end) - max(a.start, b.start)
    return a.signal == b.signal and a.kind is b.kind and common > min(a.end - a.start, b.end - b.start) / 2


def _confirmed_before(columns: Columns, signal: str) -> tuple["_Confirmed", ...]:
    """What was confirmed on the first ENOUGH points, on a fifth more, and so on."""
    confirmed: tuple[_Confirmed, ...] = ()
    seen, digest, points = 0, hashlib.blake2b(signal.encode()), ENOUGH
    while points <= len(columns):
        for column in (columns.steps, columns.loss, columns.llc, columns.values, columns.chains):
            digest.update(np.ascontiguousarray(column[seen:points]).tobytes())
        key, seen = digest.digest(), points
        if key not in _LOOKS:
            while len(_LOOKS) >= MOST_LOOKS:
                del _LOOKS[next(iter(_LOOKS))]
            sure = _Search(columns.first(points).shortened(LOOKED_AT), signal).sure
            _LOOKS[key] = *confirmed, *(new for new in sure if not any(new.at.continues(old.at) for old in confirmed))
        confirmed = _LOOKS[key]
        points = math.ceil(LOOK * points)
    return confirmed


def _merged(confirmed: Iterable["_Confirmed"], found: Sequence[Transition]) -> list[Transition]:
    """What is found, with each confirmed transition as it is now, or as it was where it isn't found any more."""
    settled, missing = set(), []
    for old in confirmed:
        shared = {i: old.at.shared(at) for i, t in enumerate(found) if (at := _Stretch.of(t)).continues(old.at)}
        if not shared:
            missing.append(old.transition)
            continue
        settled.add(max(shared, key=shared.__getitem__))
        # Since it was confirmed, it may have been split.
        settled |= {i for i, steps in shared.items() if 2 * steps >= found[i].end - found[i].start}
    kept = [
        replace(t, provisional=t.provisional and i not in settled)
        for i, t in enumerate(found)
        if i in settled or all(t.end <= old.start or old.end <= t.start for old in missing)
    ]
    return sorted([*kept, *missing], key=lambda t: t.start)


class _Stretch(NamedTuple):
    """Between which steps a signal rises or falls."""

    start: int
    end: int
    rises: bool

    @classmethod
    def of(cls, transition: Transition) -> "_Stretch":
        """That of a transition."""
        return cls(transition.start, transition.end, transition.change.value > 0)

    def continues(self, old: "_Stretch") -> bool:
        """Not `is_same_transition`: what was confirmed may change its kind with the loss, and its length by a split."""
        return self.rises == old.rises and self.shared(old) > 0

    def shared(self, other: "_Stretch") -> int:
        """How many steps both have in common; negative for as many between them."""
        return min(self.end, other.end) - max(self.start, other.start)


@dataclass(frozen=True)
class _Confirmed:
    """A stage that was confirmed. Its changes are only found if it has to stand for itself.

    Attributes:
        at: where it is.
        columns: on which it was found.
        signal: of which it is a stage.
    """

    at: _Stretch
    columns: Columns
    signal: str

    @functools.cached_property
    def transition(self) -> Transition:
        """As it was found."""
        search = _Search(self.columns, self.signal)
        [stage] = (stage for stage in search.stages if search.stretch(stage) == self.at)
        return replace(search.transition(stage), provisional=False)


class _Search:
    """The stages of a signal, judged on these points by themselves.

    Args:
        columns: the points.
        signal: "llc", "loss" or a metric.

    Attributes:
        stages: those that a transition was found for.
    """

    def __init__(self, columns: Columns, signal: str) -> None:
        self._columns = columns
        self._signal = signal
        self._x = log_steps(columns.steps)
        chains = columns.usable_chains if signal == "llc" else None
        self._evidence = Evidence.of_values(self._x, columns.values, chains, is_loss=signal == "loss")
        found = stages(self._evidence.curve, self._holds, self._evidence.surely)
        self.stages = [s for s in found if self._evidence.error_and_confidence(s.start, s.end)[1] >= CONFIDENT]

    @property
    def sure(self) -> list[_Confirmed]:
        """The stages that are sure enough to be confirmed."""
        sure = [stage for stage in self.stages if self._is_sure(stage)]
        return [_Confirmed(self.stretch(stage), self._columns, self._signal) for stage in sure]

    def stretch(self, stage: Segment) -> _Stretch:
        """Where a stage is."""
        start, end = self._columns.steps[[stage.start, stage.end]].tolist()
        return _Stretch(start, end, self._evidence.change(stage.start, stage.end) > 0)

    def _holds(self, start: int, end: int) -> bool:
        evidence = self._evidence
        return (
            # Three points of noise are in order once in three times
            (end - start >= 3 or (start, end) in {(jump.start, jump.end) for jump in evidence.curve.jumps})
            and 0 < abs(evidence.change(start, end)) >= MIN_EFFECT * evidence.range_so_far[end]
            and evidence.is_confident(start, end)
        )

    def _is_sure(self, stage: Segment) -> bool:
        change = abs(self._evidence.change(stage.start, stage.end))
        return (
            self._columns.size * (len(self._x) - 1 - stage.end_interval[1]) >= SETTLED
            and self._evidence.error_and_confidence(stage.start, stage.end)[1] >= CERTAIN
            and change >= SUBSTANTIAL * self._evidence.range_so_far[stage.end]
        )

    def transition(self, stage: Segment) -> Transition:
        """A stage as a transition, provisional."""
        start, end, evidence = stage.start, stage.end, self._evidence
        error, confidence = evidence.error_and_confidence(start, end)
        changes = {self._signal: _change(evidence.curve, start, end, error, evidence.unit, is_flat=False)}
        if (loss := self._loss) is not None:
            loss_error, unit = error_of_change(loss, start, end), unit_of(self._columns.loss)
            changes["loss"] = _change(loss, start, end, loss_error, unit, is_flat=_is_flat(loss, start, end))
        if (llc := self._llc) is not None:
            llc_error, llc_confidence = llc.error_and_confidence(start, end)
            changes["llc"] = _change(llc.curve, start, end, llc_error, llc.unit, is_flat=llc_confidence < CONFIDENT)
        steps = self._columns.steps.tolist()
        return Transition(
            kind=Kind.of(loss=changes.get("loss", UNKNOWN_CHANGE).trend, llc=changes.get("llc", UNKNOWN_CHANGE).trend),
            signal=self._signal,
            start=steps[start],
            end=steps[end],
            # What begins at the first point may have begun before it.
            start_interval=(steps[low] if (low := stage.start_interval[0]) else 0, steps[stage.start_interval[1]]),
            end_interval=(steps[stage.end_interval[0]], steps[stage.end_interval[1]]),
            confidence=confidence,
            provisional=True,
            changes=changes,
        )

    @functools.cached_property
    def _loss(self) -> Curve | None:
        """The loss beside another signal, where all points have one."""
        loss = self._columns.loss
        if self._signal == "loss" or not np.isfinite(loss).all():
            return None
        return smooth(self._x, loss / unit_of(loss), WITNESSED.shape)

    @functools.cached_property
    def _llc(self) -> Evidence | None:
        """λ̂ beside another signal, where all points have one."""
        llc = self._columns.llc
        if self._signal == "llc" or not np.isfinite(llc).all():
            return None
        return Evidence.of_values(self._x, llc, self._columns.usable_chains)


def _change(curve: Curve, start: int, end: int, error: float, unit: float, *, is_flat: bool) -> Change:
    before, after = curve.value[[start, end]].tolist()
    trend: Trend = "flat" if is_flat else "up" if after > before else "down"
    return Change(before * unit, after * unit, error * unit, trend)


def _is_flat(loss: Curve, start: int, end: int) -> bool:
    change = abs(loss.value[end] - loss.value[start])
    return bool(change <= max(FLAT_LOSS * np.ptp(loss.value), FLAT_LOSS_ERRORS * loss.change_error(start, end)))


def _with_doubts(found: Sequence[Transition], usable: Trajectory) -> list[Transition]:
    """With the number of their points that have an estimate, and of those whose estimate is doubtful."""
    if not found:
        return []
    steps = usable.steps
    healths = [point.llc.health for point in usable]
    failed = np.array([health.failed for health in healths])
    estimates = np.append(0, np.cumsum(~failed))
    doubtful = np.append(0, np.cumsum(~failed & [health.doubtful for health in healths]))
    counted = []
    for transition in found:
        first, last = np.searchsorted(steps, transition.start), np.searchsorted(steps, transition.end, side="right")
        counts = (int(of[last] - of[first]) for of in (estimates, doubtful))
        counted.append(replace(transition, **dict(zip(("points", "doubtful"), counts, strict=True))))
    return counted
