"""What a loss or a sharded model gets wrong, found as a probe is made, with the same answer on every process."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError, in_words, warn
from phasewatch.monitor.model.gradients import clear_gradients, gradients
from phasewatch.monitor.model.sharded_model import ShardedLoss
from phasewatch.monitor.probing.loss_faults import check_scalar, is_a_sum, take_gradients_along

REACHES = 1e-3, 2.5e-4
"""Lengths of the differences, relative to the weights, over which a gradient is compared with its loss."""

OFF = 0.3
"""Share by which the loss may miss its gradient over both lengths: a sum over two processes in place of their mean
misses it by half, and kinks by less."""


def check_sharded(loss: ShardedLoss, batch: Any) -> None:
    """Find what can't be sampled on shards. It takes 9 passes.

    Args:
        loss: of a sharded model.
        batch: a minibatch.

    Raises:
        PhasewatchError: for what can't be measured.
    """
    name = getattr(loss.loss, "__name__", "loss")
    try:
        with loss.vector.together():
            value = loss.here(batch)
    except (PhasewatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PhasewatchError(
            f"Probe(loss={name}): {name}(model, batch) failed on a minibatch of data ({in_words(error)}). "
            "It is called with the sharded model and one minibatch, on every process."
        ) from error
    check_scalar(value, name)
    _refuse_other_losses(loss, value, name)
    loss.backward(value)
    if loss.vector.all(all(parameter.grad is None for parameter in loss.model.parameters)):
        raise PhasewatchError(
            f"Probe(loss={name}): the gradient of {name}(model, batch) reaches no parameter of the model it was "
            "given. Call the model that comes as its argument, not another one, such as the one in training."
        )
    loss.model.refresh()
    _refuse_other_gradients(loss, batch, float(value.detach()), name)
    clear_gradients(loss.model.parameters)
    value = value.detach()
    take_gradients_along(loss, batch, value)
    with torch.no_grad():
        again = loss.value(batch)
    if not torch.allclose(again, value, rtol=max(1e-3, loss.tolerance / 10)):
        warn(
            f"Probe(loss={name}): {name}(model, batch) returned {value.item():g} and then {again.item():g} "
            "for the same weights and minibatch. What is drawn inside it adds noise to λ̂; draw it in data instead."
        )
    elif is_a_sum(loss, batch, value):
        warn(
            f"Probe(loss={name}): {name}(model, batch) doubles when the minibatch comes twice, so it is a sum and "
            "not the mean over the minibatch. λ̂ is then that of nbeta * batch_size; divide by the batch size."
        )


def _refuse_other_losses(loss: ShardedLoss, value: Tensor, name: str) -> None:
    """All processes took the same minibatch, so that they have the same loss if they hold one model."""
    found = [torch.zeros((), dtype=torch.float64, device=value.device) for _ in range(loss.vector.ranks)]
    dist.all_gather(found, value.detach().double())
    losses = [float(one) for one in found]
    if max(losses) - min(losses) > loss.tolerance * max(map(abs, losses)):
        raise PhasewatchError(
            f"Probe(loss={name}): on the same minibatch {name}(model, batch) is {min(losses):g} on one process and "
            f"{max(losses):g} on another, so they don't hold one model. The function that builds it must build the "
            "same on every rank, with torch.manual_seed and one seed, say. If the loss itself takes another share of "
            "the batch on each rank, have it take all."
        )


def _refuse_other_gradients(loss: ShardedLoss, batch: Any, value: float, name: str) -> None:
    """The loss has to change along the gradient by the gradient's length."""
    vector = loss.vector
    grads = list(gradients(loss.model.parameters, None))
    before = [parameter.detach().clone() for parameter in loss.model.parameters]
    length, weights = vector.norm(grads), vector.norm(loss.model.parameters)
    if not 0 < length < float("inf"):
        return
    rounding = 1e-2 if loss.tolerance > 1e-3 else 3e-7
    ratios = []
    for share in REACHES:
        reach = share * max(weights, 0.01 * vector.size**0.5)
        ends = [_value_along(loss, batch, before, grads, sign * reach / length) for sign in (1, -1)]
        ratio = (ends[0] - ends[1]) / (2 * reach * length)
        if abs(ratio - 1) <= OFF + 4 * rounding * abs(value) / (reach * length):
            return
        ratios.append(ratio)
    raise PhasewatchError(
        f"Probe(loss={name}): along its gradient the loss changes by {ratios[-1]:.3g} of what the gradient says. The "
        f"gradients of {vector.ranks} processes are to be averaged: leave set_gradient_divide_factor and "
        "set_requires_gradient_sync of fully_shard as they are, and don't scale the loss by the number of ranks."
    )


@torch.no_grad()
def _value_along(
    loss: ShardedLoss, batch: Any, before: Sequence[Tensor], grads: Sequence[Tensor], alpha: float
) -> float:
    loss.model.set([own.add(grad, alpha=alpha) for own, grad in zip(before, grads, strict=True)])
    value = float(loss.value(batch))
    loss.model.set(before)
    return value
