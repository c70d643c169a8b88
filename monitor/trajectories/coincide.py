"""Which transitions of one signal go with which of another, and which come first."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.formatting import integer
from phasewatch.monitor.trajectories.changes import Transition

MIN_OVERLAP = 1 / 3
"""Two transitions go together from this overlap on, from 0 to 1. Of two that are equally long on the log axis, the
later then starts where the earlier is half over."""

Order = Literal["first", "second", "unclear"]


@dataclass(frozen=True)
class Coincidence:
    """A transition of one signal and the one of another that goes with it.

    Attributes:
        first: the transition of the first signal.
        second: the transition of the second signal.
        overlap: the share of log steps, from the earlier start to the later end, that both cover, from 0 to 1; where
            boundaries are taken as close to each other as their intervals allow.
        start_lag: steps from the first's start to the second's; positive where the first starts first.
        end_lag: steps from the first's end to the second's; positive where the first ends first.
        start_lag_interval: the steps between which `start_lag` lies with 95 % probability.
        end_lag_interval: the same of `end_lag`.

    Example:
        >>> import phasewatch as pw
        >>> def rise(signal, start, end):
        ...     intervals = (start - 10, start + 10), (end - 50, end + 50)
        ...     return pw.Transition(pw.Kind.OTHER, signal, start, end, *intervals, 0.99, False, {})
        >>> [pair] = pw.coincide([rise("llc", 100, 1000)], [rise("accuracy", 150, 1020)]).pairs
        >>> pair.start_lag, pair.starts_first, pair.ends_first
        (50, 'first', 'unclear')
    """

    first: Transition
    second: Transition
    overlap: float
    start_lag: int
    end_lag: int
    start_lag_interval: tuple[int, int]
    end_lag_interval: tuple[int, int]

    @property
    def starts_first(self) -> Order:
        """Which of the two starts first; "unclear" while 0 lies in `start_lag_interval`."""
        return _earlier(self.start_lag_interval)

    @property
    def ends_first(self) -> Order:
        """Which of the two ends first; "unclear" while 0 lies in `end_lag_interval`."""
        return _earlier(self.end_lag_interval)

    def __str__(self) -> str:
        names = _names(self.first, self.second)
        starts = _in_words("starts", self.start_lag, self.start_lag_interval)
        ends = _in_words("ends", self.end_lag, self.end_lag_interval)
        return (
            f"{_stretch(self.first, names[0])} goes with {_stretch(self.second, names[1])}: "
            f"{names[1]} {starts} and {ends}."
        )


@dataclass(frozen=True)
class Coincidences:
    """Two signals' transitions side by side.

    Attributes:
        pairs: those that go together, in order of the first's start.
        only_first: the first signal's other transitions, in order.
        only_second: the second signal's other transitions, in order.

    Example:
        >>> import phasewatch as pw
        >>> alone = pw.Transition(pw.Kind.OTHER, "llc", 10, 90, (8, 12), (80, 99), 0.99, False, {})
        >>> print(pw.coincide([alone], []))
        No transition of one goes with one of the other.
        Alone: llc 10 -> 90.
    """

    pairs: tuple[Coincidence, ...]
    only_first: tuple[Transition, ...]
    only_second: tuple[Transition, ...]

    def __str__(self) -> str:
        alone = [*self.only_first, *self.only_second]
        lines = [str(pair) for pair in self.pairs] or ["No transition of one goes with one of the other."]
        if alone:
            lines.append(f"Alone: {', '.join(_stretch(transition, transition.signal) for transition in alone)}.")
        return "\n".join(lines)


def coincide(first: Iterable[Transition], second: Iterable[Transition]) -> Coincidences:
    """Match the transitions of one signal with those of another, each with one at most.

    Two transitions are compared on the axis of log step. Their starts are apart by the distance between their 95 %
    intervals there, 0 if these touch, and so are their ends. Their overlap is 1 − (distance of starts + distance of
    ends) / (distance from the earlier start to the later end), and 0 where that is negative: for boundaries that are
    known exactly it is the length that both share over the length that either covers (Jaccard's index), and boundaries
    that can't be told apart count as one. The pair that overlaps most goes together, then the pair that does so among
    the rest, down to an overlap of a third; of pairs that overlap alike, the one whose boundaries themselves lie
    closer.

    A lag is the difference of two boundaries in steps. Its interval follows from theirs as if they were independent:
    from the lag, on either side, the root of the sum of the squares of the two distances that widen it there (Zou and
    Donner 2008, DOI 10.1002/sim.3095).

    Step 0 lies a factor e before the smallest other step among all boundaries and intervals, so that counting in
    another unit changes no overlap.

    Args:
        first: transitions of one signal, in any order, as `find_transitions` returns them.
        second: transitions of another, or of the same signal in another run.

    Returns:
        The pairs with their lags, and the transitions without a partner. Swapping the arguments swaps the sides and
        changes the signs of the lags.

    Raises:
        PhasewatchError: an argument holds something else than transitions, or those of several signals.

    Example:
        >>> import numpy as np
        >>> import phasewatch as pw
        >>> steps = np.unique(np.geomspace(1, 100_000, 60).round())
        >>> early, late = (1 / (1 + (at / steps) ** 3) for at in (100, 200))
        >>> noise = np.random.default_rng(0).normal(size=(2, len(steps)))
        >>> trajectory = pw.Trajectory.from_values(
        ...     steps, loss=3 - early, llc=80 * early + noise[0], metrics={"accuracy": late + 0.01 * noise[1]}
        ... )
        >>> found = pw.coincide(pw.find_transitions(trajectory), pw.find_transitions(trajectory, signal="accuracy"))
        >>> [(pair.overlap > 0.9, pair.start_lag > 0) for pair in found.pairs]
        [(True, True)]
    """
    one, other = _of_one_signal("first", first), _of_one_signal("second", second)
    steps = [s for t in (*one, *other) for s in (t.start, t.end, *t.start_interval, *t.end_interval) if s > 0]
    zero = math.log(min(steps, default=1)) - 1

    ranked = []
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            near, exact = _overlap(a, b, zero)
            ranked.append((-near, -exact, a.start + b.start, a.end + b.end, i, j))
    partner: dict[int, tuple[int, float]] = {}
    taken = set()
    for near, _, _, _, i, j in sorted(ranked):
        if -near >= MIN_OVERLAP and i not in partner and j not in taken:
            partner[i] = (j, -near)
            taken.add(j)
    return Coincidences(
        pairs=tuple(_pair(one[i], other[j], overlap) for i, (j, overlap) in sorted(partner.items())),
        only_first=tuple(t for i, t in enumerate(one) if i not in partner),
        only_second=tuple(t for j, t in enumerate(other) if j not in taken),
    )


def _of_one_signal(name: str, transitions: Iterable[Transition]) -> list[Transition]:
    found = list(transitions) if isinstance(transitions, Iterable) else [transitions]
    for item in found:
        if not isinstance(item, Transition):
            raise PhasewatchError(
                f"coincide({name}=...) takes the transitions that find_transitions returns, and got a "
                f"{type(item).__name__}."
            )
    signals = sorted({transition.signal for transition in found})
    if len(signals) > 1:
        raise PhasewatchError(
            f"coincide({name}=...) got transitions of {' and '.join(signals)}; pass those of one signal."
        )
    return sorted(found, key=lambda t: (t.start, t.end, t.start_interval, t.end_interval))


def _overlap(a: Transition, b: Transition, zero: float) -> tuple[float, float]:
    """The overlap as far as the intervals allow, and that of the boundaries themselves."""

    def x(step: int) -> float:
        return math.log(step) if step > 0 else zero

    def apart(one: Sequence[int], other: Sequence[int]) -> float:
        return max(0.0, x(other[0]) - x(one[1]), x(one[0]) - x(other[1]))

    length = max(x(a.end), x(b.end)) - min(x(a.start), x(b.start)) or 1.0
    near = apart(a.start_interval, b.start_interval) + apart(a.end_interval, b.end_interval)
    exact = apart((a.start, a.start), (b.start, b.start)) + apart((a.end, a.end), (b.end, b.end))
    return max(0.0, 1 - near / length), max(0.0, 1 - exact / length)


def _pair(first: Transition, second: Transition, overlap: float) -> Coincidence:
    return Coincidence(
        first=first,
        second=second,
        overlap=overlap,
        start_lag=second.start - first.start,
        end_lag=second.end - first.end,
        start_lag_interval=_lag_interval(first.start, first.start_interval, second.start, second.start_interval),
        end_lag_interval=_lag_interval(first.end, first.end_interval, second.end, second.end_interval),
    )


def _lag_interval(a: int, a_interval: tuple[int, int], b: int, b_interval: tuple[int, int]) -> tuple[int, int]:
    lower = math.hypot(b - b_interval[0], a_interval[1] - a)
    upper = math.hypot(b_interval[1] - b, a - a_interval[0])
    return math.floor(b - a - lower), math.ceil(b - a + upper)


def _earlier(lag_interval: tuple[int, int]) -> Order:
    low, high = lag_interval
    return "first" if low > 0 else "second" if high < 0 else "unclear"


def _names(first: Transition, second: Transition) -> tuple[str, str]:
    same = first.signal == second.signal
    return ("the first", "the second") if same else (first.signal, second.signal)


def _stretch(transition: Transition, name: str) -> str:
    return f"{name} {integer(transition.start)} -> {integer(transition.end)}"


def _in_words(verb: str, lag: int, interval: tuple[int, int]) -> str:
    low, high = interval
    if low <= 0 <= high:
        between = f"{integer(-low)} earlier to {integer(high)} later"
    else:
        between = " to ".join(integer(x) for x in sorted((abs(low), abs(high))))
    side = "earlier" if lag < 0 else "later"
    return f"{verb} {f'{integer(abs(lag))} steps {side}' if lag else 'at the same step'} (95 %: {between})"
