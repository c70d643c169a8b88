"""Simulated trajectories whose stages are known, by numpy alone."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stage:
    """A monotone stretch of λ̂ without its noise.

    Attributes:
        start: the training step where it begins; λ̂'s slope is zero or small there, or it comes off a plateau.
        end: the training step where it is over.
        change: of λ̂.
    """

    start: float
    end: float
    change: float


@dataclass(frozen=True)
class Scenario:
    """A simulated trajectory and the truth about it.

    Attributes:
        steps: training steps, shape (point,), increasing.
        loss: loss with noise, shape (point,).
        llc: λ̂ with noise, shape (point,).
        truth: λ̂ without noise, shape (point,).
        stages: what is there to be found, by increasing step.
        chains: λ̂ of each chain, shape (point, chain), of which `llc` is the mean; None if it is told without chains.
    """

    steps: np.ndarray
    loss: np.ndarray
    llc: np.ndarray
    truth: np.ndarray
    stages: tuple[Stage, ...]
    chains: np.ndarray | None = None


def grid(rng: np.random.Generator, points: int, last: float) -> np.ndarray:
    """Training steps up to `last` as people take them: log-spaced, evenly spaced, or both together."""
    style = rng.choice(["log", "even", "both"], p=[0.5, 0.15, 0.35])
    wanted = points
    while True:
        logs = np.geomspace(1, last, wanted if style == "log" else wanted // 2)
        even = np.linspace(last / wanted, last, wanted if style == "even" else wanted - wanted // 2)
        steps = np.unique({"log": logs, "even": even, "both": np.append(logs, even)}[style].round())
        if len(steps) >= points:
            return np.sort(rng.choice(steps, points, replace=False))
        wanted += max(points - len(steps), 1)


def ramp(u: np.ndarray, lean: float, floor: float) -> np.ndarray:
    """From 0 to 1 while u does, with a slope of `floor` at both ends; half of the way is done at u = 0.5 ** (1 / lean).

    Args:
        u: how much of the stage is over, clipped to 0 and 1.
        lean: 1 is symmetric; less is fast first and slow later.
        floor: the slope at the ends, as a share of the mean slope.
    """
    v = np.clip(u, 0, 1) ** lean
    return (1 - floor) * v * v * (3 - 2 * v) + floor * np.clip(u, 0, 1)


def correlated(rng: np.random.Generator, points: int, correlation: float, size: int = 1) -> np.ndarray:
    """Noise of variance 1 whose neighbours are correlated so much, shape (point, size)."""
    noise = rng.normal(size=(points, size))
    for i in range(1, points):
        noise[i] = correlation * noise[i - 1] + np.sqrt(1 - correlation**2) * noise[i]
    return noise


def staged(
    seed: int, points: int = 0, correlation: float | None = None, outliers: float | None = None, chains: int = 0
) -> Scenario:
    """One to five stages of random lengths, signs and sizes, some with plateaus between them.

    Neighbours of opposite sign meet in an extremum, neighbours of one sign in a slow-down where the slope falls to 0 to
    10 % of its mean. Each change is 5 to 100 times the noise's standard deviation, and the noise differs up to 5-fold
    along the trajectory.

    Args:
        seed: of everything.
        points: how many; 0 draws 20 to 250.
        correlation: of the noise of neighbouring points; None draws one of 0, 0.4 and 0.7.
        outliers: the share of points that are 10 standard deviations off; None draws one of 0 and 0.03.
        chains: how many chains share λ̂'s wander, each with a wander of its own; 0 for none.
    """
    rng = np.random.default_rng([seed, 1])
    points = points or int(np.exp(rng.uniform(np.log(20), np.log(250))))
    correlation = float(rng.choice([0, 0.4, 0.7])) if correlation is None else correlation
    outliers = float(rng.choice([0, 0.03])) if outliers is None else outliers
    steps = grid(rng, points, 10 ** rng.uniform(3, 6))
    # Places are shares of the points, so that a stage has points in it wherever the grid has its own.
    count = int(rng.integers(1, 6)) if points >= 60 else int(rng.integers(1, 4))
    plateaus = rng.random(count + 1) < 0.35
    plateaus[0] |= rng.random() < 0.5
    lengths = rng.uniform(1, 3, count)
    pauses = np.where(plateaus, rng.uniform(0.4, 2, count + 1), 0)
    ends = np.cumsum(np.ravel(np.column_stack([pauses[:-1], lengths])))
    x = np.log(steps)
    places = np.interp(np.append(0, ends) / (ends[-1] + pauses[-1]), np.linspace(0, 1, points), x)

    signs = rng.choice([-1, 1], count)
    signs[0] = 1 if rng.random() < 0.8 else signs[0]
    sizes = np.exp(rng.uniform(np.log(5), np.log(100), count))
    truth = np.full(points, float(rng.uniform(-5, 30)))
    loss = np.full(points, float(rng.uniform(2, 6)))
    stages = []
    for k, (sign, size) in enumerate(zip(signs, sizes, strict=True)):
        start, end = places[2 * k + 1], places[2 * k + 2]
        done = ramp((x - start) / (end - start), rng.uniform(0.6, 1.4), rng.uniform(0, 0.1))
        truth += sign * size * done
        loss -= rng.uniform(0.02, 0.5) * done
        stages.append(Stage(float(np.exp(start)), float(np.exp(end)), float(sign * size)))
    noise = np.exp(np.linspace(0, rng.uniform(-1.6, 1.6), points))
    noise /= noise.max()
    series = truth + noise * correlated(rng, points, correlation)[:, 0]
    series += np.where(rng.random(points) < outliers, 10 * noise * rng.choice([-1, 1], points), 0)
    loss += 0.005 * rng.normal(size=points)
    return _with_chains(rng, chains, Scenario(steps, loss, series, truth, tuple(stages)))


def flat(seed: int, points: int, correlation: float = 0.0, chains: int = 0) -> Scenario:
    """Noise around one level. The loss falls all the same."""
    rng = np.random.default_rng([seed, 2])
    steps = grid(rng, points, 10 ** rng.uniform(3, 6))
    truth = np.full(points, float(rng.uniform(-5, 100)))
    loss = 3 - 0.1 * np.log(steps) + 0.01 * rng.normal(size=points)
    noise = correlated(rng, points, correlation)[:, 0]
    return _with_chains(rng, chains, Scenario(steps, loss, truth + noise, truth, ()))


def monotone(seed: int, points: int, correlation: float = 0.0, chains: int = 0) -> Scenario:
    """One rise or fall of 10 to 100 times the noise, with plateaus of random lengths before and after it."""
    rng = np.random.default_rng([seed, 3])
    steps = grid(rng, points, 10 ** rng.uniform(3, 6))
    x = np.log(steps)
    first, last = np.sort(rng.choice(points - 1, 2, replace=False))
    last = max(last, min(first + points // 4, points - 1))
    change = float(np.exp(rng.uniform(np.log(10), np.log(100))) * rng.choice([-1, 1]))
    done = ramp((x - x[first]) / (x[last] - x[first]), rng.uniform(0.6, 1.4), 0)
    truth = rng.uniform(-5, 30) + change * done
    loss = 4 - done + 0.01 * rng.normal(size=points)
    noise = correlated(rng, points, correlation)[:, 0]
    stage = Stage(float(steps[first]), float(steps[last]), change)
    return _with_chains(rng, chains, Scenario(steps, loss, truth + noise, truth, (stage,)))


def jumping(seed: int, points: int, size: float, gaps: int, chains: int = 0) -> Scenario:
    """All of a rise or fall of λ̂ over a few gaps between neighbouring points, with plateaus or slow drifts beside it.

    Where λ̂ jumps up, the loss falls with it; where it jumps down, the loss is flat. The drift is at most 3 standard
    deviations of the noise over the whole run.

    Args:
        seed: of everything.
        points: how many, log-spaced or evenly spaced.
        size: in standard deviations of the noise.
        gaps: over how many gaps between points; the path is a straight line in log step.
        chains: how many chains share λ̂'s wander, each with a wander of its own; 0 for none.
    """
    rng = np.random.default_rng([seed, 4])
    even = 100 * np.arange(1.0, points + 1)
    steps = even if rng.random() < 0.5 else np.unique(np.geomspace(1, 1e5, 2 * points).round())[-points:]
    x = np.log(steps)
    first = int(rng.integers(int(0.15 * points), int(0.85 * points) - gaps))
    done = np.clip((x - x[first]) / (x[first + gaps] - x[first]), 0, 1)
    along, drifts, rises = (x - x[0]) / (x[-1] - x[0]), rng.random() < 0.5, rng.random() < 0.5
    change = float(size if rises else -size)
    truth = 50 + change * done + drifts * rng.uniform(1, 3) * rng.choice([-1, 1]) * along
    loss = 3 - 0.01 * size * rises * done - 0.02 * drifts * along + 0.01 * rng.normal(size=points)
    stage = Stage(float(steps[first]), float(steps[first + gaps]), change)
    return _with_chains(rng, chains, Scenario(steps, loss, truth + rng.normal(size=points), truth, (stage,)))


def _with_chains(rng: np.random.Generator, chains: int, scenario: Scenario) -> Scenario:
    """Give each chain a level and a slow wander of its own, as common random numbers leave them."""
    if not chains:
        return scenario
    points = len(scenario.steps)
    own = 20 * rng.normal(size=chains) + 1.5 * correlated(rng, points, 0.97, chains)
    per_chain = scenario.llc[:, None] + own
    return Scenario(scenario.steps, scenario.loss, per_chain.mean(axis=1), scenario.truth, scenario.stages, per_chain)
