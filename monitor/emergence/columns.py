"""The lines of many checkpoints in columns, and the items that all checkpoints have in common."""

import math
from array import array
from collections import Counter
from collections.abc import Mapping

import numpy as np

from phasewatch.monitor.emergence.items import SUM_SLACK, Items
from phasewatch.monitor.emergence.lines import Line
from phasewatch.monitor.errors import PhasewatchError

MOST_CHOICES = 1000
"""An item with more choices is left out, so that one can't widen the table of all items without end; the public tasks
with the most have about 150."""


class Columns:
    """One checkpoint's lines. A column for each field takes less time and memory than an object for each line.

    Attributes:
        rows: the row of each item.
    """

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self._log_p, self._lengths, self._correct = array("d"), array("d"), array("d")
        self._choices, self._target = array("q"), array("q")

    def add(self, line: Line) -> bool:
        """Take a line.

        Args:
            line: of an item.

        Returns:
            Whether it was taken; of an item's lines, the first is.
        """
        item, log_p, correct, lengths, target = line
        if self.rows.setdefault(item, len(self._target)) != len(self._target):
            return False
        self._log_p.extend(log_p)
        self._lengths.extend(lengths)
        self._correct.append(correct)
        self._choices.append(len(log_p))
        self._target.append(-1 if target is None else target)
        return True

    @property
    def choices(self) -> np.ndarray:
        """The number of choices, shape (row,)."""
        return np.array(self._choices, dtype=int)

    @property
    def target(self) -> np.ndarray:
        """The right choice's index, shape (row,); -1 where the line doesn't tell."""
        return np.array(self._target, dtype=int)

    @property
    def correct(self) -> np.ndarray:
        """1 or 0, shape (row,)."""
        return np.array(self._correct)

    def log_p(self, rows: np.ndarray) -> np.ndarray:
        """Of each choice of some rows, shape (row, choice), NaN behind an item's last one."""
        return self._table(self._log_p, rows)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Of each choice of some rows, shape (row, choice); NaN where it isn't known."""
        return self._table(self._lengths, rows)

    def _table(self, values: array, rows: np.ndarray) -> np.ndarray:
        choices = self.choices
        first = (np.cumsum(choices) - choices)[rows, None]
        column = np.arange(choices[rows].max())
        there = column < choices[rows, None]
        return np.where(there, np.array(values)[np.where(there, first + column, 0)], math.nan)


def together(steps: Mapping[float, Columns], left_out: Counter[str], unit: str, name: str, axis: str) -> Items:
    """The items that every checkpoint has with the same choices.

    Args:
        steps: the lines by step or tokens.
        left_out: what reading left out; what is left out here is added.
        unit: of the lengths.
        name: of what was read, for messages.
        axis: what the keys of `steps` count.

    Returns:
        The items, by their names in numeric or alphabetic order.

    Raises:
        PhasewatchError: if no item is left.
    """
    places = sorted(steps)
    own = [steps[at] for at in places]
    everywhere = set.intersection(*(set(one.rows) for one in own)) if own else set()
    anywhere = set().union(*(one.rows for one in own))
    if missing := len(anywhere) - len(everywhere):
        left_out["items without a usable line at every step"] += missing
    if not everywhere:
        raise _nothing(name, left_out)
    names = sorted(sorted(everywhere), key=len)
    rows = [np.array([one.rows[item] for item in names]) for one in own]
    choices = np.array([one.choices[row] for one, row in zip(own, rows, strict=True)])  # (step, item)
    targets = np.array([one.target[row] for one, row in zip(own, rows, strict=True)])
    target = targets.max(axis=0)
    whole = (choices == choices[0]).all(axis=0)
    few = whole & (choices[0] <= MOST_CHOICES)
    told = few & (target >= 0)
    agreed = told & ((targets == target) | (targets < 0)).all(axis=0)
    for fewer, more, reason in (
        (whole, np.ones_like(whole), "items with a choice missing at some step"),
        (few, whole, f"items with more than {MOST_CHOICES} choices"),
        (told, few, "items whose right choice no step tells"),
        (agreed, told, "items whose right choice changes between steps"),
    ):
        if lost := int((more & ~fewer).sum()):
            left_out[reason] += lost
    if not agreed.any():
        raise _nothing(name, left_out)
    log_p = np.array([one.log_p(row[agreed]) for one, row in zip(own, rows, strict=True)])
    fits = (np.nansum(np.exp(log_p), axis=2) <= 1 + SUM_SLACK).all(axis=0)
    if excess := int((~fits).sum()):
        left_out["items whose choices' probabilities sum to more than 1"] += excess
    if not fits.any():
        raise PhasewatchError(f"read_samples({name!r}): no item's choices have probabilities that sum to 1 or less.")
    correct = np.array([one.correct[row[agreed]] for one, row in zip(own, rows, strict=True)])
    return Items(
        x=np.array(places, dtype=float),
        log_p=np.minimum(log_p[:, fits], 0.0),
        correct=correct[:, fits],
        tokens=own[0].lengths(rows[0][agreed])[fits],
        target=target[agreed][fits],
        unit=unit,
        axis=axis,
        left_out=dict(left_out),
    )


def _nothing(name: str, left_out: Mapping[str, int]) -> PhasewatchError:
    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items()) or "there are no lines"
    return PhasewatchError(f"read_samples({name!r}): nothing can be used: {reasons}.")
