"""How sure a change between two points of a series is, by its smoothed curve and by its chains."""

import math

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t: degrees of freedom, then t or the probability below it

from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.trajectories.chain_tests import p_value_of_a_rise, variance_of_a_change
from phasewatch.monitor.trajectories.smoothing import ALONE, WITNESSED, Curve, smooth_with_each, witnessed

CONFIDENT = 0.95
"""A change counts from this confidence on, a probability. The usual 95 %."""

CLEAR = 0.5
"""A slow-down counts if its slope is below those of both peaks by this many standard errors.

With 1.5, 1 % of the simulated stages are lost (experiments/constants.py), and twice as many boundaries are taken away
by more points of the same curve (experiments/more_points.py).
"""

AGREED = 0.04
"""A slow-down counts if the chains' p-value is at most this, a probability.

With 0.05, too many of the short runs of the tests are split where four chains happen to slow down together; with 0.02,
1 % of the simulated stages are lost.
"""

FEWEST_FREEDOM = 2.5
"""The noise around a curve counts as known with at least this many degrees of freedom.

With 1, errors are larger: changes lie within them in 98 % instead of 94 % of the simulated cases, and 1 % of the stages
are lost (experiments/constants.py).
"""

PICKED = 16
"""The chains' p-values are multiplied by this, since the ends of a stage were picked for being far apart.

A larger value asks for chains that agree more closely. How it was chosen is not recorded.
"""


class Evidence:
    """A signal's curves, and its chains if it has any: all that a change between two indices is judged by.

    Args:
        curve: the likeliest, in the unit.
        cautious: one that takes more of the scatter for noise that neighbours share. It can only lower a confidence.
        chains: λ̂ of each chain in the unit, shape (point, chain); None if there aren't two.
        unit: what curves and chains were divided by, so that no square leaves the range of a float.

    Attributes:
        range_so_far: highest minus lowest value of the curve up to each index, shape (point,); at least a quarter of
            the largest absolute value, for a run that has not moved yet.
    """

    def __init__(self, curve: Curve, cautious: Curve, chains: np.ndarray | None, unit: float = 1.0) -> None:
        self.unit = unit
        self.curve = curve
        self.cautious = cautious
        self.chains = chains
        highest, lowest = np.maximum.accumulate(curve.value), np.minimum.accumulate(curve.value)
        self.range_so_far = np.maximum(highest - lowest, 0.25 * np.maximum(highest, -lowest))

    @classmethod
    def of_values(
        cls, x: np.ndarray, values: np.ndarray, chains: np.ndarray | None = None, *, is_loss: bool = False
    ) -> "Evidence":
        """The evidence of a signal.

        Args:
            x: positions, shape (point,).
            values: the signal at each, shape (point,).
            chains: λ̂ of each chain, shape (point, chain), at least two; None for another signal.
            is_loss: whether it is the loss.
        """
        slacks = WITNESSED if is_loss else ALONE if chains is None else witnessed(len(values))
        unit = unit_of(values, *([] if chains is None else [chains]))
        curve, cautious = smooth_with_each(x, values / unit, slacks)
        return cls(curve, cautious, None if chains is None else chains / unit, unit)

    def change(self, start: int, end: int) -> float:
        """The curve's change between two indices."""
        return float(self.curve.value[end] - self.curve.value[start])

    def error_and_confidence(self, start: int, end: int) -> tuple[float, float]:
        """An error such that ± 2 of it contain the change in 95 % of cases, and the probability that its sign is right.

        The largest of up to three p-values counts.

        *The curve.* The scatter of the points around it contains each checkpoint's own jitter, which all chains share.
        Its t has as many degrees of freedom as the curve leaves, and its p-value is multiplied by those that the curve
        has, since the two ends were picked among about so many places.

        *The cautious curve.* How strongly neighbours share their noise is badly known, so it is asked as well.

        *The chains.* They contain the sampling noise that neighbouring points share, which no curve sees. They are
        averaged over three points at each place. Only their disagreement about the change counts; the change itself is
        the curve's. The p-value is that of `p_value_of_a_rise`, multiplied by `PICKED`.

        The errors of curve and chains are independent, and add up as variances.
        """
        change = self.change(start, end)
        p_values = self._p_values_of_curves(start, end, change)
        error = error_of_change(self.curve, start, end)
        if self.chains is not None:
            along = _along(self.chains, start, end)
            p_values.append(_p_value_of_chains(along, change))
            error = math.hypot(error, standard_error(along[-1] - along[0]))
        return error, 1 - min(0.5, max(p_values))

    def is_confident(self, start: int, end: int) -> bool:
        """Whether the sign of the change between two indices is right with probability `CONFIDENT`."""
        change = self.change(start, end)
        if max(self._p_values_of_curves(start, end, change)) > 1 - CONFIDENT:
            return False
        return self.chains is None or _p_value_of_chains(_along(self.chains, start, end), change) <= 1 - CONFIDENT

    def _p_values_of_curves(self, start: int, end: int, change: float) -> list[float]:
        return [
            2 * self.curve.freedom * _p_value(self.curve, start, end, change),
            _p_value(self.cautious, start, end, change),
        ]

    def surely(self, weights: np.ndarray) -> bool:
        """Whether a weighted sum of the curve's slopes is above zero, by the curve and by the chains smoothed alike."""
        error = np.linalg.norm(weights @ self.curve.slope_root)
        if not weights @ self.curve.slope > CLEAR * error:
            return False
        if self.chains is None:
            return True
        return p_value_of_a_rise(self.curve.weights_of_observations(weights) @ self.chains) <= AGREED


def unit_of(*values: np.ndarray) -> float:
    """The power of two next to the largest of these numbers in size, by which division is exact; 1 if all are 0."""
    largest = max(float(np.abs(array).max(initial=0.0)) for array in values)
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest > 0 else 1.0


def error_of_change(curve: Curve, start: int, end: int) -> float:
    """An error such that ± 2 of it contain the curve's true change between two indices in 95 % of cases."""
    return curve.change_error(start, end) * float(stdtrit(_freedom(curve), 0.975)) / 2


def _freedom(curve: Curve) -> float:
    """The degrees of freedom with which the noise around a curve is known."""
    return max(len(curve.x) - curve.freedom, FEWEST_FREEDOM)


def _p_value(curve: Curve, start: int, end: int, change: float) -> float:
    """The probability that noise alone would make a curve change so much in the direction of `change`."""
    error = curve.change_error(start, end)
    moved = float(curve.value[end] - curve.value[start]) * math.copysign(1, change)
    return float(stdtr(_freedom(curve), -moved / error)) if error > 0 else 0.0


def _p_value_of_chains(along: np.ndarray, change: float) -> float:
    """The p-value of a change, given how the chains disagree about it; `along` is (place, chain)."""
    variance, freedom = variance_of_a_change(along)
    differences = (along[-1] - along[0]) * np.sign(change)
    differences += abs(change) - differences.mean()
    return 2 * PICKED * p_value_of_a_rise(differences, variance, freedom)


def _along(chains: np.ndarray, start: int, end: int) -> np.ndarray:
    """λ̂ of each chain at both ends, and between them where there are points enough, shape (place, chain)."""
    length = end - start
    parts = 4 if length >= 12 else 2 if length >= 6 else 1
    reach = min(1, (length - 1) // 2)
    places = np.linspace(start, end, parts + 1).round().astype(int)
    return np.array([chains[max(i - reach, 0) : i + reach + 1].mean(axis=0) for i in places])
