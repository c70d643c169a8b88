"""The search of a calibration: from trial to trial by what the verdicts say, then the length of the chains."""

import math
from dataclasses import replace

from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.formatting import integer, number
from phasewatch.monitor.probing.attempts import Attempts
from phasewatch.monitor.probing.calibration import Trial
from phasewatch.monitor.probing.lengths import of_chains, of_length
from phasewatch.monitor.probing.proposals import SETTLING, Proposals
from phasewatch.monitor.probing.refinements import narrow, weaken, widen
from phasewatch.monitor.probing.survey import LEAST_NBETA, lowered_for_noise, survey
from phasewatch.monitor.probing.trials import (
    BIAS,
    USABLE,
    added_bias,
    largest_change,
    percent,
    rounded,
    setting,
    verdicts,
)
from phasewatch.monitor.sampling.settings import Langevin, Sampler
from phasewatch.monitor.sampling.start import LARGE

MINIBATCH_MOMENTUM = 0.9
"""Share of the velocity that is kept with minibatches, unless the probe's sampler gives one. Soft directions settle 19
times sooner by it, for 19 times the noise; what is too much is taken back (experiments/cost_of_a_point.py)."""

LEAST_KAPPA = 0.4
"""Shorten steps against noise down to this κ; below it, lower nβ instead, which takes no more steps."""

FLAT = 0.05
"""Take smaller steps if twice the step size changes λ̂ by more than this share of the largest λ̂."""

ERROR, ERROR_OF_A_CURVE = 0.03, 0.02
"""Standard error of λ̂ to aim for where none is asked for, as a share of it."""

SHARE, MOST_OF_BUDGET = 1 / 7, 1 / 4
"""The share of the budget that the first trial may take, and a point of the only snapshot at most."""

POINT, MOST = 500, 2000
"""Gradient evaluations that a point of a curve takes in the first trial, and at most unless an error is asked for."""

_AT_NO_MINIMUM = {Health.NEGATIVE, Health.OFF_MINIMUM}
_TOO_LONG = {Health.DIVERGED, Health.OVERSTEPPING}
_UNSETTLED = {Health.DRIFTING, Health.CREEPING, Health.UNMIXED}


class Search:
    """From a survey of the snapshots to a setting.

    Args:
        attempts: what is spent, and where trials and reasons are kept.
        kind: the sampler whose class, batch size and momentum are kept.
    """

    def __init__(self, attempts: Attempts, kind: Sampler) -> None:
        self._attempts, self._reasons = attempts, attempts.reasons
        self._doubted: set[Sampler] = set()
        self._too_short = 0.0
        snapshots = attempts.snapshots
        self._of_a_curve = len(snapshots) > 1
        allowed = SHARE * attempts.budget / len(snapshots)
        plain = Proposals(kind, self._of_a_curve, min(allowed, POINT) if self._of_a_curve else allowed)
        self.curvatures, nbeta = survey(attempts, plain)
        self._nbeta = lowered_for_noise(nbeta, attempts, plain, max(self.curvatures))
        self._chooses_momentum = (
            isinstance(kind, Langevin)
            and kind.momentum is None
            and kind.batch_size is not None
            and attempts.probe.subject.model.size < LARGE  # velocities take as much memory as the weights
        )
        self._proposals = plain.keeping(MINIBATCH_MOMENTUM) if self._chooses_momentum else plain
        if len(snapshots) * self._proposals.most(self._proposals.shortest) > attempts.left:
            self._proposals = plain

    def choose(self, error: float | None) -> Trial | None:
        """The best setting within the budget, None if none is usable at the last snapshot.

        Args:
            error: as `calibrate`'s.
        """
        best = self._follow_verdicts()
        if best is None:
            return None
        if self._of_a_curve:
            best = widen(self._attempts, self._proposals, best)
        else:
            narrower = narrow(self._attempts, best)
            best = narrower if narrower is not best else widen(self._attempts, self._proposals, best)
            best = weaken(self._attempts, self._proposals, best)  # it takes longer chains to settle, point for point
        room = self._attempts.left // len(self._attempts.snapshots)
        if self._of_a_curve and error is None:
            room = min(room, MOST)
        if self._of_a_curve or error is not None:
            error = error or ERROR_OF_A_CURVE
            chosen = self._measured(best, of_length(best, room, error))
        else:
            error = ERROR
            chosen = self._measured(best, of_chains(best, min(room, MOST_OF_BUDGET * self._attempts.budget), error))
        self._explain(chosen, error)
        return chosen

    def _measured(self, trial: Trial, sampler: Sampler) -> Trial:
        """The trial's setting with other chains, measured at all snapshots, or the trial where that is worse.

        Chains that are too short to be sound may be sound halfway to the trial's length.
        """
        if sampler == trial.sampler and len(trial.points) == len(self._attempts.snapshots):
            return trial
        lengths = [sampler]
        if sampler.draws < trial.sampler.draws:
            lengths.append(replace(trial.sampler, draws=(sampler.draws + trial.sampler.draws) // 2))
        for wanted in lengths:
            name = f"{wanted.chains} chains of {wanted.burn_in + wanted.draws}"
            found = self._attempts.attempt(name, wanted)
            if found is not None and self._flaws(found) <= self._flaws(trial):
                return found
            self._reasons.append(
                f"The budget had no room for {name}."
                if found is None
                else f"With {name} steps there was more to doubt."
            )
        return trial

    def _follow_verdicts(self) -> Trial | None:
        """From trial to trial until one is sound and flat, or the budget is spent; the best of them."""
        trial, judged = self._attempts.attempt("first", self._first()), []
        while trial is not None:
            judged.append(trial)
            move = self._move(trial)
            if move is None or any(move[1] == other.sampler for other in self._attempts.trials):
                break
            trial = self._attempts.attempt(*move)
            if trial is None:
                self._reasons.append(f"The budget had no room for {setting(move[1])}.")
        best = min(reversed(judged), key=self._flaws)  # the latest of the best
        return None if self._flaws(best)[0] else best

    def _first(self) -> Sampler:
        return self._proposals.first(self._nbeta, max(self.curvatures))

    def _flaws(self, trial: Trial) -> tuple[bool, int, bool]:
        """Smaller is better: of no use at the last snapshot, doubts that could be mended, noisy or not flat."""
        *early, last = (point.llc.health for point in trial.points)
        flawed = sum(health not in USABLE | _AT_NO_MINIMUM for health in early) + (last not in USABLE)
        useless = last not in USABLE | {Health.OFF_MINIMUM}
        return useless, flawed, trial.sampler in self._doubted

    def _move(self, trial: Trial) -> tuple[str, Sampler] | None:
        """What the verdicts of a trial say to try next; None if it is sound, and flat with twice the step size."""
        sampler, last = trial.sampler, trial.points[-1]
        assert sampler.step_size is not None
        eps, gamma, nbeta = sampler.step_size, sampler.localization, sampler.nbeta
        half = "half the step", self._proposals.settled(eps / 2, gamma, nbeta)
        if bad := verdicts(trial, _TOO_LONG):
            self._reasons.append(f"{setting(sampler)}: {bad}, so the next steps were shorter.")
            if eps < 16 * self._too_short or not self._too_short:
                return half
            between = math.sqrt(eps * self._too_short)
            return "in between", self._proposals.settled(
                between, self._proposals.weakest(between, self._proposals.longest), nbeta
            )
        bias, kappa = added_bias(trial), eps * (nbeta * max(self.curvatures) + gamma)
        met = [point.llc.checks.kappa for point in trial.points]
        if max(met) < kappa / 4:
            self.curvatures = [point.llc.checks.curvature for point in trial.points]
            if max(self.curvatures) > 0:
                self._too_short = eps
                self._reasons.append(f"{setting(sampler)}: the chains met much less curvature than there seemed to be.")
                return "longer steps", self._first()
        if bias > BIAS:
            self._doubted.add(sampler)
            self._reasons.append(
                f"{setting(sampler)}: the minibatches' noise and the length of the steps add {percent(bias)} to λ̂."
            )
            return self._less_noise(sampler, kappa, max(0.75 * BIAS / bias, 1 / 16))
        if last.llc.health in _AT_NO_MINIMUM and nbeta > LEAST_NBETA:
            self._reasons.append(f"{setting(sampler)}: {verdicts(trial, {last.llc.health})}, so nβ was lowered.")
            return "nβ / 4", self._proposals.settled(eps * 4, gamma / 4, nbeta / 4)
        if last.llc.health is Health.NEGATIVE:
            return None
        if bad := verdicts(trial, _UNSETTLED):
            self._reasons.append(f"{setting(sampler)}: {bad}, so the localization was raised.")
            return "twice γ", replace(sampler, localization=rounded(2 * gamma))
        twice = replace(sampler, step_size=rounded(2 * eps))
        double = next((t for t in self._attempts.trials if t.sampler == twice), None)
        double = double or self._attempts.attempt("twice the step", twice)
        if double is None:
            self._reasons.append("There was no room in the budget to try twice the step size.")
            return None
        if bad := verdicts(double, _TOO_LONG):
            self._doubted.add(sampler)
            self._reasons.append(
                f"{setting(twice)}: {bad}, so half of that leaves no margin, and the next was half again."
            )
            return half
        change, sure = largest_change(trial, double)
        self._reasons.append(f"{setting(sampler)}: with twice the step size, λ̂ changes by {percent(change)}.")
        if sure > FLAT:
            self._doubted.add(sampler)
            self._reasons[-1] += " That isn't flat."
            if bias < BIAS / 5:
                return half
            return self._less_noise(sampler, kappa, min(0.5, max(0.6 * FLAT / sure, 0.25)))
        return None

    def _less_noise(self, sampler: Sampler, kappa: float, share: float) -> tuple[str, Sampler]:
        """Less momentum, then shorter steps, and where they would take too many a lower nβ.

        The noise goes with κ·nβ·(1 + a)/(1 − a), a the momentum, with which soft directions settle as with κ.
        """
        assert sampler.step_size is not None
        if self._chooses_momentum and self._proposals.gain > 1:
            gain = max(self._proposals.gain * share, 1.0)
            share *= self._proposals.gain / gain
            self._proposals = self._proposals.keeping((gain - 1) / (gain + 1))
            if share > 0.9:
                return "less momentum", self._proposals.settled(sampler.step_size, sampler.localization, sampler.nbeta)
        shorter = max(share, min(LEAST_KAPPA / kappa, 1.0))
        lower = share / shorter
        name = " and ".join(["shorter steps"] * (shorter < 1) + ["lower nβ"] * (lower < 1))
        return name, self._proposals.settled(
            sampler.step_size * shorter / lower, sampler.localization * lower, sampler.nbeta * lower
        )

    def _explain(self, trial: Trial, error: float) -> None:
        sampler, last = trial.sampler, trial.points[-1]
        assert sampler.step_size is not None
        sharpest = max(range(len(self._attempts.snapshots)), key=lambda i: self.curvatures[i])
        stiff = max(trial.points, key=lambda point: point.llc.checks.kappa)
        cost = trial.cost // len(trial.points)
        self._reasons += [
            f"The sharpest snapshot is that of step {integer(self._attempts.snapshots[sharpest].step)}, with curvature "
            f"{number(self.curvatures[sharpest])}. κ = ε·(nβ·h + γ) reaches {stiff.llc.checks.kappa:.2f} along the "
            "chains, where 4 is unstable.",
            self._horizon(sampler),
            f"The minibatches' noise and the length of the steps add about {percent(added_bias(trial))} to λ̂.",
            f"The standard error at step {integer(last.step)} is {percent(last.llc.error, abs(last.llc.value))} of λ̂, "
            f"where at most {percent(error)} was asked for. A point costs {integer(cost)} gradient evaluations.",
        ]
        known = [point.llc.checks for point in trial.points if not math.isnan(point.llc.checks.short)]
        short = max(known, key=lambda checks: checks.short, default=None)
        if short:
            self._reasons.append(
                f"By what they remember, chains of this length lack about {percent(short.short)} ± "
                f"{percent(short.short_error)} of λ̂."
            )
        for health in dict.fromkeys(point.llc.health for point in trial.points):
            if health is not Health.OK:
                self._reasons.append(f"What remains is {verdicts(trial, {health})}. {health.value}")

    def _horizon(self, sampler: Sampler) -> str:
        """Which directions chains of this length see."""
        settling = self._proposals.relaxations(sampler)
        if settling >= 0.9 * SETTLING:
            return (
                f"γ is such that chains of this length settle: the burn-in is {settling:.1f} times what the softest "
                "directions take to forget where they started. A weaker one sees softer directions, and takes longer "
                "chains and a larger budget."
            )
        softest = sampler.localization * (SETTLING / settling - 1) / sampler.nbeta if settling else math.inf
        share = softest / max(self.curvatures)
        return (
            f"The horizon of chains of this length is a curvature of {number(softest)}, {share:.1g} of the largest: "
            "stiffer directions settle in the burn-in, and softer ones count in part."
        )
