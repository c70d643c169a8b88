"""Which metrics of a run score questions or watched behaviours, and which of those log-likelihoods have turned."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from phasewatch.monitor.emergence.reversal import Reversal, reversal
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.trajectories.pace import Pace
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory

SCORES = ("log_p", "log_p_per_token", "p", "p_among_choices", "brier", "accuracy")
"""The chain of scores, from the smoothest to the sharpest; each is a metric `<name>_<score>`."""

WATCHED = "watch_"
"""What the name of a watched behaviour's metric, its log p, begins with."""

MOST_POINTS = 1000
"""Of a longer run, so many points are looked at, evenly spaced: with all of them the time grows with their square."""


@dataclass(frozen=True)
class RedFlag:
    """A log-likelihood that has turned after a rise.

    Attributes:
        metric: its name in the run.
        reversal: where it turned, and when that was known.
    """

    metric: str
    reversal: Reversal

    @property
    def title(self) -> str:
        """What turned, in a few words."""
        return f"{printable(self.metric, 60)} has turned"

    def __str__(self) -> str:
        return f"RED FLAG: {self.title}. {self.reversal}"


class NewRedFlags:
    """Tells of each metric once that it has turned, as a run goes on and after it was resumed."""

    def __init__(self) -> None:
        self._told: set[str] | None = None
        self._points = self._seen = 0
        self._pace = Pace()

    def after(self, point: Point, trajectory: Callable[[], Trajectory]) -> list[RedFlag]:
        """The new red flags after one more point; in a run of more than 200 points, looked for after 1 % more.

        Args:
            point: the point.
            trajectory: returns the points so far.

        Returns:
            One for each metric that had none before.
        """
        self._points += 1
        if not point.metrics or not self._pace.is_due(self._points):
            return []
        found = trajectory()
        if len(found) == self._seen:  # points of a resumed run, told again
            return []
        self._seen = len(found)
        return self.among(found, point.step)

    def among(self, trajectory: Trajectory, newest: int | None = None) -> list[RedFlag]:
        """The red flags of metrics that had none at an earlier call, nor before the first call's newest point.

        Args:
            trajectory: the points so far.
            newest: the step of the point that is new. Those before the first newest one are of an earlier session;
                without any, no point is of this one.

        Returns:
            One for each such metric.
        """
        if self._told is None:
            if newest is None:
                return []
            earlier = trajectory[: int(np.searchsorted(trajectory.steps, newest))]
            self._told = {flag.metric for flag in red_flags(earlier)}
        flags = red_flags(trajectory, leave_out=self._told)
        self._told.update(flag.metric for flag in flags)
        return flags


def score_metrics(name: str) -> dict[str, str]:
    """The metric of each score of the questions called `name`."""
    return {score: f"{name}_{score}" for score in SCORES}


def watch_metric(behaviour: str) -> str:
    """The metric of a watched behaviour."""
    return WATCHED + behaviour


def chains(trajectory: Trajectory) -> dict[str, dict[str, str]]:
    """The chains of scores in a run.

    Args:
        trajectory: the run's points.

    Returns:
        For each name of questions, the metric of each score.
    """
    there = _metrics(trajectory)
    smoothest = f"_{SCORES[0]}"
    names = [metric.removesuffix(smoothest) for metric in there if metric.endswith(smoothest)]
    candidates = {name: score_metrics(name) for name in names}
    return {name: found for name, found in candidates.items() if all(metric in there for metric in found.values())}


def watched(trajectory: Trajectory) -> list[str]:
    """The metrics that are a log-likelihood to watch: of each watched behaviour, and of each chain's right answers.

    Args:
        trajectory: the run's points.

    Returns:
        Their names.

    >>> import phasewatch as pw
    >>> metrics = {"watch_greeting": [-3.0, -2.0], "accuracy": [0.1, 0.2]}
    >>> watched(pw.Trajectory.from_values([1, 10], loss=[3.0, 2.0], llc=[1.0, 2.0], metrics=metrics))
    ['watch_greeting']
    """
    found = chains(trajectory)
    of_chains = {metric for chain in found.values() for metric in chain.values()}
    behaviours = [name for name in _metrics(trajectory) if name.startswith(WATCHED) and name not in of_chains]
    return [*(chain[SCORES[0]] for chain in found.values()), *behaviours]


def red_flags(trajectory: Trajectory, *, leave_out: set[str] | frozenset[str] = frozenset()) -> list[RedFlag]:
    """The watched log-likelihoods that have turned.

    Args:
        trajectory: the run's points.
        leave_out: metrics that aren't looked at.

    Returns:
        One for each metric whose alarm rings, and is sure, at the last point; see `reversal`.

    >>> import numpy as np
    >>> import phasewatch as pw
    >>> step = np.arange(1, 41) * 1000
    >>> log_p = -4 + np.log(step / 1000) / 2 + 0.02 * np.random.default_rng(0).normal(size=40)
    >>> log_p -= 0.03 * np.maximum(np.arange(40) - 25, 0)
    >>> run = pw.Trajectory.from_values(step, loss=np.ones(40), llc=np.ones(40), metrics={"watch_greeting": log_p})
    >>> [flag] = red_flags(run)
    >>> flag.title
    'watch_greeting has turned'
    """
    flags = []
    for metric in watched(trajectory):
        if metric in leave_out:
            continue
        found = metric_reversal(trajectory, metric)
        if found is not None and found.is_sure:
            flags.append(RedFlag(metric, found))
    return flags


def metric_reversal(trajectory: Trajectory, metric: str) -> Reversal | None:
    """The reversal of one metric, from the points that have it; None if there is none.

    Args:
        trajectory: the run's points.
        metric: its name.

    Returns:
        The reversal, or None.
    """
    values = trajectory.signal(metric)
    known = evenly(np.flatnonzero(np.isfinite(values)))
    return reversal(trajectory.steps[known], values[known]) if len(known) > 1 else None


def evenly(indices: np.ndarray) -> np.ndarray:
    """At most `MOST_POINTS` of the indices, evenly spaced, the first and the last among them."""
    if len(indices) <= MOST_POINTS:
        return indices
    return indices[np.linspace(0, len(indices) - 1, MOST_POINTS).round().astype(int)]


def _metrics(trajectory: Trajectory) -> dict[str, None]:
    return dict.fromkeys(metric for point in trajectory for metric in point.metrics)
