"""How often `emergence.reversal` rings for nothing, and how soon it rings for a fall, on simulated series.

Of series that don't fall, three shares are printed: that ring at some time, surely so, and at their end.

    python experiments/reversals.py --series 100 [--curve]

`--curve` prints, for other shares of the threshold at which the alarm may ring, what an earlier alarm costs.

The series that don't fall are flat, rise by one standard deviation of the noise with each doubling of the step, or
follow a power law, under white noise, Student's t with three degrees of freedom, spikes, or noise that neighbours
share. Those that fall lose 0.4 to 0.6 nats after a peak in the middle, in noise of 0.03 to 0.11 nats.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from phasewatch.monitor.emergence.checks import Axis
from phasewatch.monitor.emergence.reversal import EARLY, FEWEST, RELEASE, rings_since, turned

LAST = 143_000

AXES = {
    "27 steps, most of them early": np.concatenate(
        [[0.0], 2.0 ** np.arange(10), [1000, 3000], np.arange(13, 144, 10) * 1000]
    ),
    "40 equal steps": np.linspace(LAST / 40, LAST, 40),
    "60 steps, evenly in their logarithm": np.geomspace(10, LAST, 60),
}

SHAPES = ("flat", "slow rise", "power law")

NOISES = ("white", "heavy tails", "spikes", "shared by neighbours")


def course(rng: np.random.Generator, shape: str, steps: np.ndarray) -> np.ndarray:
    """A score that doesn't fall, in standard deviations of its noise, shape (step,)."""
    if shape == "flat":
        return -100 * np.exp(-steps / 2000)
    if shape == "slow rise":
        return np.log2((steps + 1) / 1e4).clip(0) - 100 * np.exp(-steps / 2000)
    gap = rng.uniform(0.02, 0.8) * (np.maximum(steps, 1) / LAST) ** -rng.uniform(0.3, 0.9)
    return -np.minimum(gap, 12) / rng.uniform(0.03, 0.11)


def noise(rng: np.random.Generator, kind: str, count: int) -> np.ndarray:
    """Noise of about unit variance, shape (count,)."""
    if kind == "heavy tails":
        return rng.standard_t(3, size=count) * 0.75
    white = rng.normal(size=count)
    if kind == "spikes":
        return white + (rng.random(count) < 0.08) * rng.normal(size=count) * 5
    if kind == "shared by neighbours":
        for i in range(1, count):
            white[i] = 0.5 * white[i - 1] + 0.75**0.5 * white[i]
    return white


def statistics(steps: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The alarm's statistic as the series grows, shape (step,): 0 before it can ring."""
    u = Axis.of(steps, falling=False).position(steps)
    later = [turned(u[:points], score[:points]) for points in range(FEWEST, len(steps) + 1)]
    return np.array([0.0] * (FEWEST - 1) + later)


def false_alarms(series: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """For each axis and shape, the share of series that ring at any time, do so surely, and ring at their end."""
    for axis, steps in AXES.items():
        for shape in SHAPES:
            words = []
            for kind in NOISES:
                rng = np.random.default_rng(seed)
                rows = [
                    statistics(steps, course(rng, shape, steps) + noise(rng, kind, len(steps))) for _ in range(series)
                ]
                largest = np.max(rows, axis=1)
                at_end = np.mean([rings_since(row) is not None for row in rows])
                words.append(f"{kind} {(largest >= EARLY).mean():.2f}, {(largest >= 1).mean():.2f}, {at_end:.2f}")
            yield f"false alarms, {shape}, {axis}", "; ".join(words)


def falling(steps: np.ndarray, series: int, seed: int = 0) -> Iterator[tuple[float, np.ndarray]]:
    """Where each of the falls begins, and the alarm's statistic as its series grows, shape (step,)."""
    rng = np.random.default_rng(seed)
    for _ in range(series):
        peak, spread = rng.uniform(40_000, 93_000), rng.uniform(0.03, 0.11)
        rise = spread * course(rng, rng.choice(("flat", "power law")), steps)
        fall = rng.uniform(0.4, 0.6) * (np.maximum(steps - peak, 0) / (LAST - peak)) ** rng.choice((1.0, 1.5))
        score = np.where(steps > peak, np.interp(peak, steps, rise) - fall, rise)
        yield peak, statistics(steps, score + spread * noise(rng, "white", len(steps)))


def falls(series: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """For each axis, the share of falls that are found at the end, and when their alarm rang."""
    for axis, steps in AXES.items():
        delays = [delay(steps, peak, row) for peak, row in falling(steps, series, seed)]
        found = np.isfinite(delays).mean()
        yield f"falls, {axis}", f"found {found:.2f}, median delay {np.median(delays):,.0f} of {LAST:,} steps"


def delay(steps: np.ndarray, peak: float, row: np.ndarray, early: float = EARLY, release: float = RELEASE) -> float:
    """Steps from a peak to the alarm that still rings at the end; infinite if there is none."""
    since = rings_since(row, early, release)
    return np.inf if since is None else float(steps[since] - peak)


def curve(series: int, seed: int = 1) -> Iterator[tuple[str, str]]:
    """For each axis and alarm, how soon it rings for falls, and how often series that don't fall ring at their end."""
    for axis, steps in AXES.items():
        found = list(falling(steps, series, seed))
        quiet: dict[str, list[np.ndarray]] = {}
        for shape in SHAPES:
            rng = np.random.default_rng(seed)
            scores = [course(rng, shape, steps) + noise(rng, "white", len(steps)) for _ in range(series)]
            quiet[shape] = [statistics(steps, score) for score in scores]
        for early in (1.0, 0.9, 0.82, EARLY, 0.66, 0.58, 0.5):
            release = RELEASE / EARLY * early
            later = [delay(steps, peak, row, early, release) for peak, row in found]
            rates = [
                f"{shape} {np.mean([rings_since(row, early, release) is not None for row in rows]):.2f}"
                for shape, rows in quiet.items()
            ]
            yield f"rings at {early:g}, {axis}", f"median delay {np.median(later):,.0f}; at the end " + ", ".join(rates)


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=100, help="of each kind")
    parser.add_argument("--curve", action="store_true", help="delay against false alarms instead")
    options = parser.parse_args()
    tables = (curve(options.series),) if options.curve else (falls(options.series), false_alarms(options.series))
    for rows in tables:
        for what, measured in rows:
            print(f"{what:60s} {measured}", flush=True)


if __name__ == "__main__":
    main()
