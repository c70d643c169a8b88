"""What every function of this room asks of its arrays, and the axis along which they lie."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phasewatch.monitor.errors import PhasewatchError, real_number, warn

DECADE = 10.0
"""An increasing axis of positive numbers that spans at least this factor is read on a logarithmic scale."""


LARGEST = 1e100
"""Numbers beyond it on either side, and places on an axis nearer to 0 than its inverse, are refused: no score, step or
amount of compute is of that size, and their squares and ratios leave what a float can hold."""


@dataclass(frozen=True)
class Axis:
    """A coordinate that increases from early to late, whatever the user's axis is.

    Attributes:
        logarithmic: whether positions are logarithms.
        falling: whether later points have smaller x, as a loss has.
        smallest: the smallest positive x; a step 0 is read as half of it.
    """

    logarithmic: bool
    falling: bool
    smallest: float

    @classmethod
    def of(cls, x: np.ndarray, *, falling: bool) -> "Axis":
        """The axis of some values of x, shape (point,)."""
        positive = x[x > 0]
        smallest = float(positive.min()) if positive.size else 1.0
        logarithmic = not falling and x.min() >= 0 and positive.size > 0 and x.max() >= DECADE * smallest
        return cls(logarithmic, falling, smallest)

    def position(self, x: np.ndarray) -> np.ndarray:
        """Where values of x lie."""
        if self.logarithmic:
            return np.log(np.maximum(x, self.smallest / 2))
        return -x if self.falling else x

    def value(self, position: np.ndarray) -> np.ndarray:
        """The x of positions."""
        if self.logarithmic:
            return np.exp(position)
        return -position if self.falling else position


def check_chance(call: str, chance: object) -> float:
    """The score of a guess, between 0 and below 1; it has to be given, since no curve tells it.

    Raises:
        PhasewatchError: if it is missing or no such number.
    """
    if chance is None:
        raise PhasewatchError(
            f"{call}(chance=None): chance isn't given. Pass the score of a guess: 1 / the number of choices, or 0 for "
            "exact match."
        )
    return real_number(f"{call}(chance=...)", chance, least=0, below=1, hint="as a share (divide percentages by 100)")


BELOW = 0.8
"""Half of the scores below this share of chance are told of: the score of a guess is then another one."""


def warn_below_chance(call: str, score: np.ndarray, chance: float) -> None:
    """Say it where most scores are far below that of a guess."""
    median = float(np.median(score))
    if median < BELOW * chance:
        warn(
            f"{call}(chance={chance:g}): half of the scores are below {median:.3g}, less than a guess would have. The "
            "answer means something only with the score that a guess has: 1 / the number of choices, or 0 for exact "
            "match."
        )


def as_numbers(call: str, name: str, values: Any) -> np.ndarray:
    """An array of floats, of any shape and perhaps with NaN, which also stands for masked values.

    Args:
        call: the function as it is typed.
        name: the argument's name.
        values: what came.

    Returns:
        The array.

    Raises:
        PhasewatchError: if they are no real numbers.
    """
    if values is None:
        raise PhasewatchError(f"{call}({name}=None): {name} isn't given. Pass an array of numbers.")
    try:
        kind = np.asarray(values).dtype
        if kind.kind in "cmM":  # complex numbers, durations and dates, which numpy would turn into numbers
            raise TypeError(f"values of the type {kind} came")
        if isinstance(values, np.ma.MaskedArray):
            return np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise PhasewatchError(f"{call}({name}=...) must be an array of numbers ({error}).") from error


def check_numbers(call: str, name: str, values: Any, *, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
    """Finite numbers as an array of floats.

    Args:
        call: the function as it is typed.
        name: the argument's name.
        values: what came.
        shape: what its shape has to be, with None for an axis of any length.

    Returns:
        The array.

    Raises:
        PhasewatchError: if they are no numbers, not finite, beyond `LARGEST`, or of another shape.
    """
    array = as_numbers(call, name, values)
    fits = shape is None or (
        array.ndim == len(shape) and all(s is None or s == n for s, n in zip(shape, array.shape, strict=True))
    )
    if not fits:
        words = " x ".join("any" if s is None else str(s) for s in shape or ())
        raise PhasewatchError(f"{call}({name}=...) must have the shape ({words}); {array.shape} came.")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise PhasewatchError(f"{call}({name}=...) has {bad} values that are NaN or infinite; leave their points out.")
    if (abs(array) > LARGEST).any():
        raise PhasewatchError(
            f"{call}({name}=...) has a value of size {abs(array).max():g}, beyond {LARGEST:g}; correct it, or use "
            "another unit."
        )
    return array


def check_smooth(call: str, smooth: Any, count: int | None = None) -> np.ndarray:
    """A smooth score of each point, or several columns of it.

    Args:
        call: the function as it is typed.
        smooth: what came.
        count: of the points, where other arguments tell it.

    Returns:
        Shape (point,) or (point, column).

    Raises:
        PhasewatchError: if it is of another shape, has no column, or isn't finite.
    """
    array = check_numbers(call, "smooth", smooth)
    if array.ndim not in (1, 2) or (count is not None and len(array) != count) or 0 in array.shape[1:]:
        point = "point" if count is None else count
        raise PhasewatchError(
            f"{call}(smooth=...) must have the shape ({point},), or ({point}, column) with at least one column; "
            f"{array.shape} came."
        )
    return array


def check_series(call: str, series: Any) -> list[str] | None:
    """The name of each point's run, in the order of the points, whatever a table calls its rows.

    Args:
        call: the function as it is typed.
        series: what came.

    Returns:
        The names; None if there are none.

    Raises:
        PhasewatchError: if it is no list of names.
    """
    if series is None:
        return None
    if isinstance(series, str) or not isinstance(series, Iterable):
        raise PhasewatchError(f"{call}(series={series!r}) must be a list with the name of each point's run.")
    return list(map(str, series))


def check_share(call: str, name: str, values: np.ndarray) -> np.ndarray:
    """The same values, if all lie between 0 and 1.

    Raises:
        PhasewatchError: if one doesn't.
    """
    if ((values < 0) | (values > 1)).any():
        worst = float(values[(values < 0) | (values > 1)][0])
        raise PhasewatchError(
            f"{call}({name}=...) has the value {worst:g}; it must lie between 0 and 1 (divide percentages by 100)."
        )
    return values


def check_log_p(call: str, name: str, log_p: np.ndarray) -> np.ndarray:
    """The same values, if none is above 0.

    Raises:
        PhasewatchError: if one is, since a probability is at most 1.
    """
    if (log_p > 1e-6).any():
        raise PhasewatchError(
            f"{call}({name}=...) has the value {float(log_p.max()):g}; a log probability is at most 0. Pass natural "
            "logarithms of probabilities, not losses or bits per byte."
        )
    return np.minimum(log_p, 0.0)


def check_axis(call: str, x: Any, *, least: int, series: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """An axis that rises or falls throughout.

    Args:
        call: the function as it is typed.
        x: what came.
        least: the fewest points that make sense.
        series: a label for each point, of the run or model it comes from. Points of different series may share an x and
            come in any order.

    Returns:
        x as an array, and the indices of its points from early to late, both of shape (point,).

    Raises:
        PhasewatchError: if there are too few points, one repeats, or the axis turns.
    """
    array = check_numbers(call, "x", x, shape=(None,))
    if len(array) < least:
        points = "1 point" if len(array) == 1 else f"{len(array)} points"
        raise PhasewatchError(f"{call}(x=...) has {points}, and this takes at least {least}; add more.")
    if ((array != 0) & (abs(array) < 1 / LARGEST)).any():
        raise PhasewatchError(f"{call}(x=...) has places nearer to 0 than {1 / LARGEST:g}; use another unit.")
    if series is None:
        steps = np.diff(array)
        if (steps == 0).any():
            repeated = float(array[int(np.argmax(steps == 0))])
            raise PhasewatchError(
                f"{call}(x=...) has {repeated:g} twice. An axis may not repeat; where points come from different runs "
                "or models, pass series=[...] with the name of each point's run."
            )
        if (steps > 0).any() and (steps < 0).any():
            rising = steps[0] > 0
            i = int(np.argmax((steps > 0) != rising))
            raise PhasewatchError(
                f"{call}(x=...) first {'rises' if rising else 'falls'} and then goes from {array[i]:g} to "
                f"{array[i + 1]:g}. Sort the points along one axis; where they come from different runs or models, "
                "pass series=[...] with the name of each point's run."
            )
        return array, np.arange(len(array))
    if len(series) != len(array):
        raise PhasewatchError(f"{call}(series=...) has {len(series)} names for {len(array)} points.")
    if len(array) > 1 and (array == array[0]).all():
        raise PhasewatchError(f"{call}(x=...) is {array[0]:g} at every point; add points at other places.")
    for label in dict.fromkeys(series):
        own = array[[i for i, other in enumerate(series) if other == label]]
        if len(set(own.tolist())) < len(own):
            raise PhasewatchError(f"{call}(x=...) has a value twice within the series {label!r}.")
    return array, np.argsort(array, kind="stable")
