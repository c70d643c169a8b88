"""The series that transitions are sought in: whole, its first points, or means of neighbours. numpy alone."""

from dataclasses import dataclass

import numpy as np

from phasewatch.monitor.trajectories.trajectory import Trajectory

MOST_POINTS = 1000
"""Of more points, means of neighbours are searched, at least half as many as this, so that a search takes the same time
in a run of any length. The curve has at most 64 knots, which are much further apart."""


@dataclass(frozen=True)
class Columns:
    """A signal's usable points by column.

    Attributes:
        steps: training steps, shape (point,), increasing.
        values: the signal, shape (point,).
        loss: the loss, shape (point,).
        llc: λ̂, shape (point,).
        chains: λ̂ of each chain at the first points that have the same number of chains, shape (point, chain).
        size: how many neighbours each is the mean of; the last may be of fewer.
    """

    steps: np.ndarray
    values: np.ndarray
    loss: np.ndarray
    llc: np.ndarray
    chains: np.ndarray
    size: int = 1

    @classmethod
    def of(cls, usable: Trajectory, signal: str) -> "Columns":
        """Those of a trajectory whose points all have the signal."""
        chains = [point.llc.per_chain for point in usable]
        alike = next((i for i, of_one in enumerate(chains) if len(of_one) != len(chains[0])), len(chains))
        values = usable.signal(signal)
        return cls(
            usable.steps,
            values,
            values if signal == "loss" else usable.loss,
            values if signal == "llc" else usable.llc,
            np.array(chains[:alike], dtype=float).reshape(alike, -1 if alike and chains[0] else 0),
        )

    def __len__(self) -> int:
        return len(self.steps)

    def first(self, count: int) -> "Columns":
        """The first points."""
        return Columns(
            self.steps[:count],
            self.values[:count],
            self.loss[:count],
            self.llc[:count],
            self.chains[:count],
        )

    def shortened(self, most: int = MOST_POINTS) -> "Columns":
        """At most so many points, each the mean of as many neighbours; its step is that of the middle one."""
        size = -(-len(self) // most)
        if size < 2:
            return self
        starts = np.arange(0, len(self), size)
        middles = np.minimum(starts + size // 2, (starts + np.minimum(starts + size, len(self)) - 1) // 2)
        counts = np.diff(np.append(starts, len(self)))

        def mean(column: np.ndarray) -> np.ndarray:
            """The mean of each group, by halves, so that no sum leaves the range of a float."""
            total = np.add.reduceat(column / size, starts, axis=0)
            return total * (size / counts).reshape(-1, *[1] * (column.ndim - 1))

        has_chains = len(self.chains) == len(self) and self.chains.shape[1] > 0
        chains = mean(self.chains) if has_chains else np.empty((0, 0))
        return Columns(self.steps[middles], mean(self.values), mean(self.loss), mean(self.llc), chains, size)

    @property
    def usable_chains(self) -> np.ndarray | None:
        """λ̂ of the chains that never failed, shape (point, chain); None if there aren't two, or not at all points."""
        if len(self.chains) < len(self):
            return None
        chains = self.chains[:, np.isfinite(self.chains).all(axis=0)]
        return chains if chains.shape[1] > 1 else None
