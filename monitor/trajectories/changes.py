"""What a transition is: a stretch of training, and how much each signal changed across it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from phasewatch.monitor.estimates.estimate import json_number
from phasewatch.monitor.formatting import integer, percent
from phasewatch.monitor.rim import rim
from phasewatch.monitor.trajectories.kinds import Kind, Trend

_DECIMALS = {"llc": 1}
"""How many decimals a signal is shown with at least; three where it isn't named."""


@dataclass(frozen=True)
class Change:
    """How much a signal changed across a transition.

    Attributes:
        before: the smoothed signal at the start.
        after: the smoothed signal at the end.
        error: `value ± 2 * error` is meant to contain the true change in 95 % of cases. It combines the scatter of the
            points around the smoothed curve with, for λ̂, how much the chains differ in their own changes.
        trend: "up", "flat" or "down"; "flat" where a change of this size may be noise.

    Example:
        >>> import phasewatch as pw
        >>> change = pw.Change(before=12.0, after=20.5, error=0.5, trend="up")
        >>> change.value
        8.5
        >>> pw.Change.from_json(change.as_json()) == change
        True
    """

    before: float
    after: float
    error: float
    trend: Trend

    @property
    def value(self) -> float:
        """The signal at the end minus the signal at the start."""
        return self.after - self.before

    def as_json(self) -> dict[str, Any]:
        """This change as plain JSON types."""
        return {name: json_number(v) if isinstance(v, float) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Change":
        """The inverse of `as_json`, exact to the last bit."""
        return cls(*(float(record[name]) for name in ("before", "after", "error")), trend=record["trend"])


UNKNOWN_CHANGE = Change(math.nan, math.nan, math.nan, "flat")
"""The change of a signal that the points don't have."""


@dataclass(frozen=True)
class Transition:
    """A stretch of training across which a signal rose or fell from one plateau, or one stage, to the next.

    Attributes:
        kind: A, B or OTHER.
        signal: the signal that was searched for transitions: "llc", "loss" or the name of a metric.
        start: the training step at which it begins.
        end: the training step at which it is over.
        start_interval: a 95 % interval of `start` in training steps. In simulations such intervals contained 93 % of
            the true boundaries, and 91 % where chains drift apart (experiments/transitions.py). Where the stage may be
            two stages, the interval reaches to where the second would begin; where it may be one with the stage before
            it, to where that one starts. It reaches to step 0 where it holds the first point, since the transition may
            have begun before that.
        end_interval: the same of `end`.
        confidence: the probability that the sign of the signal's change is right. It is the lowest of three: that of
            the smoothed curve, that of a smoother curve which takes more of the scatter for noise that neighbouring
            points share, and, for λ̂, that of the chains.
        provisional: True while later points may still change the transition or remove it.
        changes: how much each signal changed: that of `signal`, and those of "loss" and "llc" where they are known.
        points: how many points between `start` and `end`, both included, have an estimate of λ̂.
        doubtful: how many of these estimates are doubtful, by `Health.doubtful`.

    Example:
        >>> import phasewatch as pw
        >>> changes = {"loss": pw.Change(1.89, 1.78, 0.01, "down"), "llc": pw.Change(169.7, 112.8, 3.1, "down")}
        >>> transition = pw.Transition(
        ...     pw.Kind.B, "llc", 40_404, 318_181, (35_000, 45_000), (300_000, 330_000), 0.998, False, changes
        ... )
        >>> print(transition)
        B  steps 40 404 -> 318 181  loss 1.890 -> 1.780 (down)  llc 169.7 -> 112.8 (down, 99.8 %)
        >>> round(transition.llc_change, 1), transition.change.trend
        (-56.9, 'down')
        >>> pw.Transition.from_json(transition.as_json()) == transition
        True
    """

    kind: Kind
    signal: str
    start: int
    end: int
    start_interval: tuple[int, int]
    end_interval: tuple[int, int]
    confidence: float
    provisional: bool
    changes: Mapping[str, Change] = field(hash=False)
    points: int = 0
    doubtful: int = 0

    @property
    def change(self) -> Change:
        """The change of the transition's own signal."""
        return self.changes[self.signal]

    @property
    def loss_change(self) -> float:
        """Loss at the end minus loss at the start; NaN where the loss isn't known."""
        return self.changes.get("loss", UNKNOWN_CHANGE).value

    @property
    def llc_change(self) -> float:
        """λ̂ at the end minus λ̂ at the start; NaN where λ̂ isn't known."""
        return self.changes.get("llc", UNKNOWN_CHANGE).value

    def as_json(self) -> dict[str, Any]:
        """This transition as plain JSON types."""
        return {
            "kind": self.kind.name,
            "signal": self.signal,
            "start": self.start,
            "end": self.end,
            "start_interval": list(self.start_interval),
            "end_interval": list(self.end_interval),
            "confidence": json_number(self.confidence),
            "provisional": self.provisional,
            "changes": {name: change.as_json() for name, change in self.changes.items()},
            "points": self.points,
            "doubtful": self.doubtful,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Transition":
        """The inverse of `as_json`, exact to the last bit."""
        return cls(
            **{
                **record,
                "kind": Kind[record["kind"]],
                "start_interval": tuple(record["start_interval"]),
                "end_interval": tuple(record["end_interval"]),
                "confidence": float(record["confidence"]),
                "changes": {name: Change.from_json(change) for name, change in record["changes"].items()},
            }
        )

    def __str__(self) -> str:
        trends = ", ".join(f"{name} {self.changes[name].trend}" for name in ("loss", "llc") if name in self.changes)
        told = self.kind is Kind.OTHER and "llc" in self.changes
        text = f"{self.kind.name}{f' ({trends})' if told else ''}  steps {integer(self.start)} -> {integer(self.end)}"
        for name, change in self._in_order():
            first, last = _pair(name, change)
            sure = f", {percent(self.confidence)}" if name == self.signal else ""
            text += f"  {name} {first} -> {last} ({change.trend}{sure})"
        return f"{text} {', '.join(self.remarks)}".rstrip()

    def _repr_html_(self) -> str:
        """What a notebook shows: the kind, the steps and the sentence."""
        return rim("figures.notebook", "Transition._repr_html_()").transition_html(self)

    @property
    def remarks(self) -> list[str]:
        """What to keep in mind, such as "provisional" or "12 of 14 points doubtful"; empty if there is nothing."""
        doubts = f"{integer(self.doubtful)} of {integer(self.points)} points doubtful"
        return [*(["provisional"] if self.provisional else []), *([doubts] if self.doubtful else [])]

    def sentence(self) -> str:
        """What happened, in plain English for a reader who has not met the notation."""
        names = {"loss": "the loss", "llc": "the complexity λ̂"}
        clauses = []
        for name, change in self._in_order():
            slight = name == "loss" and abs(change.value) < 0.1 * abs(change.before)
            how = (" slightly," if slight else ",") if name == "loss" else " from"
            clauses.append(f"{names.get(name, name)} {_moved(change.trend, *_pair(name, change), how)}")
        verdict = f": {self.kind.verdict}" if self.kind is not Kind.OTHER or "llc" in self.changes else ""
        signal = {"llc": "the complexity", "loss": "the loss"}.get(self.signal, self.signal)
        text = (
            f"Between steps {integer(self.start)} and {integer(self.end)} {clauses[0]}"
            f"{', while ' if clauses[1:] else ''}{' and '.join(clauses[1:])}{verdict}. "
            f"The sign of {signal}'s change is right with probability {percent(self.confidence)}."
        )
        if self.doubtful:
            text += (
                f" This does not account for doubtful estimates, which are at {integer(self.doubtful)} of the "
                f"{integer(self.points)} points in between."
            )
        return text + (" Later points may still move it." if self.provisional else "")

    def _in_order(self) -> list[tuple[str, Change]]:
        """The changes as they are told: a metric that was searched for first, then loss and λ̂."""
        first = [self.signal] if self.signal not in {"loss", "llc"} else []
        return [(name, self.changes[name]) for name in (*first, "loss", "llc") if name in self.changes]


def _pair(name: str, change: Change) -> tuple[str, str]:
    """Both ends of a change, with enough decimals to tell them apart."""
    decimals = _DECIMALS.get(name, 3)
    if 0 < abs(change.value) < math.inf:
        decimals = max(decimals, 1 - math.floor(math.log10(abs(change.value))))
    return f"{change.before:z.{decimals}f}", f"{change.after:z.{decimals}f}"


def _moved(trend: Trend, before: str, after: str, how: str) -> str:
    if trend == "flat":
        return f"stayed flat at {after}"
    return f"{'rose' if trend == 'up' else 'fell'}{how} {before} to {after}"
