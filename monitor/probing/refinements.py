"""A sound setting at the last snapshot, varied: whether another nβ or a weaker γ shows more of λ̂."""

import math
from dataclasses import replace

import numpy as np
import torch

from phasewatch.monitor.estimates.difference import difference
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.formatting import integer
from phasewatch.monitor.probing.attempts import Attempts
from phasewatch.monitor.probing.calibration import Trial
from phasewatch.monitor.probing.proposals import Proposals
from phasewatch.monitor.probing.trials import BIAS, USABLE, added_bias, percent, rounded, setting

STEEPER = 2.0
"""A lower nβ isn't taken where κ grows along its chains by more than this: the steps then add what λ̂ rises by."""

WEAKER = 10.0
"""By how much the localization is lowered, to see whether λ̂ rises by what it held back and no more. Where chains then
leave the surroundings and λ̂ has risen by more than `BIAS`, its square root is tried."""

WANDERED = 1.5
"""A weaker localization is not taken if the curvature that chains meet becomes so many times as large."""

WIDER = 10.0
"""By how much nβ and γ are lowered together to see whether λ̂ stays the same."""

LOWERED = 2
"""How often they are, at most."""

NARROWEST, NARROWER = 1e4, 10.0
"""By how much nβ and γ are raised together at most, and at least, to see whether λ̂ stays the same."""

ROUNDED = 0.01
"""The most that one rounding of the loss may come to with the larger nβ, as a share of λ̂: the snapshot's own loss is
rounded once for all draws."""

LONGEST = 1.7
"""A setting with a weaker localization may take so many times the steps of the first trial."""


def weaken(attempts: Attempts, proposals: Proposals, trial: Trial) -> Trial:
    """Lower the localization alone where it holds λ̂ back, if λ̂ then rises by what was held and no more.

    A weaker one that lets λ̂ rise by more has softer and softer directions to show, for which no chain is long
    enough.

    Args:
        attempts: what is spent.
        proposals: the settings that are tried.
        trial: a sound one.

    Returns:
        The last trial that is as sound; the given one where no other is.
    """
    doubt = 2.0  # of a first trial, a held share that isn't surely small is lowered too
    by = WEAKER
    while True:
        sampler, last = trial.sampler, trial.points[-1].llc
        held = last.checks.localization_bias
        if not abs(held) + doubt * last.checks.held_error > BIAS / 2 or last.health not in USABLE:
            return trial
        most = proposals.longest if proposals.gain > 1 else round(LONGEST * proposals.longest)
        weaker = attempts.attempt(
            "weaker γ",
            replace(
                sampler,
                localization=rounded(sampler.localization / by),
                burn_in=max(most, sampler.burn_in),
                draws=max(2 * most, sampler.draws),
            ),
            attempts.snapshots[-1:],
        )
        if weaker is None:
            attempts.reasons.append(
                f"γ holds about {percent(held)} of λ̂ back; the budget had no room for a weaker one."
            )
            return trial
        now = weaker.points[-1].llc
        rise = difference(now, last)
        attempts.reasons.append(
            f"γ holds about {percent(held)} of λ̂ back at step {integer(trial.points[-1].step)}; with "
            f"{setting(weaker.sampler)} it is {now.health.name}, and λ̂ changes by "
            f"{percent(rise.value, abs(last.value))}."
        )
        if now.health not in USABLE:
            return trial
        if now.checks.kappa > WANDERED * last.checks.kappa:
            attempts.reasons[-1] += " The chains go to where the curvature is much larger"
            if by == WEAKER and rise.value > BIAS * abs(last.value):
                attempts.reasons[-1] += ", so a γ between the two was tried."
                by = math.sqrt(WEAKER)
                continue
            attempts.reasons[-1] += ", so γ stays."
            return trial
        if rise.value - 2 * rise.error > (max(held, 0) + BIAS) * abs(last.value):
            attempts.reasons[-1] += " That is more than was held back, so γ stays: it decides which directions count."
            return trial
        trial, doubt = weaker, -2.0


def narrow(attempts: Attempts, trial: Trial) -> Trial:
    """Raise nβ and γ together at the last snapshot, on the same paths drawn narrower, if λ̂ rises by it.

    Chains that go far in directions along which the loss stays as it is come to where it is flatter in others, so that
    λ̂ is less than at the snapshot. Where minibatches are noisy, or the loss's rounding would count, nβ stays.

    Args:
        attempts: what is spent.
        trial: a sound one.

    Returns:
        The narrower trial if it is as sound and λ̂ is larger by it; else the given one.
    """
    sampler, last = trial.sampler, trial.points[-1].llc
    assert sampler.step_size is not None
    loss = attempts.probe.subject.loss
    rounding = torch.finfo(getattr(loss.loss, "autocast", loss.model.dtype)).eps * abs(trial.points[-1].loss)
    level, tiny = abs(last.value), torch.finfo(torch.float64).tiny
    by_rounding = ROUNDED * level / max(sampler.nbeta * rounding, tiny)
    by_noise = BIAS * level / max(last.checks.noise, tiny)  # what noise adds grows as nβ does on the same paths
    by = rounded(min(NARROWEST, by_rounding, by_noise))
    if by < NARROWER:
        return trial
    narrower = attempts.attempt(
        "narrower",
        replace(
            sampler,
            step_size=rounded(sampler.step_size / by),
            localization=rounded(sampler.localization * by),
            nbeta=rounded(sampler.nbeta * by),
        ),
        attempts.snapshots[-1:],
    )
    if narrower is None:
        return trial
    now = narrower.points[-1].llc
    rise, error = now.value - last.value, standard_error(np.subtract(now.per_chain, last.per_chain))
    step, change = integer(trial.points[-1].step), percent(rise, abs(last.value))
    attempts.reasons.append(
        f"With nβ and γ {by:g} times larger, λ̂ at step {step} is {now.health.name} and changes by {change}."
    )
    if not rise > max(BIAS / 2 * abs(last.value), error) or now.health not in USABLE or added_bias(narrower) > BIAS:
        return trial
    attempts.reasons[-1] += " So both were raised: further away the loss is flatter."
    return narrower


def widen(attempts: Attempts, proposals: Proposals, trial: Trial) -> Trial:
    """Lower nβ and γ together at the last snapshot, on the same paths drawn wider, as long as λ̂ rises by it.

    Where the loss is flat to second order, chains at a large nβ take too long to find out how far they can go.

    Args:
        attempts: what is spent.
        proposals: the settings that are tried.
        trial: a sound one.

    Returns:
        The last trial that is as sound; the given one where no other is.
    """
    for _ in range(LOWERED):
        sampler, last = trial.sampler, trial.points[-1].llc
        assert sampler.step_size is not None
        wider = attempts.attempt(
            "wider",
            replace(
                sampler,
                step_size=rounded(sampler.step_size * WIDER),
                localization=rounded(sampler.localization / WIDER),
                nbeta=rounded(sampler.nbeta / WIDER),
            ),
            attempts.snapshots[-1:],
        )
        if wider is None:
            break
        now = wider.points[-1].llc
        rise, error = now.value - last.value, standard_error(np.subtract(now.per_chain, last.per_chain))
        attempts.reasons.append(
            f"With nβ and γ {WIDER:g} times smaller, λ̂ at step {integer(trial.points[-1].step)} changes by "
            f"{percent(rise, abs(last.value))}."
        )
        flat = not rise - 2 * error > BIAS / 2 * abs(last.value)
        if now.checks.kappa > STEEPER * max(last.checks.kappa, proposals.kappa):
            attempts.reasons[-1] += " The loss is too steep there for steps that are so much longer."
            break
        if flat or not {now.health, last.health} <= USABLE - {Health.LOCALIZED}:
            break
        attempts.reasons[-1] += " So nβ was lowered."
        trial = wider
    return trial
