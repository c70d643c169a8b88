"""Points in order of step, in memory and on disk. numpy alone: reading a run needs no torch."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimate import Estimate, Health, json_number


@dataclass(frozen=True)
class Point:
    """One snapshot, measured.

    Attributes:
        step: the training step of the snapshot.
        loss: the loss on the probe's fixed evaluation batch.
        llc: the estimate of the local learning coefficient.
        metrics: the probe's own metrics by name.
    """

    step: int
    loss: float
    llc: Estimate
    metrics: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """This point as plain JSON types."""
        return {
            "step": self.step,
            "loss": json_number(self.loss),
            "llc": self.llc.as_json(),
            "metrics": {name: json_number(value) for name, value in self.metrics.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Point":
        """The inverse of `as_json`, exact to the last bit."""
        return cls(
            step=int(record["step"]),
            loss=float(record["loss"]),
            llc=Estimate.from_json(record["llc"]),
            metrics={name: float(value) for name, value in record.get("metrics", {}).items()},
        )
