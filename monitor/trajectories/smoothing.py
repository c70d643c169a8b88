"""A series without its noise: a spline against log step, and how well it is known. numpy and scipy alone."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.linalg import eigh
from threadpoolctl import ThreadpoolController

MOST_KNOTS = 64
"""A series of more points than this gets this many knots, so that a fit takes milliseconds."""

CORRELATIONS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""The correlations of neighbours' noise that are tried; the first fits take the second."""

ROUNDS = 2
"""First fits, each of which tells the next where the noise is large and where the curve bends."""

OUTLIER = 3.0
"""A point that is further off than so many standard deviations counts the less the further it is."""

WINDOW = 20
"""A point's noise is judged by a twentieth of the points to either side, and at least five ..."""

COUNTS = 4
"""... and by the whole, which counts as so many more."""

LEAST_BEND = 0.03
"""The curve may bend everywhere this much, as a share of the typical bend."""


@dataclass(frozen=True)
class Doubt:
    """How far below the best a log likelihood may lie for what it belongs to not to be ruled out.

    Attributes:
        stiffness: among those not ruled out, the largest is taken; 0 takes the likeliest.
        correlation: the same.
    """

    stiffness: float
    correlation: float


class Doubts(NamedTuple):
    """A series' doubt about its shape, and the larger one about the signs of its changes."""

    shape: Doubt
    signs: Doubt


UNKNOWN = 1.5
"""Errors are so many times what the posterior says, which takes the noise and the bends for known (measured)."""

ALONE = Doubts(shape=Doubt(0.25, 3.0), signs=Doubt(0.25, 4.5))
"""For a series of which nothing else tells what is noise: a wander is noise if it may be."""

WITNESSED = Doubts(shape=Doubt(0.0, 2.0), signs=Doubt(0.1, 4.5))
"""For a series whose changes are judged by something else too."""


def log_steps(steps: np.ndarray) -> np.ndarray:
    """Training steps as positions on a log axis.

    Step 0 lies one first gap before the first positive step, so that counting steps in another unit (thousands, tokens)
    shifts all positions alike; log(step + 1) would not.

    Args:
        steps: training steps, shape (point,), strictly increasing, not negative.

    Returns:
        Positions, shape (point,), strictly increasing.
    """
    steps = np.asarray(steps, dtype=float)
    positive = np.log(steps[steps > 0])
    if len(positive) == len(steps):
        return positive
    if len(positive) == 0:
        return np.zeros(len(steps))
    gap = positive[1] - positive[0] if len(positive) > 1 else 1.0
    return np.concatenate([[positive[0] - gap], positive])


@dataclass(frozen=True)
class Curve:
    """A series without its noise, and how well it is known.

    Attributes:
        x: positions, shape (point,).
        value: the smoothed series, shape (point,).
        slope: its derivative by position, shape (point,).
        noise: standard deviation of each observation around the curve, shape (point,); outliers have a large one.
        correlation: of the noise of neighbouring points.
        freedom: effective degrees of freedom, from 2 (a straight line) to the number of points (no smoothing).
        value_root: R with R Rᵀ the posterior covariance of `value`, shape (point, knot).
        slope_root: the same of `slope`.
    """

    x: np.ndarray
    value: np.ndarray
    slope: np.ndarray
    noise: np.ndarray
    correlation: float
    freedom: float
    value_root: np.ndarray
    slope_root: np.ndarray

    def change_error(self, start: int, end: int) -> float:
        """Standard error of `value[end] - value[start]`."""
        return UNKNOWN * float(np.linalg.norm(self.value_root[end] - self.value_root[start]))


def smooth(x: np.ndarray, y: np.ndarray, doubt: Doubt = ALONE.shape) -> Curve:
    """The cubic smoothing spline of a series whose noise and whose bends differ along it.

    The spline minimises rᵀ C⁻¹ r + ρ·∫(f″ / b)², r = y − f, which is the posterior mean of f under a prior of
    independent curvature of local size b, with noise of covariance C: each point's own standard deviation, and a
    correlation between neighbours that fades as its powers. ρ and the correlation are judged by the likelihood of the
    data with the straight line integrated out (Wahba 1985), since cross-validation takes correlated noise for a curve
    (Wang 1998). The first fits give residuals and curvature, whose local sizes are the noise and b of the next: a
    transition may bend sharply, and the plateau beside it does not.

    Args:
        x: positions, shape (point,), strictly increasing, at least three.
        y: observations, shape (point,), finite.
        doubt: which stiffness and which correlation to take of those that explain the data nearly as well as the best.

    Returns:
        The curve at the same positions.
    """
    return smooth_with_each(x, y, [doubt])[0]


def smooth_with_each(x: np.ndarray, y: np.ndarray, doubts: Sequence[Doubt]) -> list[Curve]:
    """The curve of each of several doubts, in hardly more time than one; see `smooth`."""
    level, scale = float(np.median(y)), float(np.std(y))
    u = (y - level) / scale if scale > 0 else np.zeros(len(y))
    with _linear_algebra().limit(limits=1):  # threads wait for each other longer than matrices this small take
        return _fitted(_Spline(x), x, u, level, scale, doubts)


@functools.cache
def _linear_algebra() -> ThreadpoolController:
    """The threads of numpy's and scipy's linear algebra, and nobody else's."""
    return ThreadpoolController().select(internal_api="openblas")


def _fitted(
    spline: "_Spline", x: np.ndarray, u: np.ndarray, level: float, scale: float, doubts: Sequence[Doubt]
) -> list[Curve]:
    noise, bends = _spikes(u), np.ones(len(spline.knots))
    for _ in range(ROUNDS):
        fit = spline.fits(_Moments(spline.value, u, noise), bends, CORRELATIONS[1]).stiffest(0.0)
        noise = _local_noise(u - spline.value @ fit.mean, spline.value @ fit.root, fit.sigma * noise)
        bends = _local_bends(spline.bend @ fit.mean)
    moments = _Moments(spline.value, u, noise)
    every = [spline.fits(moments, bends, correlation) for correlation in CORRELATIONS]
    curves = []
    for doubt in doubts:
        fits = [of_one.stiffest(doubt.stiffness) for of_one in every]
        least = max(fit.evidence for fit in fits) - doubt.correlation
        fit = [fit for fit in fits if fit.evidence >= least][-1]
        curves.append(
            Curve(
                x=x,
                value=level + scale * spline.value @ fit.mean,
                slope=scale * spline.slope @ fit.mean,
                noise=scale * fit.sigma * noise,
                correlation=fit.correlation,
                freedom=fit.freedom,
                value_root=scale * spline.value @ fit.root,
                slope_root=scale * spline.slope @ fit.root,
            )
        )
    return curves


@dataclass(frozen=True)
class _Fit:
    """The posterior of a spline's values at its knots: its mean, a root of its covariance, and what led to them."""

    mean: np.ndarray
    root: np.ndarray
    sigma: float
    correlation: float
    freedom: float
    evidence: float


class _Spline:
    """The natural cubic splines on the knots of a series, by their values at the knots."""

    def __init__(self, x: np.ndarray) -> None:
        self.knots = _knots(x)
        spline = CubicSpline(self.knots, np.eye(len(self.knots)), bc_type="natural")
        self.value, self.slope, self.bend = spline(x), spline(x, 1), spline(self.knots, 2)
        gaps = np.diff(self.knots)
        self.mass = np.diag(np.append(gaps, 0) + np.append(0, gaps)) / 3 + np.diag(gaps, 1) / 6 + np.diag(gaps, -1) / 6

    def fits(self, moments: "_Moments", bends: np.ndarray, correlation: float) -> "_Fits":
        """Those of every stiffness, with one correlation of the noise."""
        return _Fits(self.bend / bends[:, None], self.mass, moments, correlation)


class _Fits:
    """Posteriors of all stiffnesses ρ, each in O(knots), in the basis that diagonalises data and roughness both."""

    def __init__(self, bend: np.ndarray, mass: np.ndarray, moments: "_Moments", correlation: float) -> None:
        n = moments.points
        precision, pull, squares = moments.whitened(correlation)
        roughness, self._vectors = eigh(bend.T @ mass @ bend, precision)
        roughness = roughness[2:].clip(
            min=max(1e-15 * roughness[-1], np.finfo(float).tiny)
        )  # the first two are the straight line's
        self._z = z = self._vectors.T @ pull
        left_over = max(float(squares - z @ z), 0.0)
        rho = np.geomspace(1e-3 / roughness[-1], 1e3 / roughness[0], 100)[:, None]
        self._kept_out = rho * roughness / (1 + rho * roughness)
        self._variance = (left_over + self._kept_out @ z[2:] ** 2) / (n - 2)
        likelihood = np.log(self._kept_out).sum(axis=1) - (n - 2) * np.log(self._variance + np.finfo(float).eps ** 2)
        self._correlation = correlation
        self._evidence = (likelihood - (n - 1) * np.log(1 - correlation**2)) / 2

    def stiffest(self, doubt: float) -> _Fit:
        """The one of the largest ρ whose log likelihood is within `doubt` of the best."""
        at = int(np.flatnonzero(self._evidence >= self._evidence.max() - doubt)[-1])
        shrink = np.concatenate([[1.0, 1.0], 1 - self._kept_out[at]])
        sigma = float(np.sqrt(self._variance[at]))
        return _Fit(
            mean=self._vectors @ (shrink * self._z),
            root=sigma * self._vectors * np.sqrt(shrink),
            sigma=sigma,
            correlation=self._correlation,
            freedom=float(shrink.sum()),
            evidence=float(self._evidence[at]),
        )


class _Moments:
    """Products of a basis and a series with themselves, from which those whitened for any correlation follow.

    Whitening divides by each point's noise, and takes away what the point before says: row i becomes
    (m_i − c·m_{i−1}) / √(1 − c²), for the first m_0. Their products are sums of three that don't depend on c.
    """

    def __init__(self, basis: np.ndarray, u: np.ndarray, noise: np.ndarray) -> None:
        self.points = len(u)
        scaled = np.column_stack([basis, u]) / noise[:, None]
        before, after = scaled[:-1], scaled[1:]
        self._first = np.outer(scaled[0], scaled[0])
        self._after, self._before, both = after.T @ after, before.T @ before, after.T @ before
        self._both = both + both.T

    def whitened(self, correlation: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Of the basis with itself, of the basis with the series, and of the series with itself."""
        rest = self._after - correlation * self._both + correlation**2 * self._before
        whole = self._first + rest / (1 - correlation**2)
        return whole[:-1, :-1], whole[:-1, -1], float(whole[-1, -1])


def _spikes(u: np.ndarray) -> np.ndarray:
    """A first guess of each point's noise: 1, and more if it is far off the median of the five around it.

    Far by what neighbours differ, as in Hampel's filter; the median of a monotone stretch is its middle point, so that
    a steep rise has no spikes. Without it the first fit, which takes all other points for equally noisy, would follow
    the farthest.
    """
    near = np.lib.stride_tricks.sliding_window_view(np.pad(u, 2, mode="reflect"), 5)
    reach = min(10, len(u) - 1)
    steps = np.abs(np.diff(np.pad(u, (reach, reach + 1), mode="reflect")))
    typical = np.median(np.lib.stride_tricks.sliding_window_view(steps, 2 * reach + 1), axis=1)
    off = np.abs(u - np.median(near, axis=1))
    return np.where(off > OUTLIER * typical, np.minimum((off / np.maximum(OUTLIER * typical, 1e-9)) ** 2, 1e3), 1.0)


def _local_noise(residuals: np.ndarray, value_root: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The noise of each point in a unit of its own: that of the points around it, and more for an outlier.

    By iterated weights. A point that the curve follows closely has a small residual by that alone, which its leverage
    corrects.
    """
    n = len(residuals)
    leverage = (value_root / noise.clip(min=np.finfo(float).tiny)[:, None]) ** 2
    squares = residuals**2 / (1 - leverage.sum(axis=1)).clip(min=0.2) + np.finfo(float).tiny
    everywhere = float(np.median(squares)) / 0.455  # the median of a squared normal value
    weights = np.ones(n)
    variance = squares
    for _ in range(8):
        variance = _local_mean(weights * squares, reach=max(5, n // WINDOW), prior=everywhere, counts=COUNTS)
        weights = np.minimum(1, OUTLIER**2 * variance / squares) ** 2
        everywhere = float(np.exp(np.mean(np.log(variance))))
    noise = np.sqrt(variance / weights).clip(*(np.sqrt(np.median(variance)) * np.array([1e-3, 1e3])))
    return noise / np.exp(np.mean(np.log(noise)))


def _local_bends(curvature: np.ndarray) -> np.ndarray:
    """The size of the curvature around each knot, in a unit of its own."""
    squares = curvature**2
    around = _local_mean(squares, reach=max(2, len(squares) // 20), prior=0.0, counts=0)
    size = np.sqrt(around + LEAST_BEND**2 * around.mean() + np.finfo(float).tiny)
    return size / np.exp(np.mean(np.log(size)))


def _local_mean(values: np.ndarray, *, reach: int, prior: float, counts: int) -> np.ndarray:
    """The mean over as many neighbours to both sides, and over `counts` values of `prior`."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    first, last = np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(values))
    return (total[last] - total[first] + counts * prior) / (last - first + counts)


def _knots(x: np.ndarray) -> np.ndarray:
    """At most `MOST_KNOTS` of the positions, evenly by index.

    Curvature between positions h apart weighs 1/h³: two snapshots a step apart, late in a long run, would take all the
    digits that the rest needs. Knots closer together than 1/10,000 of the whole are left out.
    """
    chosen = x[np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_KNOTS)).round().astype(int))]
    knots = [chosen[0]]
    for position in chosen[1:]:
        if position - knots[-1] >= 1e-4 * (x[-1] - x[0]):
            knots.append(position)
    return np.array(knots) if len(knots) > 2 else x[[0, len(x) // 2, -1]]
