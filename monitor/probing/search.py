"""The search of a calibration: from trial to trial within a budget, by what the verdicts say to try next."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.difference import difference
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.formatting import integer, number
from phasewatch.monitor.probing.calibration import Trial
from phasewatch.monitor.probing.lengths import FEWEST_DRAWS, cheapest, student
from phasewatch.monitor.probing.probe import Probe, measure_whole
from phasewatch.monitor.probing.trials import added_bias, largest_change, percent, rounded, setting, verdicts
from phasewatch.monitor.sampling.chains import gradients_of_a_point
from phasewatch.monitor.sampling.settings import Langevin, Sampler
from phasewatch.monitor.sampling.start import LARGE
from phasewatch.monitor.snapshots.snapshot import Snapshot

KAPPA = 1.0
"""Start from κ = ε·(nβ·h + γ) = 1, h the largest curvature at any snapshot: a quarter of what is unstable."""

KAPPA_WITH_MOMENTUM = 0.5
"""The same for chains that keep momentum, which run on to where the curvature is larger."""

MINIBATCH_MOMENTUM = 0.9
"""Share of the velocity that is kept with minibatches, unless the probe's sampler gives one. Soft directions settle 19
times sooner by it, for 19 times the noise; what is too much is taken back (experiments/cost_of_a_point.py)."""

LEAST_KAPPA = 0.4
"""Shorten steps against noise down to this κ; below it, lower nβ instead, which takes no more steps."""

NBETA = 1e4
"""nβ to start from: at a minimum, the larger it is, the less the localization and the minimum's surroundings count.
Noise and slope ask for less."""

NBETA_OF_A_CURVE = 100.0
"""Snapshots before the last one that aren't at a minimum lower nβ to this: the larger it is, the more of their λ̂ is
descent, which would hide the stages."""

LEAST_NBETA = 10.0
"""Where the last snapshot is not at a minimum, nβ may drop to this."""

DESCENT = 0.5
"""nβ to start from is such that the steepest direction falls at most so many nats at all snapshots but the first."""

ALL_OF_THE_DATA = 2**24
"""Take all of the data at each step, in place of minibatches, where samples × parameters are no more than this: there
a step costs little more, and without their noise chains keep momentum, and reach softer directions."""

OF_A_MINIBATCH, TIMES = 2**22, 8
"""Minibatches are made so large that samples × parameters come to this, up to so many times the probe's own batch
size: their noise is what momentum multiplies."""

SETTLING = 2.0
"""The burn-in in units of the relaxation time of the softest directions, 1/(ε·γ) steps without momentum."""

STEEPER = 2.0
"""A lower nβ isn't taken where κ grows along its chains by more than this: the steps then add what λ̂ rises by."""

WEAKER = 10.0
"""By how much the localization is lowered, to see whether λ̂ rises by what it held back and no more."""

WANDERED = 1.5
"""A weaker localization is not taken if the curvature that chains meet becomes so many times as large."""

WIDER = 10.0
"""By how much nβ and γ are lowered together to see whether λ̂ stays the same."""

LOWERED = 2
"""How often they are, at most."""

LONGEST = 1.7
"""A setting with a weaker localization may take so many times the steps of the first trial."""

FLAT = 0.05
"""Take smaller steps if twice the step size changes λ̂ by more than this share of the largest λ̂."""

ERROR, ERROR_OF_A_CURVE = 0.03, 0.02
"""Standard error of λ̂ to aim for where none is asked for, as a share of it."""

BIAS = 0.05
"""The most that the minibatches' noise and the length of the steps may add to λ̂, as a share of the largest λ̂."""

SHARE = 1 / 7
"""The share of the budget that the first trial may take."""

POINT, MOST = 500, 2000
"""Gradient evaluations that a point of a curve takes in the first trial, and at most unless an error is asked for."""

CHAINS = 4, 6, 8, 10, 12, 16
"""Numbers of chains to choose from; trials have the fewest."""

CHAINS_OF_A_CURVE = 6
"""Chains of the trials for a curve: fewer make the error less certain, and more burn in for longer."""

LENGTHENED = 4
"""The draws of a chain for an error are at most so many times the trial's, whose chains say how well they are known."""

DRAWS, DRAWS_OF_A_CURVE = 2.0, 2.5
"""Draws of a trial's chain over its burn-in."""

PILOTS = 4
"""Chains of `LEAST_BURN_IN` steps at the last snapshot that nβ is lowered by, where their noise is too large."""

LEAST_BURN_IN = 10
"""Steps of burn-in below which a trial is too short to judge."""

_USABLE = {Health.OK, Health.LOCALIZED}
_AT_NO_MINIMUM = {Health.NEGATIVE, Health.OFF_MINIMUM}
_TOO_LONG = {Health.DIVERGED, Health.OVERSTEPPING}
_UNSETTLED = {Health.DRIFTING, Health.CREEPING, Health.UNMIXED}


class Search:
    """Trials within a budget, and the sentences that explain them."""

    def __init__(self, snapshots: list[Snapshot], probe: Probe, budget: int) -> None:
        self.snapshots = snapshots
        self.probe = probe
        self.left = budget
        self.trials: list[Trial] = []
        self.reasons: list[str] = []
        self._doubted: set[Sampler] = set()
        self._is_curve = len(snapshots) > 1
        given = probe.sampler
        self._chooses_momentum = isinstance(given, Langevin) and given.momentum is None and given.batch_size is not None
        self._chooses_momentum &= probe.subject.model.size < LARGE  # velocities take as much memory as the weights
        self._budget = budget
        self._take(
            probe.sampler if probe.sampler.target_kappa is None else replace(probe.sampler, kappa=None)  # pyright: ignore[reportCallIssue]
        )
        self._too_short = 0.0
        self.curvatures, descents = self._survey(budget)
        of_curve = min((NBETA * DESCENT / max(DESCENT, descent) for descent in descents[1:-1]), default=NBETA)
        of_last = max(NBETA * DESCENT / max(DESCENT, descents[-1]), LEAST_NBETA)
        self._nbeta = min(max(of_curve, NBETA_OF_A_CURVE), of_last)
        self._lower_nbeta_for_noise()
        if self._chooses_momentum:
            plain = self._kind
            self._take(replace(self._kind, momentum=MINIBATCH_MOMENTUM))  # pyright: ignore[reportCallIssue]
            if len(self.snapshots) * self._most(self._least) > self.left:
                self._take(plain)

    def _take(self, kind: Sampler) -> None:
        """Have trials differ from this sampler in step size, γ, nβ, and the chains' number and length alone."""
        kept = kind.velocity_kept or 0.0
        self._kind, self._gain = kind, kind.noise_gain
        self._kappa = KAPPA_WITH_MOMENTUM if kept else KAPPA
        self._least = max(LEAST_BURN_IN, math.ceil(SETTLING / -math.log(kept)) if kept else 0)
        self._longest = self._longest_burn_in()

    def choose(self, error: float | None) -> Trial | None:
        """The best setting within the budget, None if none is usable at the last snapshot.

        Args:
            error: as `calibrate`'s.
        """
        best = self._follow_verdicts()
        if best is None:
            return None
        if not self._is_curve:  # a weaker γ takes longer chains to settle, point for point
            best = self._weaken(best)
        best = self._vary_nbeta(best)
        most = MOST if self._is_curve and error is None else math.inf
        shorter = self._is_curve or error is not None
        error = error or (ERROR_OF_A_CURVE if self._is_curve else ERROR)
        chosen = self._of_length(best, error, most, shorter=shorter)
        self._explain(chosen, error)
        return chosen

    def _survey(self, budget: int) -> tuple[list[float], list[float]]:
        """The curvature at each snapshot, and its descent at `NBETA`, by chains too short to move."""
        still = replace(self._with(1e-12, 0.0, NBETA, 0), draws=4)
        cost = len(self.snapshots) * gradients_of_a_point(still, self._minibatches(still))
        least = cost + len(self.snapshots) * self._most(self._least)
        if budget < least:
            raise PhasewatchError(
                f"calibrate(budget={budget}) is too small: a look around {len(self.snapshots)} snapshots and one short "
                f"trial take {integer(least)} gradient evaluations."
            )
        found, descents = [], []
        for snapshot in self.snapshots:
            point = measure_whole(self.probe, snapshot, still)
            curvature = point.llc.checks.curvature
            if not math.isfinite(curvature):
                raise PhasewatchError(
                    f"calibrate(...): the loss or its gradient is not finite around the snapshot of step "
                    f"{integer(point.step)}. Give snapshots from before training diverged."
                )
            found.append(curvature)
            descents.append(point.llc.checks.descent - point.llc.checks.descent_error)
        if max(found) == 0:
            raise PhasewatchError(
                "calibrate(...): the loss is flat around all of the snapshots, so nothing sets the length of a step. "
                "Check that it depends on the weights that are sampled."
            )
        self.left -= cost
        return found, descents

    def _lower_nbeta_for_noise(self) -> None:
        """Lower nβ where short chains at the last snapshot say that noise would add too much to λ̂."""
        for _ in range(PILOTS):
            eps = self._kappa / (self._nbeta * max(self.curvatures))
            sampler = self._with(eps, 0.0, self._nbeta, self._least)
            cost = gradients_of_a_point(sampler, self._minibatches(sampler))
            if cost > min(self.left / 4, self.left - len(self.snapshots) * self._most(self._least)):
                return
            self.left -= cost
            llc = measure_whole(self.probe, self.snapshots[-1], sampler).llc
            if llc.health.failed and self._nbeta > LEAST_NBETA:
                self._nbeta = max(self._nbeta / 16, LEAST_NBETA)
                continue
            noise = llc.checks.noise
            bias = noise / max(llc.value - noise, noise) if noise > 0 else 0.0
            if not bias > BIAS or self._nbeta == LEAST_NBETA:
                return
            self._nbeta = max(self._nbeta * max(BIAS / 2 / bias, 1 / 16), LEAST_NBETA)

    def _minibatches(self, sampler: Sampler) -> int:
        """How many are kept for a setting."""
        with self.probe.subject.measuring():
            return len(self.probe.subject.kept(sampler))

    def _most(self, burn_in: int) -> int:
        """What a point with this burn-in takes, however many minibatches are kept."""
        sampler = self._with(1.0, 0.0, 1.0, burn_in)
        return gradients_of_a_point(sampler, sampler.chains * (sampler.burn_in + sampler.draws))

    def _longest_burn_in(self) -> int:
        allowed, burn_in = SHARE * self._budget / len(self.snapshots), self._least
        if self._is_curve:
            allowed = min(allowed, POINT)
        while self._most(burn_in + 1) <= allowed:
            burn_in += 1
        return burn_in

    def _with(self, eps: float, gamma: float, nbeta: float, burn_in: int) -> Sampler:
        return replace(
            self._kind,
            step_size=rounded(eps),
            localization=rounded(gamma),
            nbeta=rounded(nbeta),
            chains=CHAINS_OF_A_CURVE if self._is_curve else CHAINS[0],
            burn_in=burn_in,
            draws=max(math.ceil((DRAWS_OF_A_CURVE if self._is_curve else DRAWS) * burn_in), 4),
        )

    def _sampler(self, eps: float, gamma: float, nbeta: float) -> Sampler:
        """Of a length to settle in, twice the first trial's at most; γ is raised where that isn't enough."""
        burn_in = max(self._least, min(round(SETTLING / (eps * gamma * self._gain)), 2 * self._longest))
        return self._with(eps, max(gamma, 0.9 * self._gamma(eps, burn_in)), nbeta, burn_in)

    def _gamma(self, eps: float, burn_in: int) -> float:
        """The localization that settles in a burn-in."""
        return SETTLING / (eps * burn_in * self._gain)

    def _at_kappa(self) -> Sampler:
        """The first trial's: κ as it should be at the sharpest snapshot, and γ such that chains settle."""
        eps = (self._kappa - self._gamma(1.0, self._longest)) / (self._nbeta * max(self.curvatures))
        return self._sampler(eps, self._gamma(eps, self._longest), self._nbeta)

    def _try(self, name: str, sampler: Sampler, snapshots: Sequence[Snapshot]) -> Trial | None:
        """Measure with a setting, if the budget allows it."""
        if len(snapshots) * gradients_of_a_point(sampler, 1) > self.left:
            return None
        cost = len(snapshots) * gradients_of_a_point(sampler, self._minibatches(sampler))
        if cost > self.left:
            return None
        self.left -= cost
        trial = Trial(
            name, sampler, tuple(measure_whole(self.probe, snapshot, sampler) for snapshot in snapshots), cost
        )
        self.trials.append(trial)
        return trial

    def _follow_verdicts(self) -> Trial | None:
        """From trial to trial until one is sound and flat, or the budget is spent; the best of them."""
        trial, judged = self._try("first", self._at_kappa(), self.snapshots), []
        while trial is not None:
            judged.append(trial)
            move = self._move(trial)
            if move is None or any(move[1] == other.sampler for other in self.trials):
                break
            trial = self._try(*move, self.snapshots)
            if trial is None:
                self.reasons.append(f"The budget had no room for {setting(move[1])}.")
        best = min(reversed(judged), key=self._flaws)  # the latest of the best
        return None if self._flaws(best)[0] else best

    def _flaws(self, trial: Trial) -> tuple[bool, int, bool]:
        """Smaller is better: of no use at the last snapshot, doubts that could be mended, noisy or not flat."""
        *early, last = (point.llc.health for point in trial.points)
        flawed = sum(health not in _USABLE | _AT_NO_MINIMUM for health in early) + (last not in _USABLE)
        useless = last not in _USABLE | {Health.OFF_MINIMUM}
        return useless, flawed, trial.sampler in self._doubted

    def _move(self, trial: Trial) -> tuple[str, Sampler] | None:
        """What the verdicts of a trial say to try next; None if it is sound, and flat with twice the step size."""
        sampler, last = trial.sampler, trial.points[-1]
        assert sampler.step_size is not None
        eps, gamma, nbeta = sampler.step_size, sampler.localization, sampler.nbeta
        half = "half the step", self._sampler(eps / 2, gamma, nbeta)
        if bad := verdicts(trial, _TOO_LONG):
            self.reasons.append(f"{setting(sampler)}: {bad}, so the next steps were shorter.")
            if eps < 16 * self._too_short or not self._too_short:
                return half
            between = math.sqrt(eps * self._too_short)
            return "in between", self._sampler(between, self._gamma(between, self._longest), nbeta)
        bias, kappa = added_bias(trial), eps * (nbeta * max(self.curvatures) + gamma)
        met = [point.llc.checks.kappa for point in trial.points]
        if max(met) < kappa / 4:
            self.curvatures = [point.llc.checks.curvature for point in trial.points]
            if max(self.curvatures) > 0:
                self._too_short = eps
                self.reasons.append(f"{setting(sampler)}: the chains met much less curvature than there seemed to be.")
                return "longer steps", self._at_kappa()
        if bias > BIAS:
            self._doubted.add(sampler)
            self.reasons.append(
                f"{setting(sampler)}: the minibatches' noise and the length of the steps add {percent(bias)} to λ̂."
            )
            return self._less_noise(sampler, kappa, max(0.75 * BIAS / bias, 1 / 16))
        if last.llc.health in _AT_NO_MINIMUM and nbeta > LEAST_NBETA:
            self.reasons.append(f"{setting(sampler)}: {verdicts(trial, {last.llc.health})}, so nβ was lowered.")
            return "nβ / 4", self._sampler(eps * 4, gamma / 4, nbeta / 4)
        if last.llc.health is Health.NEGATIVE:
            return None
        if bad := verdicts(trial, _UNSETTLED):
            self.reasons.append(f"{setting(sampler)}: {bad}, so the localization was raised.")
            return "twice γ", replace(sampler, localization=rounded(2 * gamma))
        twice = replace(sampler, step_size=rounded(2 * eps))
        double = next((t for t in self.trials if t.sampler == twice), None) or self._try(
            "twice the step", twice, self.snapshots
        )
        if double is None:
            self.reasons.append("There was no room in the budget to try twice the step size.")
            return None
        if bad := verdicts(double, _TOO_LONG):
            self._doubted.add(sampler)
            self.reasons.append(
                f"{setting(twice)}: {bad}, so half of that leaves no margin, and the next was half again."
            )
            return half
        change, sure = largest_change(trial, double)
        self.reasons.append(f"{setting(sampler)}: with twice the step size, λ̂ changes by {percent(change)}.")
        if sure > FLAT:
            self._doubted.add(sampler)
            self.reasons[-1] += " That isn't flat."
            if bias < BIAS / 5:
                return half
            return self._less_noise(sampler, kappa, min(0.5, max(0.6 * FLAT / sure, 0.25)))
        return None

    def _less_noise(self, sampler: Sampler, kappa: float, share: float) -> tuple[str, Sampler]:
        """Less momentum, then shorter steps, and where they would take too many a lower nβ.

        The noise goes with κ·nβ·(1 + a)/(1 − a), a the momentum, with which soft directions settle as with κ.
        """
        assert sampler.step_size is not None
        if self._chooses_momentum and self._gain > 1:
            gain = max(self._gain * share, 1.0)
            share *= self._gain / gain
            self._take(replace(self._kind, momentum=rounded((gain - 1) / (gain + 1))))  # pyright: ignore[reportCallIssue]
            if share > 0.9:
                return "less momentum", self._sampler(sampler.step_size, sampler.localization, sampler.nbeta)
        shorter = max(share, min(LEAST_KAPPA / kappa, 1.0))
        lower = share / shorter
        name = " and ".join(["shorter steps"] * (shorter < 1) + ["lower nβ"] * (lower < 1))
        return name, self._sampler(
            sampler.step_size * shorter / lower, sampler.localization * lower, sampler.nbeta * lower
        )

    def _weaken(self, trial: Trial) -> Trial:
        """Lower the localization alone where it holds λ̂ back, if λ̂ then rises by what was held and no more.

        A weaker one that lets λ̂ rise by more has softer and softer directions to show, for which no chain is long
        enough.
        """
        doubt = 2.0  # of a first trial, a held share that isn't surely small is lowered too
        while True:
            sampler, last = trial.sampler, trial.points[-1].llc
            held = last.checks.localization_bias
            if not abs(held) + doubt * last.checks.held_error > BIAS / 2 or last.health not in _USABLE:
                return trial
            most = self._longest if self._gain > 1 else round(LONGEST * self._longest)
            weaker = self._try(
                "weaker γ",
                replace(
                    sampler,
                    localization=rounded(sampler.localization / WEAKER),
                    burn_in=max(most, sampler.burn_in),
                    draws=max(2 * most, sampler.draws),
                ),
                self.snapshots[-1:],
            )
            if weaker is None:
                self.reasons.append(
                    f"γ holds about {percent(held)} of λ̂ back; the budget had no room for a weaker one."
                )
                return trial
            now = weaker.points[-1].llc
            rise = difference(now, last)
            self.reasons.append(
                f"γ holds about {percent(held)} of λ̂ back at step {integer(trial.points[-1].step)}; with "
                f"{setting(weaker.sampler)} it is {now.health.name}, and λ̂ changes by "
                f"{percent(rise.value, abs(last.value))}."
            )
            if now.health not in _USABLE:
                return trial
            if now.checks.kappa > WANDERED * last.checks.kappa:
                self.reasons[-1] += " The chains go to where the curvature is much larger, so γ stays."
                return trial
            if rise.value - 2 * rise.error > (max(held, 0) + BIAS) * abs(last.value):
                self.reasons[-1] += " That is more than was held back, so γ stays: it decides which directions count."
                return trial
            trial, doubt = weaker, -2.0

    def _vary_nbeta(self, trial: Trial) -> Trial:
        """Lower nβ and γ together at the last snapshot, on the same paths drawn wider, as long as λ̂ rises by it.

        Where the loss is flat to second order, chains at a large nβ take too long to find out how far they can go.
        """
        for _ in range(LOWERED):
            sampler, last = trial.sampler, trial.points[-1].llc
            assert sampler.step_size is not None
            wider = self._try(
                "wider",
                replace(
                    sampler,
                    step_size=rounded(sampler.step_size * WIDER),
                    localization=rounded(sampler.localization / WIDER),
                    nbeta=rounded(sampler.nbeta / WIDER),
                ),
                self.snapshots[-1:],
            )
            if wider is None:
                break
            now = wider.points[-1].llc
            rise, error = now.value - last.value, standard_error(np.subtract(now.per_chain, last.per_chain))
            self.reasons.append(
                f"With nβ and γ {WIDER:g} times smaller, λ̂ at step {integer(trial.points[-1].step)} changes by "
                f"{percent(rise, abs(last.value))}."
            )
            flat = not rise - 2 * error > BIAS / 2 * abs(last.value)
            if now.checks.kappa > STEEPER * max(last.checks.kappa, self._kappa):
                self.reasons[-1] += " The loss is too steep there for steps that are so much longer."
                break
            if flat or now.health is not Health.OK or last.health is not Health.OK:
                break
            self.reasons[-1] += " So nβ was lowered."
            trial = wider
        return trial

    def _of_length(self, trial: Trial, error: float, most: float, *, shorter: bool) -> Trial:
        """As many chains and draws as bring the errors to this share of the largest λ̂, within the budget.

        Args:
            trial: the setting.
            error: a share of λ̂.
            most: gradient evaluations of a point.
            shorter: whether chains may take fewer draws than in the trial.
        """
        last, sampler = trial.points[-1].llc, trial.sampler
        room = min(self.left // len(self.snapshots), most)

        def fits(chains: int, draws: int) -> bool:
            steps = sampler.burn_in + draws
            return gradients_of_a_point(replace(sampler, chains=chains, draws=draws), chains * steps) <= room

        wanted = sampler
        if shorter:
            levels = [point.llc for point in trial.points if point.llc.health.has_level] or [last]
            noisiest = max(levels, key=lambda estimate: float(np.std(estimate.per_chain)))
            wanted_error = error * max(abs(estimate.value) for estimate in levels)
            chains, draws = cheapest(noisiest.per_chain, sampler.draws, sampler.burn_in, wanted_error, CHAINS)
            draws = min(draws, LENGTHENED * sampler.draws)
            if not fits(chains, draws):
                longest = {
                    c: max((d for d in range(FEWEST_DRAWS, draws * chains) if fits(c, d)), default=0) for c in CHAINS
                }
                chains = min(
                    (c for c in CHAINS if longest[c]), key=lambda c: student(c) ** 2 / (c * longest[c]), default=0
                )
                chains, draws = (chains, longest[chains]) if chains else (sampler.chains, sampler.draws)
            wanted = replace(sampler, chains=chains, draws=draws)
        else:
            spread = float(np.std(last.per_chain, ddof=1))
            for chains in CHAINS:
                if not fits(chains, sampler.draws) and chains > CHAINS[0]:
                    break
                wanted = replace(sampler, chains=chains)
                if spread / math.sqrt(chains) * student(chains) <= error * abs(last.value):
                    break
        if wanted == trial.sampler and len(trial.points) == len(self.snapshots):
            return trial
        name = f"{wanted.chains} chains of {wanted.burn_in + wanted.draws}" if shorter else f"{wanted.chains} chains"
        final = self._try(name, wanted, self.snapshots)
        if final is None or self._flaws(final) > self._flaws(trial):
            self.reasons.append(
                f"With {wanted.chains} chains there was more to doubt, so it stays at {trial.sampler.chains}."
            )
            return trial
        return final

    def _explain(self, trial: Trial, error: float) -> None:
        sampler, last = trial.sampler, trial.points[-1]
        assert sampler.step_size is not None
        sharpest = max(range(len(self.snapshots)), key=lambda i: self.curvatures[i])
        stiff = max(trial.points, key=lambda point: point.llc.checks.kappa)
        cost = trial.cost // len(trial.points)
        settling = sampler.burn_in * sampler.step_size * sampler.localization * self._gain
        self.reasons += [
            f"The sharpest snapshot is that of step {integer(self.snapshots[sharpest].step)}, with curvature "
            f"{number(self.curvatures[sharpest])}. κ = ε·(nβ·h + γ) reaches {stiff.llc.checks.kappa:.2f} along the "
            "chains, where 4 is unstable.",
            f"γ is such that chains of this length settle: the burn-in is {settling:.1f} times what the softest "
            "directions take to forget where they started. A weaker one sees softer directions, and takes longer "
            "chains and a larger budget.",
            f"The minibatches' noise and the length of the steps add about {percent(added_bias(trial))} to λ̂.",
            f"The standard error at step {integer(last.step)} is {percent(last.llc.error, abs(last.llc.value))} of λ̂, "
            f"where at most {percent(error)} was asked for. A point costs {integer(cost)} gradient evaluations.",
        ]
        for health in dict.fromkeys(point.llc.health for point in trial.points):
            if health is not Health.OK:
                self.reasons.append(f"What remains is {verdicts(trial, {health})}. {health.value}")
