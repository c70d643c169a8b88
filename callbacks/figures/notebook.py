"""How trajectories, transitions and estimates show themselves in a notebook. matplotlib is imported to draw only."""

from collections.abc import Sequence
from html import escape

import numpy as np

from phasewatch.callbacks.figures.style import KIND_STYLES
from phasewatch.monitor.errors import PhasewatchError, requires
from phasewatch.monitor.estimates.estimate import Estimate
from phasewatch.monitor.formatting import MISSING, count, integer, number, printable, value_and_error
from phasewatch.monitor.trajectories.changes import Transition
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

MOST_DRAWN = 1000
"""A notebook's picture has at most this many points, evenly spaced, so that it is drawn in about a second."""

_BADGE = "display:inline-block;padding:0 .45em;border-radius:4px;color:white;font-weight:700;background:{colour}"


def trajectory_html(trajectory: Trajectory) -> str:
    """A trajectory's picture, and its transitions in words.

    Args:
        trajectory: the points.

    Returns:
        HTML that needs nothing from elsewhere; words alone where there is nothing to draw, or no package to draw with.
    """
    head = f"<p>{escape(repr(trajectory)[1:-1])}</p>"
    signal = _signal(trajectory)
    if signal is None:
        return head
    transitions = find_transitions(trajectory, signal=signal)
    try:
        picture = _picture(trajectory, transitions, signal)
    except PhasewatchError as error:
        picture = f"<p>{escape(str(error))}</p>"
    told = "".join(map(transition_html, transitions)) or "<p>No transition so far.</p>"
    return f"<div>{head}{picture}{told}</div>"


def transition_html(transition: Transition) -> str:
    """A transition's kind, steps and sentence as HTML."""
    badge = _BADGE.format(colour=KIND_STYLES[transition.kind].on_light)
    steps = f"{integer(transition.start)} → {integer(transition.end)}"
    remarks = f" <i>{escape(', '.join(transition.remarks))}</i>" if transition.remarks else ""
    return (
        f'<p><span style="{badge}">{escape(transition.kind.label)}</span> <b>{steps}</b>{remarks}<br>'
        f"{escape(printable(transition.sentence(), 1000))}</p>"
    )


def estimate_html(estimate: Estimate) -> str:
    """An estimate's value, error and verdict as HTML."""
    value = MISSING if estimate.health.failed else value_and_error(estimate.value, estimate.error)
    colour = "#b3261e" if estimate.health.failed else "#8a5a00" if estimate.health.doubtful else "#00745a"
    details = [
        f"{len(estimate.per_chain)} chains" if estimate.per_chain else "",
        f"R-hat {number(estimate.rhat)}" if np.isfinite(estimate.rhat) else "",
        f"{count(estimate.ess)} effective draws" if np.isfinite(estimate.ess) else "",
        f"nβ {estimate.nbeta:.4g}" if np.isfinite(estimate.nbeta) else "",
    ]
    return (
        f'<p>λ̂ = <b>{value}</b> <span style="{_BADGE.format(colour=colour)}">{escape(estimate.health.name)}</span> '
        f"{escape(estimate.health.value)}<br><small>{', '.join(filter(None, details))}</small></p>"
    )


def _signal(trajectory: Trajectory) -> str | None:
    """λ̂ if there is any, else the loss, else the first metric; None if there is nothing to draw."""
    metrics = dict.fromkeys(name for point in trajectory for name in point.metrics)
    for name in ("llc", "loss", *metrics):
        if len(trajectory) and len(trajectory.usable(name)):
            return name
    return None


def _picture(trajectory: Trajectory, transitions: Sequence[Transition], signal: str) -> str:
    """The picture as an image that is part of the page, on white so that it is legible on a dark one."""
    with requires("The picture of a trajectory"):
        from phasewatch.callbacks.figures.svg import svg_address
        from phasewatch.callbacks.figures.trajectory import draw_trajectory

    drawn = trajectory
    if len(trajectory) > MOST_DRAWN:
        chosen = np.linspace(0, len(trajectory) - 1, MOST_DRAWN).round().astype(int)
        drawn = Trajectory(trajectory[int(i)] for i in chosen)
    address = svg_address(draw_trajectory(drawn, transitions, signal=signal))
    return f'<img src="{address}" alt="The trajectory" style="width:100%;max-width:46rem;background:white">'
