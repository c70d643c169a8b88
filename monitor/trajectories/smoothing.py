"""A series without its noise: a smoothing spline against log step, and its errors. numpy and scipy alone."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg.lapack import dgtsv, dpotrf, dtrtri  # pyright: ignore[reportAttributeAccessIssue]
from threadpoolctl import ThreadpoolController

from phasewatch.monitor.trajectories.jumps import (
    LEAST_HEIGHT,
    MOST_SUSPECTS,
    Jump,
    Place,
    least_gain,
    likeliest,
    near,
    rise_slopes,
    rises,
    stands_on_plateaus,
    suspects,
)
from phasewatch.monitor.trajectories.noise import first_guess, local_bends, local_noise, noise_of_rounding

MOST_KNOTS = 64
"""The spline has at most this many knots, evenly among the points, so that a fit takes milliseconds.

With 32, 1 % of the simulated stages are lost; with 128 the curve follows correlated noise, and changes lie within
their errors in 90 % instead of 94 % of cases (experiments/constants.py).
"""

CORRELATIONS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""The correlations of neighbouring points' noise that are tried; the first fits use the second.

Without those above 0.3 more stages are found, but changes lie within their errors in only 84 % of cases
(experiments/constants.py).
"""

ROUNDS = 2
"""How many first fits there are; each tells the next how noise and curvature differ along the series.

With 1, 1 % of the simulated stages are lost; a third makes no difference (experiments/constants.py).
"""

UNKNOWN = 1.5
"""All errors of a curve are this many times those of the posterior, which takes the noise and the curvature for known.

With 1, changes lie within their errors in 86 % instead of 94 % of cases; with 2, 3 % of the stages are lost
(experiments/constants.py).
"""


@dataclass(frozen=True)
class Slack:
    """How much log-likelihood may be given up for a smoother curve, in nats.

    Attributes:
        stiffness: take the stiffest curve whose log-likelihood is within this of the likeliest one; 0 takes the
            likeliest.
        correlation: of the correlations of the noise, take the largest that is within this of the likeliest.
    """

    stiffness: float
    correlation: float


LIKELIEST = Slack(0.0, 0.0)
"""Takes the likeliest curve."""


class Slacks(NamedTuple):
    """The slack of the curve itself, and the larger one of the cautious curve, which only confirms signs."""

    shape: Slack
    signs: Slack


ALONE = Slacks(shape=Slack(0.25, 3.0), signs=Slack(0.25, 4.5))
"""For λ̂ without chains and for metrics: nothing but the points themselves tells what is noise.

More slack takes more of the scatter for noise. How the four numbers were chosen is not recorded.
"""

WITNESSED = Slacks(shape=Slack(0.0, 2.0), signs=Slack(0.1, 4.5))
"""For λ̂ with chains, whose agreement is judged too, and for the loss. How the four numbers were
chosen is not recorded."""

MANY = 100
"""With fewer points of λ̂ than this, the correlation's slack is less in proportion, down to half.

A few points can't tell shared noise from a curve. With the whole slack, 40 points chosen coarse to fine showed the
published kinds in 56 instead of 81 % of starts; half of it for any number makes errors of changes too small.
"""


def witnessed(points: int) -> Slacks:
    """`WITNESSED` for λ̂ at so many points.

    Example:
        >>> [witnessed(points).shape.correlation for points in (20, 75, 200)]
        [1.0, 1.5, 2.0]
    """
    shape, signs = WITNESSED
    share = min(max(points / MANY, 0.5), 1.0)
    return Slacks(Slack(shape.stiffness, share * shape.correlation), signs)


def log_steps(steps: np.ndarray) -> np.ndarray:
    """Training steps as positions on a log axis.

    Step 0 lies one first gap before the first positive step, so that counting steps in another unit (thousands, tokens)
    shifts all positions alike; log(step + 1) would not.

    Args:
        steps: training steps, shape (point,), strictly increasing, not negative.

    Returns:
        Positions, shape (point,), increasing; from 0 to 1 where logarithms can't tell steps apart.
    """
    steps = np.asarray(steps)
    later = steps[steps > 0]
    positive = np.log(later)
    if (np.diff(positive) <= 0).any():  # time stamps, whose neighbours differ only relative to the first of them
        relative = np.log1p((later - later[0]) / later[0])
        positive = relative / relative[-1]
        if len(np.unique(positive)) < 3:  # all but a few neighbours are one position to a float
            positive = np.linspace(0, 1, len(positive))
    if len(positive) == len(steps):
        return positive
    if len(positive) == 0:
        return np.zeros(len(steps))
    gap = positive[1] - positive[0] if len(positive) > 1 else 1.0
    return np.concatenate([[positive[0] - gap], positive])


@dataclass(frozen=True)
class Curve:
    """A smoothed series, and how well it is known.

    Attributes:
        x: positions, shape (point,).
        value: the smoothed series, shape (point,).
        slope: its derivative by position, shape (point,).
        noise: standard deviation of each observation around the curve, shape (point,); outliers have a large one.
        correlation: of the noise of neighbouring points.
        freedom: effective degrees of freedom, from 2 (a straight line) to the number of points (no smoothing).
        value_root: R with R Rᵀ the posterior covariance of `value`, shape (point, knot).
        slope_root: the same of `slope`.
        jumps: what is too abrupt for a smooth curve, by increasing position.
    """

    x: np.ndarray
    value: np.ndarray
    slope: np.ndarray
    noise: np.ndarray
    correlation: float
    freedom: float
    value_root: np.ndarray
    slope_root: np.ndarray
    jumps: tuple[Jump, ...] = ()

    def change_error(self, start: int, end: int) -> float:
        """Standard error of `value[end] - value[start]`."""
        return UNKNOWN * float(np.linalg.norm(self.value_root[end] - self.value_root[start]))

    def weights_of_observations(self, weights: np.ndarray) -> np.ndarray:
        """What a weighted sum of the slopes makes of each observation, so that other series are smoothed alike.

        The posterior mean is its covariance times C⁻¹ times the observations, C being the covariance of the noise.

        Args:
            weights: of the slopes, shape (point,).

        Returns:
            Weights of the observations, shape (point,).
        """
        columns = self.value_root @ (weights @ self.slope_root)
        return _by_noise(columns[:, None], self.noise, self.correlation)[:, 0]


def _by_noise(columns: np.ndarray, noise: np.ndarray, correlation: float) -> np.ndarray:
    """C⁻¹ times some columns, C being the covariance of the noise."""
    scaled = columns / noise[:, None]
    whole = (1 + correlation**2) * scaled
    whole[[0, -1]] = scaled[[0, -1]]
    whole[1:] -= correlation * scaled[:-1]
    whole[:-1] -= correlation * scaled[1:]
    return whole / (noise[:, None] * (1 - correlation**2))


def smooth(x: np.ndarray, y: np.ndarray, slack: Slack = ALONE.shape) -> Curve:
    """The cubic smoothing spline of a series whose noise and whose bends differ along it.

    The spline minimises rᵀ C⁻¹ r + ρ·∫(f″ / b)², r = y − f, which is the posterior mean of f under a prior of
    independent curvature of local size b, with noise of covariance C: each point's own standard deviation, and a
    correlation between neighbours that fades as its powers. ρ and the correlation are judged by the likelihood of the
    data with the straight line integrated out (Wahba 1985), since cross-validation takes correlated noise for a curve
    (Wang 1998). The first fits give residuals and curvature, whose local sizes are the noise and b of the next: a
    transition may bend sharply, and the plateau beside it does not.

    No curve of one ρ follows a jump: it takes the points around for outliers, or bends as much everywhere. So a jump is
    fitted as what it is, a rise of free height between two of the points. Each is taken that makes the data likelier by
    more than the search for it would by chance.

    Args:
        x: positions, shape (point,), strictly increasing, at least three.
        y: observations, shape (point,), finite.
        slack: how much likelihood to give up for a smoother curve.

    Returns:
        The curve at the same positions.
    """
    return smooth_with_each(x, y, [slack])[0]


def smooth_with_each(x: np.ndarray, y: np.ndarray, slacks: Sequence[Slack]) -> list[Curve]:
    """The curve of each of several slacks, in hardly more time than one; see `smooth`."""
    level, scale = float(np.median(y)), float(np.std(y))
    u = (y - level) / scale if scale > 0 else np.zeros(len(y))
    with _linear_algebra().limit(limits=1):  # threads wait for each other longer than matrices this small take
        return _fitted(x, u, level, scale, slacks)


@functools.cache
def _linear_algebra() -> ThreadpoolController:
    """Limits the threads of numpy's and scipy's linear algebra, and no other library's."""
    return ThreadpoolController().select(internal_api="openblas")


def _fitted(x: np.ndarray, u: np.ndarray, level: float, scale: float, slacks: Sequence[Slack]) -> list[Curve]:
    adapted = _Adapted(_Spline(x), u)
    while (more := _with_a_jump(adapted, x)) is not None:
        adapted = more
    spline, curves = adapted.spline, []
    for slack in slacks:
        fit = adapted.fits.chosen(slack)
        curves.append(
            Curve(
                x=x,
                value=level + scale * spline.value @ fit.mean,
                slope=scale * spline.slope @ fit.mean,
                noise=scale * fit.sigma * adapted.noise,
                correlation=fit.correlation,
                freedom=fit.freedom,
                value_root=scale * spline.value @ fit.root,
                slope_root=scale * spline.slope @ fit.root,
                jumps=spline.jumps,
            )
        )
    return curves


class _Adapted:
    """The fits of a series, first with noise and curvature that are the same all along it, then with what they are.

    Attributes:
        spline: what is fitted.
        u: the series, in units of its standard deviation, shape (point,).
        guess: the noise of each point relative to the others in the first fits, shape (point,).
        first: the first fits.
    """

    def __init__(self, spline: "_Spline", u: np.ndarray) -> None:
        self.spline = spline
        self.u = u
        self.guess = first_guess(u)
        self._least = noise_of_rounding(u)
        self.first = self._fits(self.guess, np.ones(len(spline.knots)), CORRELATIONS[1:2])

    @property
    def noise(self) -> np.ndarray:
        """The noise of each point relative to the others, shape (point,)."""
        return self._last[0]

    @property
    def fits(self) -> "_Fits":
        """The last fits."""
        return self._last[1]

    @functools.cached_property
    def _last(self) -> tuple[np.ndarray, "_Fits"]:
        spline, fits, noise = self.spline, self.first, self.guess
        for i in range(ROUNDS):
            fit = fits.chosen(LIKELIEST)
            residuals, root = self.u - spline.value @ fit.mean, spline.value @ fit.root
            noise = local_noise(residuals, root, fit.sigma * noise, self._least)
            fits = self._fits(
                noise, local_bends(spline.bend @ fit.mean), CORRELATIONS if i == ROUNDS - 1 else CORRELATIONS[1:2]
            )
        return noise, fits

    def _fits(self, noise: np.ndarray, bends: np.ndarray, correlations: Sequence[float]) -> "_Fits":
        moments = _Moments(self.spline.value, self.u, noise)
        return self.spline.fits(moments, bends, correlations, least=self._least / noise.min())

    def gains(self, x: np.ndarray, places: Sequence[Place]) -> np.ndarray:
        """By how much the log-likelihood of the first fits would rise with a jump at each of some places."""
        jumps = rises(x, x, places)
        weighted = _by_noise(jumps, self.guess, CORRELATIONS[1])
        return self.first.gains(weighted.T @ self.spline.value, (weighted * jumps).sum(axis=0), weighted.T @ self.u)


def _with_a_jump(adapted: _Adapted, x: np.ndarray) -> _Adapted | None:
    """The fits with one jump more; None if there is none that makes the series likelier by enough.

    It is sought with the first fits, around the likeliest of those that stand out, since what those that follow take
    for noise depends on it.
    """
    spline, u = adapted.spline, adapted.u
    places = spline.apart(x, suspects(u))[:MOST_SUSPECTS]  # of those that aren't of a jump that is fitted already
    if not places:
        return None
    places = spline.apart(x, near(places[int(adapted.gains(x, places).argmax())], len(u)))
    gains, enough = adapted.gains(x, places), least_gain(len(u))
    jump = likeliest(places, gains)
    if gains.max() < enough or not jump.is_abrupt:
        return None
    more = _Adapted(spline.with_jump(x, jump), u)
    if not stands_on_plateaus(x, more.spline.value @ more.first.chosen(LIKELIEST).mean, jump):
        return None
    fit, ends = more.fits.chosen(LIKELIEST), [jump.start, jump.end]
    height = abs(float(np.diff((more.spline.value @ fit.mean)[ends])[0]))
    is_high = height >= LEAST_HEIGHT * fit.sigma * float(more.noise[ends].mean())
    return more if is_high and more.fits.likelihood - adapted.fits.likelihood > enough else None


@dataclass(frozen=True)
class _Fit:
    """The posterior of a spline's values at its knots: its mean, a root of its covariance, and what led to them."""

    mean: np.ndarray
    root: np.ndarray
    sigma: float
    correlation: float
    freedom: float


class _Spline:
    """The natural cubic splines on the knots of a series, by their values at the knots.

    As `scipy.interpolate.CubicSpline` makes them, whose import takes longer than a search for transitions.
    """

    def __init__(self, x: np.ndarray) -> None:
        self.knots = _knots(x)
        gaps, values = np.diff(self.knots), np.eye(len(self.knots))
        rises = np.diff(values, axis=0)
        h, chords = gaps[:, None], rises / gaps[:, None]
        # The slopes at the knots such that curvature is continuous, and zero at both ends
        inner = h[1:] * chords[:-1] + h[:-1] * chords[1:]
        slopes = dgtsv(
            np.append(gaps[1:], gaps[-1]),
            2 * np.concatenate([gaps[:1], gaps[:-1] + gaps[1:], gaps[-1:]]),
            np.append(gaps[0], gaps[:-1]),
            3 * np.concatenate([rises[:1], inner, rises[-1:]]),
        )[3]
        bent = (slopes[:-1] + slopes[1:] - 2 * chords) / h
        cubic, square = bent / h, (chords - slopes[:-1]) / h - bent
        self.bend = np.append(2 * square, 2 * square[-1:] + 6 * (cubic[-1:] * gaps[-1]), axis=0)
        left = np.clip(np.searchsorted(self.knots, x, side="right") - 1, 0, len(gaps) - 1)
        s = (x - self.knots[left])[:, None]
        slope, square, cubic = slopes[left], square[left], cubic[left]
        self.value = values[left] + slope * s + square * (s * s) + cubic * (s * s * s)
        self.slope = slope + 2 * (square * s) + 3 * (cubic * (s * s))
        self.mass = np.diag(np.append(gaps, 0) + np.append(0, gaps)) / 3 + np.diag(gaps, 1) / 6 + np.diag(gaps, -1) / 6
        self.jumps: tuple[Jump, ...] = ()

    def apart(self, x: np.ndarray, places: Sequence[Place]) -> list[Place]:
        """The places that share no point with the jumps, and that have two positions."""
        return [
            place
            for place in places
            if x[place.start] < x[place.end]
            and all(place.end < jump.start or jump.end < place.start for jump in self.jumps)
        ]

    def with_jump(self, x: np.ndarray, jump: Jump) -> "_Spline":
        """These splines and a jump, by their values at the knots as before.

        The jump's height is the one that leaves the least bending to the spline, a weighted sum of the values at the
        knots. It costs no roughness. Between knots the curve is the spline through the rest, and the jump itself.
        """
        at_knots = rises(self.knots, x, [jump.place])[:, 0]
        pull = self.bend.T @ (self.mass @ (self.bend @ at_knots))
        height = pull / (at_knots @ pull)
        spline = copy.copy(self)
        spline.value = self.value + np.outer(rises(x, x, [jump.place])[:, 0] - self.value @ at_knots, height)
        spline.slope = self.slope + np.outer(rise_slopes(x, [jump.place])[:, 0] - self.slope @ at_knots, height)
        spline.bend = self.bend - np.outer(self.bend @ at_knots, height)
        spline.jumps = tuple(sorted((*self.jumps, jump), key=lambda jump: jump.start))
        return spline

    def fits(self, moments: "_Moments", bends: np.ndarray, correlations: Sequence[float], *, least: float) -> "_Fits":
        """The fits of all stiffnesses, with each of some correlations of the noise, of which σ is at least `least`."""
        bend = self.bend / bends[:, None]
        return _Fits(bend.T @ self.mass @ bend, moments, np.array(correlations), 2 + len(self.jumps), least)


class _Fits:
    """Posteriors of all stiffnesses ρ, each in O(knots), in the basis that diagonalises both data and roughness.

    The first axis of all arrays is the correlation of the noise.
    """

    def __init__(
        self, roughness: np.ndarray, moments: "_Moments", correlations: np.ndarray, straight: int, least: float
    ) -> None:
        self._free = free = moments.points - straight
        self._least_variance = least**2
        precision, projection, squares = moments.whitened(correlations)
        whitening = np.array([_inverse_root(matrix) for matrix in precision])
        rough, turns = np.linalg.eigh(whitening @ roughness @ whitening.transpose(0, 2, 1))
        self._vectors = whitening.transpose(0, 2, 1) @ turns
        smallest = np.maximum(1e-15 * rough[:, -1:], np.finfo(float).tiny)
        rough = np.maximum(rough[:, straight:], smallest)  # the first two are the straight line's, then the jumps'
        self._z = z = (projection[:, None] @ self._vectors)[:, 0]
        left_over = np.maximum(squares - (z**2).sum(axis=1), 0.0)
        rho = np.exp(np.linspace(np.log(1e-3 / rough[:, -1]), np.log(1e3 / rough[:, 0]), 100, axis=1))
        self._suppressed = 1 / (1 + 1 / (rho[:, :, None] * rough[:, None]))
        self._straight = straight
        self._variance = (left_over[:, None] + (self._suppressed @ z[:, straight:, None] ** 2)[:, :, 0]) / free
        # Of products of eight, which are at least 1e-144: a logarithm takes longer than eight products.
        of_eight = np.multiply.reduceat(self._suppressed, np.arange(0, self._suppressed.shape[2], 8), axis=2)
        likelihood = np.log(of_eight).sum(axis=2) - self._cost(self._variance, free)
        self._correlations = correlations
        self._evidence = (likelihood - (moments.points - 1) * np.log(1 - correlations**2)[:, None]) / 2

    def _cost(self, variance: np.ndarray, free: int) -> np.ndarray:
        """Twice the log-likelihood that a mean square of so many free residuals costs, with σ at its likeliest."""
        likeliest = np.maximum(variance, self._least_variance)
        missing = (variance - likeliest) / np.maximum(likeliest, np.finfo(float).tiny)
        return free * (np.log(likeliest + np.finfo(float).eps ** 2) + missing)

    @property
    def likelihood(self) -> float:
        """The log-likelihood of the likeliest fit."""
        return float(self._evidence.max())

    def gains(self, shared: np.ndarray, squares: np.ndarray, projection: np.ndarray) -> np.ndarray:
        """By how much the likelihood rises, at the first correlation, with one more column whose factor is free.

        Args:
            shared: whitened products of each of several columns with the basis, shape (column, knot).
            squares: of each with itself.
            projection: of each with the series.
        """
        shared, free = shared @ self._vectors[0], self._free
        kept = np.pad(1 - self._suppressed[0, ::5], ((0, 0), (self._straight, 0)), constant_values=1.0)
        left = projection[:, None] - shared @ (kept * self._z[0]).T
        explained = left**2 / np.maximum(squares[:, None] - shared**2 @ kept.T, 1e-9 * squares[:, None])
        variance, evidence = self._variance[0, ::5], self._evidence[0, ::5]
        smaller = np.maximum(free * variance - explained, 0.0) / (free - 1)
        gained = (self._cost(variance, free) - self._cost(smaller, free - 1)) / 2
        return (evidence + gained).max(axis=1) - evidence.max()

    def chosen(self, slack: "Slack") -> _Fit:
        """The fit of the largest correlation, and of its largest ρ, whose log-likelihoods are within the slack."""
        likeliest = self._evidence.max(axis=1)
        stiffest = (
            self._evidence.shape[1]
            - 1
            - np.argmax((self._evidence >= likeliest[:, None] - slack.stiffness)[:, ::-1], axis=1)
        )
        evidence = self._evidence[np.arange(len(stiffest)), stiffest]
        c = int(np.flatnonzero(evidence >= evidence.max() - slack.correlation)[-1])
        at = stiffest[c]
        shrink = np.append(np.ones(self._straight), 1 - self._suppressed[c, at])
        sigma = float(np.sqrt(max(self._variance[c, at], self._least_variance)))
        return _Fit(
            mean=self._vectors[c] @ (shrink * self._z[c]),
            root=sigma * self._vectors[c] * np.sqrt(shrink),
            sigma=sigma,
            correlation=float(self._correlations[c]),
            freedom=float(shrink.sum()),
        )


def _inverse_root(matrix: np.ndarray) -> np.ndarray:
    """The inverse of the lower Cholesky factor."""
    factor, _ = dpotrf(matrix, lower=1, clean=1)
    return dtrtri(factor, lower=1)[0]


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

    def whitened(self, correlations: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the basis with itself, of it with the series, and of the series with itself, for each correlation."""
        c = correlations[:, None, None]
        whole = self._first + (self._after - c * self._both + c**2 * self._before) / (1 - c**2)
        return whole[:, :-1, :-1], whole[:, :-1, -1], whole[:, -1, -1]


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
    if len(knots) > 2:
        return np.array(knots)
    inner = x[(x > x[0]) & (x < x[-1])]
    return np.array([x[0], inner[np.abs(inner - (x[0] + x[-1]) / 2).argmin()], x[-1]])
