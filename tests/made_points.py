"""Points that nobody measured, for what begins without torch."""

from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.trajectories.trajectory import Point


def a_point(step, llc=10.0, loss=2.0, spread=1.0):
    estimate = Estimate(llc, 0.1, (llc - spread, llc + spread), 20.0, 1.0, 100.0, Health.OK)
    return Point(step, loss, estimate, {"accuracy": 0.5})


def rising_points(count=40):
    """A rise of λ̂ between two plateaus while the loss falls: one transition, confirmed well before the end."""
    levels = [10.0 if i < count // 4 else 50.0 if i > count // 2 else None for i in range(count)]
    points = []
    for i, level in enumerate(levels):
        share = (i - count // 4) / (count // 4)
        llc = level if level is not None else 10.0 + 40.0 * share
        points.append(a_point(10 + i, llc + 0.02 * (-1) ** i, 4.0 - llc / 20, spread=0.1))
    return points
