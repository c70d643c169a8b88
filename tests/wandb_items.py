"""What tests send to W&B, also from processes that are to begin without torch."""

import io
import math
from typing import Any

from phasewatch.callbacks.sinks.wandb import WandbSink
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.trajectories.changes import Change, Transition
from phasewatch.monitor.trajectories.kinds import Kind
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory


def a_point(step: int, health: Health = Health.OK, **metrics: float) -> Point:
    value = math.nan if health.failed else 10.0 + step
    llc = Estimate(value, 0.5, (value, value), nbeta=60.0, rhat=1.0, ess=50.0, health=health)
    return Point(step, 1.0 / (1 + step), llc, metrics)


def a_transition(start: int, end: int, *, provisional: bool = False) -> Transition:
    changes = {"llc": Change(170.0, 113.0, 2.0, "down"), "loss": Change(1.9, 1.8, 0.01, "down")}
    return Transition(Kind.B, "llc", start, end, (start, start), (end, end), 0.99, provisional, changes)


class AttachedSink(WandbSink):
    """A sink that is given the trajectory of what it is told, as a recorder gives it."""

    def __init__(self, run: Any = None, **options: Any) -> None:
        super().__init__(run, **options)
        self.points: list[Point] = []
        self.attach(lambda: Trajectory(self.points))

    def write(self, item: Point | Transition) -> None:
        if isinstance(item, Point):
            self.points.append(item)
        super().write(item)


def a_png() -> bytes:
    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (4, 3)).save(png, format="png")
    return png.getvalue()
