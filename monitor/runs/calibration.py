"""The setting that a run was calibrated to, as its `run.json` keeps it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phasewatch.monitor.errors import PhasewatchError, say, warn
from phasewatch.monitor.files import read_json
from phasewatch.monitor.probing.automatic import Setting, sampler_from
from phasewatch.monitor.probing.probe import Probe


@dataclass(frozen=True)
class RunCalibration:
    """That a run's setting is calibrated, and on what.

    Attributes:
        given: the probe's own sampler, which began it, as plain JSON values.
        steps: of the snapshots that it was calibrated on; empty while that is still to come.
    """

    given: Mapping[str, Any]
    steps: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"given": dict(self.given), "steps": list(self.steps)}


def calibrated_before(run: Path, probe: Probe) -> tuple[Probe, RunCalibration | None]:
    """The probe with the setting that a run was calibrated to, if it was.

    Args:
        run: the run's folder, which need not be there.
        probe: of the sampler that the calibration began with, or of the one that it came to.

    Returns:
        The probe to go on with, and what the run keeps of its calibration: None if the run's setting is not
        calibrated, or the probe has another sampler than that.
    """
    if not os.path.lexists(run / "run.json"):
        return probe, None
    try:
        header = read_json(run / "run.json", within=run)
        record, reached = header["calibration"], header["settings"]["sampler"]
        known = RunCalibration(dict(record["given"]), tuple(map(int, record["steps"])))
        own = probe.sampler.as_json()
        if own not in (known.given, reached):
            return probe, None
        return (probe if own == reached else probe.with_sampler(sampler_from(reached, probe.sampler))), known
    except (PhasewatchError, ValueError, KeyError, TypeError):  # no such run, or one that RunFolder refuses
        return probe, None


def tell(setting: Setting, steps: Sequence[int], run: Path | None) -> None:
    """Say in a line what a calibration came to.

    Args:
        setting: what it came to.
        steps: of the snapshots that it tried.
        run: the folder with its reasons; None if there is none.
    """
    if setting.failure:
        warn(f"The calibration on {named(steps)} failed, and {setting.sampler} is taken: {setting.failure}")
    else:
        say(f"calibrated on {named(steps)}: {setting.sampler}{f'; {run}/calibration.txt says why' if run else ''}")


def named(steps: Sequence[int]) -> str:
    """Steps in words.

    Example:
        >>> named([10]), named([10, 20])
        ('step 10', 'steps 10, 20')
    """
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(map(str, steps))}"
