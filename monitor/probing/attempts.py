"""The trials of a calibration, and the budget that they are taken from."""

from collections.abc import Sequence

from phasewatch.monitor.estimates.estimate import Estimate
from phasewatch.monitor.probing.calibration import Trial
from phasewatch.monitor.probing.probe import Probe, measure_whole
from phasewatch.monitor.sampling.chains import gradients_of_a_point
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.snapshot import Snapshot


class Attempts:
    """Measurements at a series' snapshots within a budget, and the sentences that explain them.

    Attributes:
        snapshots: of the series, in order.
        probe: what measures them.
        budget: gradient evaluations that were allowed.
        left: those that aren't spent.
        trials: what was tried, in that order.
        reasons: sentences.
    """

    def __init__(self, snapshots: list[Snapshot], probe: Probe, budget: int) -> None:
        self.snapshots = snapshots
        self.probe = probe
        self.budget = self.left = budget
        self.trials: list[Trial] = []
        self.reasons: list[str] = []

    def cost(self, sampler: Sampler) -> int:
        """Gradient evaluations that a point takes with a setting."""
        with self.probe.subject.measuring():
            return gradients_of_a_point(sampler, len(self.probe.subject.kept(sampler)))

    def look(self, snapshot: Snapshot, sampler: Sampler) -> Estimate:
        """Measure one snapshot without calling it a trial; the caller sees to it that the budget allows it."""
        self.left -= self.cost(sampler)
        return measure_whole(self.probe, snapshot, sampler).llc

    def attempt(self, name: str, sampler: Sampler, snapshots: Sequence[Snapshot] | None = None) -> Trial | None:
        """Measure with a setting, if the budget allows it.

        Args:
            name: of the trial.
            sampler: the setting.
            snapshots: where; at all of them if not given.

        Returns:
            The trial, None where the budget has no room for it.
        """
        snapshots = self.snapshots if snapshots is None else snapshots
        if len(snapshots) * gradients_of_a_point(sampler, 1) > self.left:
            return None
        cost = len(snapshots) * self.cost(sampler)
        if cost > self.left:
            return None
        self.left -= cost
        points = tuple(measure_whole(self.probe, snapshot, sampler) for snapshot in snapshots)
        self.trials.append(Trial(name, sampler, points, cost))
        return self.trials[-1]
