"""What a user's model or loss gets wrong, found when the probe is made."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from phasewatch.monitor.errors import PhasewatchError, warn
from phasewatch.monitor.model.loss import ModelLoss


def check_loss(loss: ModelLoss, batch: Any) -> None:
    """Take the loss and its gradient once, and say what can't be sampled or would mean something else.

    Args:
        loss: of the probe's own copy of the model.
        batch: a minibatch.

    Raises:
        PhasewatchError: if the loss is no finite scalar, or its gradient doesn't reach the model.
    """
    name = getattr(loss.loss, "__name__", "loss")
    value = loss.value(batch)
    if not isinstance(value, Tensor) or value.ndim != 0:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise PhasewatchError(
            f"Probe(loss={name}): {name}(model, batch) returned {came}; "
            "it must return a scalar tensor, the mean over the batch"
            f"{', so perhaps .mean() is missing' if isinstance(value, Tensor) else ''}."
        )
    if not value.isfinite():
        raise PhasewatchError(
            f"Probe(loss={name}): {name}(model, batch) returned {value.item()} on a minibatch of data. "
            "Check the data and the model's weights for values that are not finite."
        )
    if not value.requires_grad:
        raise PhasewatchError(
            f"Probe(loss={name}): {name}(model, batch) returned a tensor that needs no gradient. "
            "Sampling follows the gradient, so return it without .detach(), .item() or torch.no_grad()."
        )
    value.backward()
    reached = any(parameter.grad is not None for parameter in loss.model.parameters)
    loss.model.module.zero_grad(set_to_none=True)
    if not reached:
        raise PhasewatchError(
            f"Probe(loss={name}): the gradient of {name}(model, batch) reaches no parameter of the model it was "
            "given. Call the model that comes as its argument, not another one, such as the one in training."
        )
    again = loss.value(batch)
    if not torch.allclose(again, value, rtol=1e-3, equal_nan=True):
        warn(
            f"Probe(loss={name}): {name}(model, batch) returned {value.item():g} and then {again.item():g} "
            "for the same weights and minibatch. What is drawn inside it adds noise to λ̂; draw it in data instead."
        )
    elif _is_a_sum(loss, batch, value):
        warn(
            f"Probe(loss={name}): {name}(model, batch) doubles when the minibatch comes twice, so it is a sum and "
            "not the mean over the minibatch. λ̂ is then that of nbeta * batch_size; divide by the batch size."
        )


def _is_a_sum(loss: ModelLoss, batch: Any, value: Tensor) -> bool:
    """Whether a loss doubles with a minibatch that holds every sample twice; False where that can't be tried."""
    try:
        doubled = tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, batch)
        with torch.no_grad():
            twice = loss.value(doubled)
        return bool(abs(twice - 2 * value) < 1e-3 * abs(value))
    except Exception:
        return False
