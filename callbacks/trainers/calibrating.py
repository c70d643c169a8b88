"""Calibrating in a training run, as soon as there are snapshots that it works on."""

from collections.abc import Sequence

from phasewatch.monitor.errors import in_words, say
from phasewatch.monitor.formatting import integer
from phasewatch.monitor.probing.automatic import Setting, early_middle_late, fallback
from phasewatch.monitor.probing.calibrate import BUDGET
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.calibration import RunCalibration, named, tell
from phasewatch.monitor.runs.executor import InProcess
from phasewatch.monitor.runs.folder import RunFolder
from phasewatch.monitor.runs.processes import Processes

TRIES = 3, 6, 12
"""Numbers of snapshots at which a calibration is tried. The first ones of a training are often at no minimum, where no
setting has an estimate that can be used; after the last try the run falls back."""


class Calibrating:
    """Calibrates a run's probe on its first snapshots, or on a stated one, and has the executor measure with it.

    Args:
        probe: of the sampler that begins it.
        folder: the run's.
        executor: what calibrates, and then measures.
        known: what the folder keeps of it.
        at: the step to wait for; None for the first snapshots.
    """

    def __init__(
        self, probe: Probe, folder: RunFolder, executor: InProcess | Processes, known: RunCalibration, at: int | None
    ) -> None:
        self._probe = probe
        self._folder = folder
        self._executor = executor
        self._known = known
        self._at = at
        self._tries = list(TRIES)

    def due(self, steps: Sequence[int], *, over: bool) -> list[int]:
        """The snapshots to calibrate on now.

        Args:
            steps: of those that are there, in order.
            over: whether there won't be more.

        Returns:
            An early, a middle and the last one; none if there are too few yet.
        """
        until = self._until(steps, over=over)
        return early_middle_late(until) if until else []

    def settle(self, chosen: Sequence[int]) -> Probe | None:
        """Calibrate.

        Args:
            chosen: what `due` gave.

        Returns:
            The probe of the setting that the run has from now on; None if it is to be tried again with more snapshots.
        """
        own = self._probe.sampler
        say(
            f"calibrating on {named(chosen)}, which takes up to {integer(BUDGET)} gradients; a sampler of your own "
            "takes none"
        )
        try:
            setting = self._executor.calibrate(chosen, own)
        except Exception as error:
            setting = Setting(fallback(own), "", in_words(error))
        self._tries = self._tries[1:]
        if setting is None or (setting.failure and self._tries):
            return None
        probe = self._probe.with_sampler(setting.sampler)
        self._executor.use(probe, self._folder.snapshots)
        known = RunCalibration(self._known.given, tuple(chosen))
        self._folder.keep_calibration(known.as_json(), probe.settings, setting.why)
        tell(setting, chosen, self._folder.path)
        return probe

    def _until(self, steps: Sequence[int], *, over: bool) -> Sequence[int]:
        """The snapshots up to the one to calibrate at."""
        if self._at is not None:
            there = [step for step in steps if step >= self._at][:1]
            self._tries = self._tries[:1]
            return [step for step in steps if step < self._at] + there if self._tries and (there or over) else []
        if over:
            self._tries = [number for number in self._tries if number <= len(steps)] or [len(steps)] * bool(self._tries)
        return steps[: self._tries[0]] if self._tries and len(steps) >= self._tries[0] else []
