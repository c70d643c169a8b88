"""What a calibration tried, what it chose, and why."""

from dataclasses import dataclass

from phasewatch.monitor.estimates.estimate import Estimate
from phasewatch.monitor.formatting import integer, value_and_error
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.trajectories.trajectory import Point


@dataclass(frozen=True)
class Trial:
    """A setting as it was tried.

    Attributes:
        name: what makes it different.
        sampler: the setting.
        points: what came out at the snapshots it was tried at, in order of step.
        cost: gradient evaluations that it took.
    """

    name: str
    sampler: Sampler
    points: tuple[Point, ...]
    cost: int


@dataclass(frozen=True)
class Calibration:
    """The setting chosen for a series, and why; `print` shows both.

    Attributes:
        sampler: the choice; None where no setting has a usable estimate at the last snapshot.
        trials: what was tried, in that order.
        reasons: sentences.
        curvatures: step to h, the largest curvature of the loss at that snapshot.
        spent: gradient evaluations that it took.
        budget: gradient evaluations that were allowed.
    """

    sampler: Sampler | None
    trials: tuple[Trial, ...]
    reasons: tuple[str, ...]
    curvatures: dict[int, float]
    spent: int
    budget: int

    @property
    def chosen(self) -> Trial | None:
        """The trial of the choice."""
        if self.sampler is None:
            return None
        return next(trial for trial in self.trials if trial.sampler == self.sampler)

    def __str__(self) -> str:
        rows = [["", "trial", "ε", "γ", "nβ", "chains × steps", *(f"step {integer(step)}" for step in self.curvatures)]]
        for trial in self.trials:
            found, sampler = {point.step: point.llc for point in trial.points}, trial.sampler
            rows.append(
                [
                    "*" if trial is self.chosen else "",
                    trial.name,
                    f"{sampler.step_size:g}",
                    f"{sampler.localization:g}",
                    f"{sampler.nbeta:g}",
                    f"{sampler.chains} × ({sampler.burn_in} + {sampler.draws})",
                    *(_cell(found[step]) if step in found else "" for step in self.curvatures),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += ["", *(f"- {reason}" for reason in self.reasons)]
        lines.append(f"- All of this took {integer(self.spent)} of {integer(self.budget)} gradient evaluations.")
        return "\n".join(lines if self.sampler is None else [*lines, "", str(self.sampler)])


def _cell(estimate: Estimate) -> str:
    verdict = estimate.health.name.lower()
    return verdict if estimate.health.failed else f"{value_and_error(estimate.value, estimate.error)} {verdict}"
