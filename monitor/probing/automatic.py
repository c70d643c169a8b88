"""Calibrating where nobody looks on: it always comes to a setting, and says how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from phasewatch.monitor.errors import in_words
from phasewatch.monitor.probing.calibrate import calibrate
from phasewatch.monitor.probing.calibration import Calibration
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.sampling.settings import Langevin, Sampler
from phasewatch.monitor.snapshots.snapshot import Snapshots

WORD = "calibrate"
"""What `sampler=` takes in place of a setting."""

FALLBACK_KAPPA = 0.5
"""κ of the setting that is taken where no calibration works: each snapshot gets the step size that its own curvature
allows, an eighth of what is unstable."""


@dataclass(frozen=True)
class Setting:
    """What a calibration came to.

    Attributes:
        sampler: what to measure with.
        why: the trials and the reasons, as text; empty if it got to none.
        failure: why it is the fallback, a sentence; empty if the calibration worked.
    """

    sampler: Sampler
    why: str
    failure: str

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"sampler": self.sampler.as_json(), "why": self.why, "failure": self.failure}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], like: Sampler) -> Self:
        """The setting of such values.

        Args:
            record: what `as_json` gave.
            like: the sampler that was calibrated.
        """
        return cls(sampler_from(record["sampler"], like), record["why"], record["failure"])


def calibrated(series: Snapshots, steps: Sequence[int], probe: Probe) -> Setting:
    """Calibrate on snapshots of a series, with a setting to fall back on.

    Args:
        series: of the probe's model.
        steps: some of the series'.
        probe: what to calibrate for.

    Returns:
        The setting; nothing that goes wrong is raised.

    Example:
        >>> import tempfile, torch, phasewatch as pw
        >>> model, folder = torch.nn.Linear(8, 1), pw.SnapshotFolder(tempfile.mkdtemp())
        >>> folder.save(pw.Snapshot.of(model, step=1))
        >>> def loss(model, batch):
        ...     return 0 * model(batch).mean()
        >>> found = calibrated(folder, [1], pw.Probe(model, loss, torch.randn(64, 8)))
        >>> found.failure[:32], found.sampler.kappa
        ('calibrate(...): the loss is flat', 0.5)
    """
    shown: list[Calibration] = []
    try:
        sampler = calibrate([series.load(step) for step in steps], probe, show=shown.append)
        failure = ""
    except Exception as error:
        sampler, failure = fallback(probe.sampler), in_words(error)
    return Setting(sampler, "\n\n".join(map(str, shown)), failure)


def fallback(sampler: Sampler) -> Sampler:
    """The setting to go on with where no calibration works: the given one, with κ where it says nothing of steps.

    Args:
        sampler: of the probe.

    Example:
        >>> print(fallback(Langevin(draws=50)).kappa, fallback(Langevin(step_size=1e-3)).kappa)
        0.5 None
    """
    if isinstance(sampler, Langevin) and sampler.step_size is None and sampler.kappa is None:
        return replace(sampler, kappa=FALLBACK_KAPPA)
    return sampler


def sampler_from(record: Mapping[str, Any], like: Sampler) -> Sampler:
    """A sampler of the values that `Sampler.as_json` gives.

    Args:
        record: such values.
        like: a sampler of the same class.

    Returns:
        The sampler.

    Raises:
        ValueError: if it is of another class, or the values make none.
    """
    values = dict(record)
    if values.pop("sampler", None) != type(like).__name__:
        raise ValueError(f"not the values of a {type(like).__name__}")
    try:
        return type(like)(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def early_middle_late(steps: Sequence[int]) -> list[int]:
    """The first, the middle and the last of some steps.

    Args:
        steps: in order, at least one.

    Example:
        >>> early_middle_late([10, 20, 30, 40]), early_middle_late([10])
        ([10, 30, 40], [10])
    """
    return sorted({steps[i] for i in (0, len(steps) // 2, -1)})
