"""Snapshots of different steps that hold the same weights, as of a model that nobody trains."""

import zlib
from typing import Any, cast

import torch

from phasewatch.monitor.errors import warn
from phasewatch.monitor.snapshots.snapshot import Snapshot


class Repeats:
    """Warns of the first two snapshots of different steps with the same tensors.

    Example:
        >>> import warnings
        >>> repeats, model = Repeats(), torch.nn.Linear(2, 1)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for step in (10, 20, 30):
        ...         repeats.see(Snapshot.of(model, step))
        >>> len(caught), str(caught[0].message)[:61]
        (1, 'The snapshots of steps 10 and 20 hold the same weights, bit f')
    """

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        self._told = False

    def see(self, snapshot: Snapshot) -> None:
        """Compare a snapshot with those before it.

        Args:
            snapshot: any.
        """
        if self._told:
            return
        found = 0
        for name in sorted(snapshot.tensors):
            content = snapshot.tensors[name].detach().contiguous().flatten().view(torch.uint8)
            found = zlib.crc32(cast(Any, content.cpu().numpy()), zlib.crc32(name.encode(), found))
        step = self._steps.setdefault(found, snapshot.step)
        if step != snapshot.step:
            self._told = True
            warn(
                f"The snapshots of steps {step} and {snapshot.step} hold the same weights, bit for bit. If the model "
                "trains, another one is watched: a trainer may have built its own by model_init, or trains a copy. In "
                "a published series, one of the two may be a copy of the other."
            )
