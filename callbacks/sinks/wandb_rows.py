"""What a point, transitions and a whole trajectory look like as rows of a W&B history."""

import io
import math
from collections.abc import Sequence
from typing import Any

from phasewatch.monitor.formatting import printable
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
from phasewatch.monitor.trajectories.transitions import Transition, find_transitions

TABLE_COLUMNS = (
    "kind",
    "start",
    "end",
    "loss change",
    "llc change",
    "llc error",
    "confidence",
    "provisional",
    "in words",
)


def point_row(point: Point) -> dict[str, Any]:
    """A point as one history row; a metric whose name is taken becomes `phase/metrics/<name>`."""
    llc = point.llc
    row: dict[str, Any] = {
        "phase/step": point.step,
        "phase/loss": point.loss,
        "phase/llc": llc.value,
        "phase/llc_low": llc.value - 2 * llc.error,
        "phase/llc_high": llc.value + 2 * llc.error,
        "phase/health": llc.health.name,
        "phase/doubtful": int(llc.health.doubtful),
    }
    taken = {key.removeprefix("phase/") for key in row} | {"figure", "llc_band", "transitions"}
    for name, value in point.metrics.items():
        name = printable(name)
        row[f"phase/metrics/{name}" if name in taken else f"phase/{name}"] = value
    return row


def find_and_draw(trajectory: Trajectory) -> tuple[list[Transition], bytes]:
    """The transitions that a trajectory shows as a whole, and the picture of them as a PNG file."""
    from phasewatch.callbacks.figures.rendering import render
    from phasewatch.callbacks.figures.trajectory import draw_trajectory

    transitions = list(find_transitions(trajectory))
    return transitions, render(draw_trajectory(trajectory, transitions), "png", dpi=150)


def drawing_row(trajectory: Trajectory) -> dict[str, Any]:
    """The transitions that a trajectory shows, as a table, a picture and a chart, in one history row."""
    import PIL.Image
    import wandb

    transitions, png = find_and_draw(trajectory)
    # Not wandb.Image(figure): that replaces a method of matplotlib's, and needs pyplot.
    figure = wandb.Image(PIL.Image.open(io.BytesIO(png)))
    row = table_row(transitions, trajectory[-1].step) | {"phase/figure": figure}
    known = [point for point in trajectory if math.isfinite(point.llc.value) and math.isfinite(point.llc.error)]
    if known:
        row["phase/llc_band"] = wandb.plot.line_series(
            xs=[point.step for point in known],
            ys=[[point.llc.value + side * point.llc.error for point in known] for side in (-2, 0, 2)],
            keys=["llc - 2 errors", "llc", "llc + 2 errors"],
            title="Local learning coefficient, with twice its standard error",
            xname="training step",
        )
    return row


def table_row(transitions: Sequence[Transition], step: int) -> dict[str, Any]:
    """Transitions as a table, in one history row at the step where they were found."""
    import wandb

    data: Any = [_cells(transition) for transition in transitions]
    return {"phase/step": step, "phase/transitions": wandb.Table(columns=list(TABLE_COLUMNS), data=data)}


def _cells(transition: Transition) -> list[Any]:
    return [
        transition.kind.name,
        transition.start,
        transition.end,
        transition.loss_change,
        transition.llc_change,
        _llc_error(transition),
        transition.confidence,
        transition.provisional,
        str(transition),
    ]


def _llc_error(transition: Transition) -> float:
    """The standard error of λ̂'s change; NaN where λ̂ isn't known."""
    return transition.changes["llc"].error if "llc" in transition.changes else math.nan
