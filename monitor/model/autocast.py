"""A loss in mixed precision."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from phasewatch.monitor.model.loss import Loss
from phasewatch.monitor.model.outputs import scalar_of


def under_autocast(loss: Loss, device_type: str, dtype: torch.dtype) -> Loss:
    """A loss taken in mixed precision.

    Args:
        loss: the loss.
        device_type: such as "cuda".
        dtype: such as torch.bfloat16.

    Returns:
        The same under `torch.autocast`, with the type as its attribute `autocast`, and the loss as `in_full_precision`.
    """

    @wraps(loss)
    def taken(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(device_type, dtype, cache_enabled=False):
            return scalar_of(loss(model, batch))

    taken.autocast = dtype  # pyright: ignore[reportAttributeAccessIssue]
    taken.in_full_precision = loss  # pyright: ignore[reportAttributeAccessIssue]
    return taken
