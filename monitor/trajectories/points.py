"""One measured snapshot: its step, its loss and its estimates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phasewatch.monitor.errors import LARGEST_STEP
from phasewatch.monitor.estimates.estimate import Estimate, Health, json_number
from phasewatch.monitor.estimates.uncertainty import standard_error


@dataclass(frozen=True, slots=True)
class Point:
    """One snapshot, measured.

    Attributes:
        step: the training step of the snapshot.
        loss: the loss on the probe's fixed evaluation batch.
        llc: the estimate of the local learning coefficient (LLC) of the whole model.
        metrics: the probe's own metrics by name.
        parts: the estimate of each of the probe's parts by name, where only the weights of the part are sampled and all
            others are held fixed (refined LLC; Wang et al. 2024, arXiv 2410.02984).

    Example:
        A probe returns points, and a trajectory holds them:

        >>> import phasewatch as pw
        >>> point = pw.Trajectory.from_values([10], loss=[2.5], llc=[31.0], metrics={"accuracy": [0.25]})[0]
        >>> point.step, point.loss, point.llc.value, point.metrics["accuracy"]
        (10, 2.5, 31.0, 0.25)
        >>> pw.Point.from_json(point.as_json()).loss
        2.5
    """

    step: int
    loss: float
    llc: Estimate
    metrics: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Estimate] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """This point as plain JSON types."""
        record: dict[str, Any] = {
            "step": self.step,
            "loss": json_number(self.loss),
            "llc": self.llc.as_json(),
            "metrics": {name: json_number(value) for name, value in self.metrics.items()},
        }
        if self.parts:
            record["parts"] = {name: estimate.as_json() for name, estimate in self.parts.items()}
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Point":
        """The inverse of `as_json`, exact to the last bit.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: if the record is none of a point.
        """
        step = record["step"]
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= LARGEST_STEP:
            raise ValueError(f"the step {step!r} is not a whole number from 0 to {LARGEST_STEP}")
        return cls(
            step=step,
            loss=float(record["loss"]),
            llc=Estimate.from_json(record["llc"]),
            metrics={name: float(value) for name, value in record.get("metrics", {}).items()},
            parts={name: Estimate.from_json(value) for name, value in record["parts"].items()}
            if "parts" in record
            else {},
        )


def estimate_without_diagnostics(value: float, error: float | None, per_chain: Sequence[float] = ()) -> Estimate:
    """An estimate as a table has it: no diagnostics, so that it counts as OK wherever there is a value.

    Args:
        value: λ̂; NaN where there is none, which makes a failed estimate.
        error: its standard error; None for that of the chains.
        per_chain: λ̂ of each chain, shape (chain,).

    Returns:
        The estimate.
    """
    return Estimate(
        value=value,
        error=standard_error(per_chain) if error is None else error,
        per_chain=tuple(per_chain),
        nbeta=math.nan,
        rhat=math.nan,
        ess=math.nan,
        health=Health.DIVERGED if math.isnan(value) else Health.OK,
    )
