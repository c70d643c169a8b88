"""What the trials of a calibration show, in numbers and in words."""

import math

from phasewatch.monitor.estimates.difference import difference
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.formatting import MISSING, integer
from phasewatch.monitor.probing.calibration import Trial
from phasewatch.monitor.sampling.settings import Sampler

BIAS = 0.05
"""The most that the minibatches' noise and the length of the steps may add to λ̂, as a share of the largest λ̂, and that
the localization may hold back unless a weaker one takes chains that are too long."""


USABLE = {Health.OK, Health.LOCALIZED, Health.SHORT}
"""Verdicts of an estimate that nothing in the chains speaks against."""


def rounded(value: float) -> float:
    """A setting to two digits."""
    return float(f"{value:.2g}")


def percent(value: float, of: float = 1.0) -> str:
    """A share in percent, as text."""
    return f"{100 * value / of:.1f} %" if of and math.isfinite(value / of) else MISSING


def setting(sampler: Sampler) -> str:
    """What trials differ in, as text."""
    return f"ε {sampler.step_size:g}, γ {sampler.localization:g}, nβ {sampler.nbeta:g}"


def verdicts(trial: Trial, which: set[Health]) -> str:
    """Where a trial has one of these verdicts, in words; empty if nowhere."""
    found = [point for point in trial.points if point.llc.health in which]
    return " and ".join(f"{point.llc.health.name} at step {integer(point.step)}" for point in found)


def _levels(trial: Trial) -> dict[int, Estimate]:
    """The estimates with a level to speak of, by step."""
    return {point.step: point.llc for point in trial.points if point.llc.health.has_level}


def _scale(levels: dict[int, Estimate]) -> float:
    return max((abs(estimate.value) for estimate in levels.values()), default=math.nan)


def added_bias(trial: Trial) -> float:
    """What noise, and steps where the method feels their length, add to λ̂ at most, as a share of the largest."""
    levels = _levels(trial)
    added = [e.checks.noise + max(0.0, e.checks.overshoot) for e in levels.values()]
    return max(added, default=0.0) / (_scale(levels) or math.inf)


def largest_change(trial: Trial, other: Trial) -> tuple[float, float]:
    """The largest change of λ̂ between two trials as a share of the largest λ̂, and what of it isn't chance."""
    levels, others = _levels(trial), _levels(other)
    changes = [difference(others[step], levels[step]) for step in levels if step in others]
    scale = _scale(levels)
    largest = max((d.value / scale for d in changes), key=abs, default=0.0)
    return largest, max((max(abs(d.value) - 2 * d.error, 0.0) / scale for d in changes), default=0.0)
