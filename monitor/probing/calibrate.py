"""Choosing one setting of the sampler for a whole series, by trial at a few of its snapshots."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from phasewatch.monitor.errors import PhasewatchError, real_number, whole_number
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.formatting import integer
from phasewatch.monitor.probing.attempts import Attempts
from phasewatch.monitor.probing.calibration import Calibration, Trial
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.probing.search import Search
from phasewatch.monitor.probing.trials import setting
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.snapshot import Snapshot

BUDGET = 20_000
"""Gradient evaluations of all trials, where none is given."""

ALL_OF_THE_DATA = 2**24
"""Take all of the data at each step, in place of minibatches, where samples × parameters are no more than this: there
a step costs little more, and without their noise chains keep momentum, and reach softer directions."""

OF_A_MINIBATCH, TIMES = 2**22, 8
"""Minibatches are made so large that samples × parameters come to this, up to so many times the probe's own batch
size: their noise is what momentum multiplies."""

_HELP = {
    Health.DIVERGED: "look whether the loss is finite and smooth around that snapshot, or measure in float64",
    Health.OVERSTEPPING: "measure in float64, or give a larger budget",
    Health.NOISY: "raise the batch_size of the probe's sampler",
    Health.NEGATIVE: "give a last snapshot that is at a minimum: train longer or with a lower learning rate, or "
    "average the weights",
}


def calibrate(
    snapshots: Sequence[Snapshot],
    probe: Probe,
    *,
    budget: int = BUDGET,
    error: float | None = None,
    show: Callable[[Calibration], object] | None = print,
) -> Sampler:
    """Choose step size, localization, nβ, burn-in, draws and chains for a whole series.

    The largest curvature h at any snapshot sets the scale. The step size starts at κ = ε·(nβ·h + γ) = ½, or 1 without
    momentum, and the localization γ is the weakest that chains settle in, in as many steps as they have: some 500
    gradients a point for a curve, or what the budget allows for one snapshot. nβ starts at 10,000, or at what noise and
    slopes allow: for the level of one model, give its last snapshot alone. A setting is taken if its verdicts are
    sound, the descent at an early snapshot aside, if its noise adds little to λ̂, and if λ̂ stays flat with steps twice
    as long; until then the verdicts say what to try next. Then nβ and γ are raised together for one snapshot, 10⁴ times
    at most, where λ̂ rises by it, since chains stay nearer; else they are lowered together at the last one where λ̂ rises
    by that. γ alone is lowered for one snapshot where λ̂ rises by what it held back and no more. Chains and draws are as
    many as the error asks for. All trials share their random streams.

    Args:
        snapshots: of the series, such as an early, a middle and a late one; the sharpest decides the step size.
        probe: what to calibrate for. Of its sampler, its class is kept, and the momentum where it is given. With
            minibatches, `Langevin` gets the momentum that their noise allows, 0.9 at most, for models of less than
            10⁷ parameters. Minibatches are made up to 8 times as large, until samples × parameters are 2²²; all of the
            data is taken at each step where they are at most 2²⁴.
        budget: gradient evaluations that the trials may take in all, one for each chain and step; a loss without its
            gradient counts as a third. It also says how long chains may be around a snapshot that is given alone:
            its estimate comes to cost between a tenth and a quarter of it.
        error: standard error of λ̂ to aim for, as a share of the largest λ̂, in the root mean square over the snapshots;
            chains take no more draws than it asks for, as far as the trial's few can tell. If not given, it is 2 % for
            a curve, as far as 2,000 gradient evaluations a point go; and for one snapshot 3 %, or less where the chains
            that settle give less.
        show: gets what was tried and why, also where nothing works: `print`, or what draws it. None for nobody.

    Returns:
        The setting, for `Probe(sampler=...)` or `probe.with_sampler(...)`.

    Raises:
        PhasewatchError: if no setting has a usable estimate at the last snapshot; it says what was tried. Also if
            the budget is too small for a trial, or a snapshot isn't of the probe's model.

    Example:
        >>> import torch, phasewatch as pw
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(8, 1, bias=False), torch.randn(256, 8)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> def loss(model, batch):
        ...     return model(batch).square().mean() / 2
        >>> probe = pw.Probe(model, loss, x, sampler=pw.Langevin(batch_size=None))
        >>> sampler = pw.calibrate([pw.Snapshot.of(model, step=100)], probe, budget=3000, show=None)
        >>> estimate = probe.with_sampler(sampler)(pw.Snapshot.of(model, step=100)).llc
        >>> abs(estimate.value - 4) < 3 * estimate.error
        True
    """
    ordered = _in_order(snapshots)
    if not isinstance(probe, Probe):
        raise PhasewatchError(f"calibrate(snapshots, probe) takes a Probe; a {type(probe).__name__} came.")
    if error is not None:
        error = real_number("calibrate(error=...)", error, above=0, below=1, hint="a share of λ̂")
    given = _with_larger_batches(probe)
    attempts = Attempts(ordered, given, whole_number("calibrate(budget=...)", budget, least=1))
    search = Search(attempts, _with_step_size(given.sampler))
    chosen = search.choose(error)
    sampler = None if chosen is None else chosen.sampler
    curvatures = {snapshot.step: h for snapshot, h in zip(ordered, search.curvatures, strict=True)}
    if show is not None:
        show(
            Calibration(
                sampler, tuple(attempts.trials), tuple(attempts.reasons), curvatures, budget - attempts.left, budget
            )
        )
    if sampler is None:
        raise PhasewatchError(_in_vain(attempts.trials, budget - attempts.left, budget))
    return sampler


def _with_step_size(sampler: Sampler) -> Sampler:
    """Without a κ, which would set the step size of each snapshot by itself."""
    return sampler if sampler.target_kappa is None else replace(sampler, kappa=None)  # pyright: ignore[reportCallIssue]


def _with_larger_batches(probe: Probe) -> Probe:
    """A probe that takes as many samples at each step as cost next to nothing more, all of the data if it can."""
    sampler, subject = probe.sampler, probe.subject
    if sampler.batch_size is None or subject.loss.vector.ranks > 1:
        return probe
    if subject.samples is not None and subject.samples * subject.model.size <= ALL_OF_THE_DATA:
        return probe.with_sampler(replace(sampler, batch_size=None))
    larger = min(TIMES * sampler.batch_size, OF_A_MINIBATCH // subject.model.size, subject.samples or sys.maxsize)
    return probe.with_sampler(replace(sampler, batch_size=max(sampler.batch_size, larger)))


def _in_order(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    given = [snapshots] if isinstance(snapshots, Snapshot) else list(snapshots)
    if not given:
        raise PhasewatchError(
            "calibrate(snapshots=[], ...) needs snapshots to try settings at. Give an early, a middle and a late one."
        )
    for snapshot in given:
        if not isinstance(snapshot, Snapshot):
            raise PhasewatchError(
                f"calibrate(snapshots=...) takes a list of Snapshots; a {type(snapshot).__name__} came. "
                "`open_series(path).load(step)` reads one."
            )
    steps = [snapshot.step for snapshot in given]
    if len(set(steps)) < len(steps):
        raise PhasewatchError(f"calibrate(snapshots=...) got two of one step: {sorted(steps)}. Give each step once.")
    return sorted(given, key=lambda snapshot: snapshot.step)


def _in_vain(trials: Sequence[Trial], spent: int, budget: int) -> str:
    last = [(trial.sampler, trial.points[-1]) for trial in trials]
    tried = "; ".join(f"{setting(sampler)}: {point.llc.health.name}" for sampler, point in last)
    help_ = {_HELP.get(point.llc.health, "give a larger budget") for _, point in last}
    return (
        f"calibrate(...) found no setting whose estimate at step {integer(last[-1][1].step)} can be used, with "
        f"{integer(spent)} of {integer(budget)} gradient evaluations. It tried {tried}. "
        f"What may help: {'; or '.join(sorted(help_))}."
    )
