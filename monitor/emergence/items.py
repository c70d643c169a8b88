"""Scores of single items along an axis, and the chain from log p to accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from phasewatch.monitor.emergence.checks import as_numbers, check_axis, check_log_p, check_numbers, check_share
from phasewatch.monitor.errors import PhasewatchError

CHAIN = ("log_p", "p", "p_among_choices", "brier", "accuracy")
"""From the smoothest to the sharpest (Schaeffer et al. 2024, arXiv 2406.04391)."""

LEAST_LOG_P = -1e12
"""A log probability below is none: a text of a gigabyte has about -1e9."""

SUM_SLACK = 0.01
"""Probabilities of the choices may sum to this much above 1, for rounding."""


@dataclass(frozen=True, eq=False)
class Items:
    """A fixed set of items at several places along an axis.

    Attributes:
        x: steps or tokens, shape (step,), rising.
        log_p: natural log p of each choice, shape (step, item, choice), summed over its tokens; NaN behind the last
            choice of an item with fewer. One choice where only the right answer was scored.
        correct: whether the item was right, shape (step, item).
        tokens: the length of each choice, shape (item, choice); NaN where it isn't known.
        target: the index of the right choice, shape (item,); the first where it isn't given.
        unit: of the lengths: "tokens", or "bytes" of UTF-8 where a file doesn't count tokens.
        axis: what x counts: "step" or "tokens".
        left_out: what reading left out, and how often.

    Raises:
        PhasewatchError: if a shape is wrong, a log p is above 0, probabilities sum to more than 1, or a choice is
            missing.
    """

    x: np.ndarray
    log_p: np.ndarray
    correct: np.ndarray | None = None
    tokens: np.ndarray | None = None
    target: np.ndarray | None = None
    unit: str = "tokens"
    axis: str = "step"
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x, _ = check_axis("Items", self.x, least=1)
        log_p = as_numbers("Items", "log_p", self.log_p)
        if log_p.ndim != 3 or len(log_p) != len(x) or 0 in log_p.shape:
            raise PhasewatchError(
                f"Items(log_p=...) must have the shape ({len(x)}, item, choice), x first; {log_p.shape} came."
            )
        there = ~np.isnan(log_p)
        if (there != there[:1]).any():
            step, item, choice = (int(i[0]) for i in np.nonzero(there != there[:1]))
            at = x[step] if not there[step, item, choice] else x[0]
            raise PhasewatchError(
                f"Items(log_p=...): item {item} has choice {choice} at some steps and lacks it at {at:g}. Every choice "
                "has to be scored at every step; leave the item out."
            )
        if (~there[0, :, :-1] & there[0, :, 1:]).any() or not there[0].any(axis=1).all():
            item = int(np.argmax((~there[0, :, :-1] & there[0, :, 1:]).any(axis=1) | ~there[0].any(axis=1)))
            raise PhasewatchError(
                f"Items(log_p=...): item {item} lacks a choice before its last one; score all of them."
            )
        if (log_p < LEAST_LOG_P).any():
            item = int(np.argmax((log_p < LEAST_LOG_P).any(axis=(0, 2))))
            raise PhasewatchError(
                f"Items(log_p=...): item {item} has the log probability {np.nanmin(log_p):g}; no text has one below "
                f"{LEAST_LOG_P:g}. Take the logarithm before it underflows, or leave the item out."
            )
        log_p = np.where(there, check_log_p("Items", "log_p", np.where(there, log_p, -1.0)), np.nan)
        sums = np.nansum(np.exp(log_p), axis=2)
        if (sums > 1 + SUM_SLACK).any():
            step, item = (int(i[0]) for i in np.nonzero(sums > 1 + SUM_SLACK))
            raise PhasewatchError(
                f"Items(log_p=...): the probabilities of item {item}'s choices sum to {sums[step, item]:.3f} at "
                f"{x[step]:g}, and must not exceed 1. Pass log p of whole answers to the same question."
            )
        count = log_p.shape[1]
        given = np.zeros(count) if self.target is None else as_numbers("Items", "target", self.target)
        inside = given.shape == (count,) and bool(((given >= 0) & (given < log_p.shape[2]) & (given % 1 == 0)).all())
        target = given.astype(int) if inside else np.zeros(count, dtype=int)
        if not inside or not there[0, np.arange(count), target].all():
            raise PhasewatchError("Items(target=...) must hold, for each item, the index of a choice that it has.")
        correct = self.correct
        if correct is None:
            correct = np.nanargmax(log_p, axis=2) == target
        correct = check_share("Items", "correct", check_numbers("Items", "correct", correct, shape=log_p.shape[:2]))
        if self.tokens is not None and as_numbers("Items", "tokens", self.tokens).shape != log_p.shape[1:]:
            raise PhasewatchError(f"Items(tokens=...) must have the shape {log_p.shape[1:]}, item and choice.")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "log_p", log_p)
        object.__setattr__(self, "correct", correct)
        object.__setattr__(self, "target", target)

    @property
    def chance(self) -> float:
        """The accuracy of a guess: the mean of 1 / the number of choices; 0 where only the right answer was scored."""
        choices = (~np.isnan(self.log_p[0])).sum(axis=1)
        return float(np.where(choices > 1, 1 / choices, 0.0).mean())

    @property
    def per_item(self) -> dict[str, np.ndarray]:
        """Each score of the chain by item, shape (step, item). All rise as a model improves: brier is 1 - Brier / 2.

        The last three need choices: with one choice an item has log_p, p and accuracy.
        """
        rows = np.arange(self.log_p.shape[1])
        right = self.log_p[:, rows, self.target]
        found: dict[str, np.ndarray] = {"log_p": right, "p": np.exp(right)}
        if self.log_p.shape[2] > 1:
            share = np.exp(self.log_p - np.nanmax(self.log_p, axis=2, keepdims=True))
            share = share / np.nansum(share, axis=2, keepdims=True)
            among = share[:, rows, self.target]
            found["p_among_choices"] = among
            found["brier"] = 1 - (np.nansum(share**2, axis=2) - 2 * among + 1) / 2
        found["accuracy"] = np.asarray(self.correct, dtype=float)
        return found

    def __str__(self) -> str:
        steps, items, choices = self.log_p.shape
        span = f"{self.axis} {self.x[0]:g} to {self.x[-1]:g}"
        text = f"{_count(items, 'item')} with up to {_count(choices, 'choice')} at {_count(steps, 'place')}, {span}."
        if self.left_out:
            text += " Left out: " + "; ".join(f"{count} {reason}" for reason, count in self.left_out.items()) + "."
        return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, eq=False)
class Curve:
    """A score along the axis.

    Attributes:
        value: the mean over items, shape (step,).
        error: its standard error, shape (step,).
    """

    value: np.ndarray
    error: np.ndarray


@dataclass(frozen=True, eq=False)
class Scores:
    """The chain of scores of a set of items.

    Attributes:
        x: shape (step,).
        log_p: mean log p of the right answer.
        p: mean p of the right answer.
        p_among_choices: mean p of the right answer among the choices; None with one choice.
        brier: mean of Σ_choices (p - 1[right])², as the harness has it; None with one choice.
        accuracy: share of right items.
        chance: the accuracy of a guess.
    """

    x: np.ndarray
    log_p: Curve
    p: Curve
    p_among_choices: Curve | None
    brier: Curve | None
    accuracy: Curve
    chance: float

    def curves(self) -> dict[str, Curve]:
        """Those that there are, from the smoothest to the sharpest."""
        found = {name: getattr(self, name) for name in CHAIN}
        return {name: curve for name, curve in found.items() if curve is not None}

    def __str__(self) -> str:
        def words(name: str, curve: Curve) -> str:
            error = f" ± {curve.error[-1]:.3f}" if np.isfinite(curve.error[-1]) else ""  # one item has none
            return f"{name} {curve.value[0]:.3f} to {curve.value[-1]:.3f}{error}"

        chain = ", ".join(words(name, curve) for name, curve in self.curves().items())
        return f"From {self.x[0]:g} to {self.x[-1]:g}: {chain}. A guess is right in {self.chance:.3f} of cases."


def check_items(call: str, items: object) -> None:
    """Refuse anything but items.

    Raises:
        PhasewatchError: if they are none.
    """
    if not isinstance(items, Items):
        raise PhasewatchError(
            f"{call}(items) takes Items, as read_samples(folder, task) gives them; {type(items).__name__} came."
        )


def scores(items: Items) -> Scores:
    """The chain log p -> p -> p among the choices -> Brier -> accuracy of a set of items.

    Args:
        items: as `read_samples` gives them.

    Returns:
        Each score's mean over the items, with its standard error, which is NaN for one item.

    >>> import numpy as np
    >>> log_p = np.log([[[0.2, 0.2], [0.1, 0.3]], [[0.4, 0.1], [0.4, 0.2]]])
    >>> found = scores(Items(x=np.array([100, 200]), log_p=log_p))
    >>> found.accuracy.value.tolist(), found.p_among_choices.value.round(3).tolist()
    ([0.5, 1.0], [0.375, 0.733])
    """
    check_items("scores", items)
    found = {name: _curve(values) for name, values in items.per_item.items()}
    brier = found.get("brier")
    return Scores(
        x=items.x,
        log_p=found["log_p"],
        p=found["p"],
        p_among_choices=found.get("p_among_choices"),
        brier=None if brier is None else Curve(2 * (1 - brier.value), 2 * brier.error),
        accuracy=found["accuracy"],
        chance=items.chance,
    )


def _curve(values: np.ndarray) -> Curve:
    count = values.shape[1]
    error = values.std(axis=1, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(values), np.nan)
    return Curve(values.mean(axis=1), error)
