"""Snapshots of different steps that hold the same weights, as of a model that nobody trains."""

import torch
from torch import Tensor

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
        found = tuple((name, _sum(snapshot.tensors[name].detach())) for name in sorted(snapshot.tensors))
        step = self._steps.setdefault(hash(found), snapshot.step)
        if step != snapshot.step:
            self._told = True
            warn(
                f"The snapshots of steps {step} and {snapshot.step} hold the same weights, bit for bit. If the model "
                "trains, another one is watched: a trainer may have built its own by model_init, or trains a copy. In "
                "a published series, one of the two may be a copy of the other."
            )


def _sum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes as 64-bit numbers, on its own device: a checksum at the speed of memory."""
    content = tensor.contiguous().flatten()
    if content.storage_offset():
        content = content.clone()  # at an address that 64-bit numbers may have
    content = content.view(torch.uint8)
    whole = content.numel() // 8 * 8
    rest = int.from_bytes(content[whole:].cpu().numpy().tobytes(), "little")
    return int(content[:whole].view(torch.int64).sum()) + rest
