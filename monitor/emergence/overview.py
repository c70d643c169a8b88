"""All that can be said of a folder of logged samples, a run or a table: scores, verdict, forecast, reversal."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phasewatch.monitor.emergence.attribution import Attribution, attribute
from phasewatch.monitor.emergence.checks import check_log_p
from phasewatch.monitor.emergence.forecast import FEWEST, Forecast, forecast
from phasewatch.monitor.emergence.items import scores
from phasewatch.monitor.emergence.reading import holds_items, read_samples
from phasewatch.monitor.emergence.reversal import Reversal, reversal
from phasewatch.monitor.emergence.verdict import FEWEST as FEWEST_VERDICT
from phasewatch.monitor.emergence.verdict import Verdict, verdict
from phasewatch.monitor.emergence.watching import SCORES, chains, evenly, metric_reversal
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.formatting import integer, printable
from phasewatch.monitor.trajectories.coincide import coincide
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

_LOG_P = re.compile(r"(?<!neg_)(?<!negative_)log_?(p(_|$)|prob|lik)", re.IGNORECASE)
"""What the name of a log probability looks like; such a score is never above 0."""

ROWS = 12
"""The table shows at most this many steps, evenly chosen, the first and the last among them."""

LARGEST_SCORE = 1e12
"""Scores beyond either side are refused: the log p of a text of a gigabyte is about -1e9."""


@dataclass(frozen=True, eq=False)
class Overview:
    """What the scores of one task say.

    Attributes:
        steps: shape (step,).
        scores: each score's values by name, shape (step,), from the smoothest to the sharpest where they are a chain.
        sharp: the name of the sharp score.
        smooth: the name of the smooth score.
        verdict: whose the jump is; None with too few steps.
        forecast: None unless one was asked for.
        reversal: of the smooth score; None if it doesn't fall.
        attribution: None unless there are items.
        remarks: sentences about what was left out, and about the complexity's transitions beside the scores'.
    """

    steps: np.ndarray
    scores: Mapping[str, np.ndarray]
    sharp: str
    smooth: str
    verdict: Verdict | None
    forecast: Forecast | None
    reversal: Reversal | None
    attribution: Attribution | None
    remarks: Sequence[str]

    def __str__(self) -> str:
        names = list(self.scores)
        chosen = np.unique(np.linspace(0, len(self.steps) - 1, min(ROWS, len(self.steps))).round().astype(int))
        rows = [["step", *names]]
        rows += [[integer(int(self.steps[i])), *(f"{self.scores[name][i]:.4g}" for name in names)] for i in chosen]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        found: list[object] = [self.verdict, self.forecast, self.attribution]
        sentences = [str(one) for one in found if one is not None]
        if self.reversal is not None:
            flag = f"RED FLAG: {self.smooth} has turned." if self.reversal.is_sure else f"{self.smooth} may be turning."
            sentences.append(f"{flag} {self.reversal}")
        return "\n".join([*table, "", *sentences, *self.remarks])


def overview(
    path: str | Path,
    *,
    task: str | None = None,
    sharp: str | None = None,
    smooth: str | None = None,
    chance: float | None = None,
    at: Sequence[float] = (),
    step: str | None = None,
) -> Overview:
    """Look at one task's scores in all ways that the data allow.

    Args:
        path: a folder of logged samples or a table of items (see `read_samples`), a run's folder, or a table of scores
            with the column step.
        task: which of the folder's tasks.
        sharp: the sharp score's column or metric; "accuracy" for samples if not given.
        smooth: the smooth one's; "log_p" for samples if not given.
        chance: the sharp score of a guess; for samples by the number of choices if not given.
        at: steps to forecast.
        step: the column of a table that counts the steps, or the tokens; found by its name if not given.

    Returns:
        The table and its sentences.

    Raises:
        PhasewatchError: if it can't be read, or a score is missing.
    """
    path = Path(path)
    name = f"phasewatch emergence {printable(path)}"
    if not path.exists():
        raise PhasewatchError(f"{name}: there is no such folder or file; check the path.")
    if holds_items(path):
        return _of_samples(path, task, sharp or "accuracy", smooth or "log_p", chance, at)
    if sharp is None or smooth is None:
        raise PhasewatchError(f"{name}: a run or a table needs --sharp and --smooth, the names of two of its scores.")
    if chance is None:
        raise PhasewatchError(
            f"{name}: --chance isn't given. Pass the sharp score of a guess: 1 / the number of choices, or 0 for exact "
            "match."
        )
    trajectory = Trajectory.read(path, signal=sharp, step=step)
    known = np.isfinite(trajectory.signal(sharp)) & np.isfinite(trajectory.signal(smooth))
    values = {name: trajectory.signal(name)[known] for name in (smooth, sharp)}
    if _LOG_P.search(smooth):
        check_log_p(name, smooth, values[smooth])
    remarks = _beside_complexity(trajectory, smooth)
    if left_out := int((~known).sum()):
        remarks.append(f"{left_out} of {len(known)} steps lack one of the two scores and are left out.")
    return _overview(trajectory.steps[known].astype(float), values, sharp, smooth, chance, at, None, remarks)


def chain_overview(trajectory: Trajectory, name: str) -> Overview:
    """The chain of scores of one set of questions in a run, without a verdict, which needs the score of a guess.

    Args:
        trajectory: the run's points.
        name: of the questions, one of `chains(trajectory)`.

    Returns:
        The scores from log p to accuracy, at the points that have all of them; those that no point has are left out.
    """
    metrics = chains(trajectory)[name]
    chosen = [metrics[score] for score in SCORES if score != "log_p_per_token"]
    values = {metric: trajectory.signal(metric) for metric in chosen}
    values = {metric: score for metric, score in values.items() if np.isfinite(score).any()}
    known = evenly(np.flatnonzero(np.isfinite(list(values.values())).all(axis=0))) if values else np.empty(0, dtype=int)
    sharp, smooth = metrics["accuracy"], metrics["log_p"]
    remarks = [
        f"For a verdict and a forecast: phasewatch emergence RUN --sharp {sharp} --smooth {smooth} --chance CHANCE, "
        "with the score of a guess."
    ]
    if len(known) > 1:
        remarks = [*_beside_complexity(trajectory, smooth), *remarks]
    scores = {metric: score[known] for metric, score in values.items()}
    turned = metric_reversal(trajectory, smooth)
    return Overview(trajectory.steps[known].astype(float), scores, sharp, smooth, None, None, turned, None, remarks)


def _of_samples(
    folder: Path, task: str | None, sharp: str, smooth: str, chance: float | None, at: Sequence[float]
) -> Overview:
    items = read_samples(folder, task)
    chain = scores(items)
    values = {name: curve.value for name, curve in chain.curves().items()}
    for name in (sharp, smooth):
        if name not in values:
            raise PhasewatchError(
                f"phasewatch emergence {printable(folder)}: there is no score {name!r}, but {', '.join(values)}."
            )
    told = attribute(items) if len(items.x) > 2 and not (np.asarray(items.correct) >= 1).all() else None
    chance = chain.chance if chance is None else chance
    return _overview(items.x, values, sharp, smooth, chance, at, told, [str(items)])


def _overview(
    steps: np.ndarray,
    values: Mapping[str, np.ndarray],
    sharp: str,
    smooth: str,
    chance: float | None,
    at: Sequence[float],
    told: Attribution | None,
    remarks: Sequence[str],
) -> Overview:
    remarks = list(remarks)
    for name in (sharp, smooth):
        if (abs(values[name]) > LARGEST_SCORE).any():
            raise PhasewatchError(f"The score {name} goes beyond {LARGEST_SCORE:g}, and no score does; correct it.")
    judged = later = None
    if len(steps) >= FEWEST_VERDICT:
        judged = verdict(steps, values[sharp], values[smooth], chance=chance)
    else:
        remarks.append(f"A verdict takes at least {FEWEST_VERDICT} steps, and there {_are(len(steps))}.")
    if at and len(steps) < FEWEST:
        raise PhasewatchError(f"--at: a forecast takes at least {FEWEST} steps, and there {_are(len(steps))}.")
    if at:
        later = forecast(steps, values[sharp], values[smooth], at=list(at), chance=chance)
    rises = values[smooth] if _goes_with(values[smooth], values[sharp]) else -values[smooth]
    turned = reversal(steps, rises) if len(steps) > 1 else None
    return Overview(steps, values, sharp, smooth, judged, later, turned, told, remarks)


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count}"


def _goes_with(smooth: np.ndarray, sharp: np.ndarray) -> bool:
    """Whether more of the smooth score is better: it is never positive, as a log p, or rises with the sharp one."""
    if (smooth <= 0).all():
        return True
    return float(np.sum((smooth - smooth.mean()) * (sharp - sharp.mean()))) >= 0


def _beside_complexity(trajectory: Trajectory, smooth: str) -> list[str]:
    """Where the complexity's transitions lie beside those of the smooth score, in sentences."""
    if not np.isfinite(trajectory.llc).any() or smooth == "llc":
        return []
    complexity, score = find_transitions(trajectory), find_transitions(trajectory, signal=smooth)
    if not complexity and not score:
        return ["Neither the complexity λ̂ nor the smooth score has a transition."]
    return [str(coincide(complexity, score))]
