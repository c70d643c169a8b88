"""What a loss itself gets wrong: what it returns, what it writes to, and what it depends on beside the model."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from phasewatch.monitor.errors import PhasewatchError, warn
from phasewatch.monitor.model.isolation import untouched_randomness
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.random_state import parts_of

ALIKE = 1e-3
"""How far the losses of a model and of its copy may be apart, relative to the loss."""

SEED = 2**31 - 1
"""Of the global random streams where two losses are compared; no probe is likely to have it, so that a loss which draws
from them isn't taken for one that doesn't."""


def check_scalar(value: Any, name: str) -> None:
    """Refuse what isn't a real, finite scalar with a gradient.

    Raises:
        PhasewatchError: if it isn't.
    """
    if not isinstance(value, Tensor) or value.ndim != 0:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise PhasewatchError(
            f"Probe(loss={name}): {name}(model, batch) returned {came}; "
            "it must return a scalar tensor, the mean over the batch"
            f"{', so perhaps .mean() is missing' if isinstance(value, Tensor) else ''}."
        )
    if value.is_complex():
        raise PhasewatchError(
            f"Probe(loss={name}): {name}(model, batch) returned a complex number, which has no lowest value. Return "
            "its absolute value or its real part."
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


def take_gradients_along(loss: ModelLoss, batch: Any, value: Tensor) -> None:
    """Have a loss evaluated as in training wherever it is another one, or none, without gradients."""
    try:
        with torch.no_grad(), untouched_randomness(SEED):
            found = loss.value(batch)
        loss.with_gradient = not torch.allclose(found.detach(), value.detach(), rtol=ALIKE, equal_nan=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a gradient penalty, say
        loss.with_gradient = True


def say_what_else_trains(loss: ModelLoss, leaves: Collection[int], original: nn.Module | None, name: str) -> None:
    """Name tensors with a gradient that the loss holds and depends on, and that aren't the model's."""
    models = [model for model in (loss.model.module, original) if model is not None]
    own = {id(tensor) for model in models for tensor in model.parameters()}
    held = list(parts_of((loss.loss,)))
    strangers = {id(part) for part in held if isinstance(part, Tensor)} & set(leaves) - own
    if not strangers:
        return
    modules = [part for part in held if isinstance(part, nn.Module) and part not in models]
    names = {id(p): f"{type(m).__name__}.{n}" for m in modules for n, p in m.named_parameters(recurse=False)}
    what = some_of([names.get(number, "a tensor") for number in strangers])
    warn(
        f"Probe(loss={name}): the loss depends on {what}, with requires_grad=True and not a part of the model. λ̂ is "
        "that of the model alone, and no snapshot holds the rest. If it is trained, make it a part of the model; if "
        "not, detach it."
    )


def say_what_is_written(loss: ModelLoss, versions: Sequence[int], name: str) -> bool:
    """Name weights that an evaluation of the loss writes to."""
    of = zip(loss.model.names, loss.model.parameters, versions, strict=True)
    if written := [n for n, parameter, version in of if parameter._version != version]:
        warn(
            f"Probe(loss={name}): {name}(model, batch) writes to {some_of(written)} while it is evaluated, in "
            "evaluation mode too, as F.embedding(max_norm=...) and clipping do. Chains are moved by it, so λ̂ isn't "
            "that of the loss. Do that after a training step, or use what it makes without writing it to the weights."
        )
    return bool(written)


def is_a_sum(loss: ModelLoss, batch: Any, value: Tensor) -> bool:
    """Whether a loss doubles with a minibatch that holds every sample twice; False where that can't be tried."""
    try:
        doubled = tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, batch)
        with torch.no_grad():
            twice = loss.value(doubled)
        return bool(abs(twice - 2 * value) < 1e-3 * abs(value))
    except Exception:
        return False


def some_of(names: Collection[str] | Collection[int]) -> str:
    """A few names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(map(str, ordered[:3])) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
