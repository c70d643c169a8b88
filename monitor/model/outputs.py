"""What a loss function returns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def scalar_of(output: Any) -> Any:
    """The loss in what a loss function returned: itself, or the `loss` of an output, or the first of a tuple.

    Args:
        output: anything; what has no loss in it comes back as it is.

    Example:
        >>> import torch
        >>> scalar_of({"loss": torch.tensor(2.0), "logits": torch.zeros(3)})
        tensor(2.)
    """
    if isinstance(output, Mapping):
        return output.get("loss", output)
    if isinstance(output, tuple) and not hasattr(output, "loss"):
        return output[0] if output and isinstance(output[0], Tensor) else output
    return output if isinstance(output, Tensor) else getattr(output, "loss", output)
