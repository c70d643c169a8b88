"""What a user's model, loss or data gets wrong, found as a probe is made.

It takes at most 20 passes, and is silent if all is well.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from phasewatch.monitor.errors import PhasewatchError, in_words, warn
from phasewatch.monitor.model.copying import LARGE, Copied, as_it_was
from phasewatch.monitor.model.data import HeldData, move
from phasewatch.monitor.model.isolation import untouched_randomness
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.outputs import scalar_of
from phasewatch.monitor.model.random_state import iterators_in
from phasewatch.monitor.model.reading import Reading, leaves_of
from phasewatch.monitor.probing.loss_faults import (
    ALIKE,
    SEED,
    check_scalar,
    is_a_sum,
    say_what_else_trains,
    say_what_is_written,
    some_of,
    take_gradients_along,
)
from phasewatch.monitor.probing.slopes import check_gradient, undifferentiated, unreached_rows

ROUGH = 0.05
"""The same where one of them is taken in mixed or half precision."""

MOST_HOOKS = 3
"""Hooks that are tried one by one at most; of more, all are kept if together they change the loss."""


@dataclass(frozen=True)
class Given:
    """What the probe was given, beside its copy.

    Attributes:
        model: the user's own, or None where there is none to compare with.
        copied: the copy, with the user's hooks.
        renamed: the copy's names of parameters that have another name there.
        rough: whether the copy computes in another precision.
    """

    model: nn.Module | None
    copied: Copied
    renamed: Mapping[str, str]
    rough: bool


def check(loss: ModelLoss, batch: Any, given: Given) -> tuple[set[str], dict[str, list[int]]]:
    """Find what can't be sampled, or would mean something else than the user's own function.

    Hooks that change the output are attached to the copy for good.

    Args:
        loss: of the probe's own copy of the model.
        batch: a minibatch.
        given: what the copy was made from.

    Returns:
        Parameters that the loss depends on and no gradient reaches, and rows of others. Training leaves them as they
        are, so they are to be held fast.

    Raises:
        PhasewatchError: for what can't be measured.
    """
    name = getattr(loss.loss, "__name__", "loss")
    _keep_hooks(loss, batch, given.copied)
    versions = [parameter._version for parameter in loss.model.parameters]
    with untouched_randomness(SEED):
        value = _first_value(loss, batch, name)
    check_scalar(value, name)
    written = say_what_is_written(loss, versions, name)
    first = leaves_of(value)
    _first_backward(loss, value, name)
    reached = {n for n, p in zip(loss.model.names, loss.model.parameters, strict=True) if p.grad is not None}
    if not reached:
        raise PhasewatchError(
            f"Probe(loss={name}): the gradient of {name}(model, batch) reaches no parameter of the model it was "
            "given. Call the model that comes as its argument, not another one, such as the one in training."
        )
    take_gradients_along(loss, batch, value)
    say_what_else_trains(loss, first, given.model, name)
    original = loss_of_the_original(loss, batch, given.model)
    if original is not None:
        _compare_with_the_original(loss, value, original, reached, given, name)
    again, reading = _once_more(loss, batch, given.model, first, name)
    repeats = torch.allclose(again, value.detach(), rtol=1e-3, equal_nan=True)
    if (not repeats or loss.with_gradient) and iterators_in(loss.loss):
        raise PhasewatchError(
            f"Probe(loss={name}): {name}(model, batch) takes something else from an iterator in each call. Measuring "
            "would take from it what training is to get. Draw in data instead, or hand the loss all that it needs."
        )
    if not repeats:
        warn(
            f"Probe(loss={name}): {name}(model, batch) returned {value.item():g} and then {again.item():g} "
            "for the same weights and minibatch. What is drawn inside it adds noise to λ̂; draw it in data instead."
        )
    elif is_a_sum(loss, batch, value):
        warn(
            f"Probe(loss={name}): {name}(model, batch) doubles when the minibatch comes twice, so it is a sum and "
            "not the mean over the minibatch. λ̂ is then that of nbeta * batch_size; divide by the batch size."
        )
    held: set[str] = set()
    rows: dict[str, list[int]] = {}
    if repeats and not written:
        check_gradient(loss, batch, name, rough=reading.rough)
        rows = unreached_rows(loss, batch, float(again), rough=reading.rough)
        held = undifferentiated(loss, batch, reached)
    loss.model.module.zero_grad(set_to_none=True)
    if held:
        warn(
            f"Probe(loss={name}): the loss depends on {some_of(held)}, and no gradient reaches "
            f"{'it' if len(held) == 1 else 'them'} (detached, perhaps), so training leaves "
            f"{'it' if len(held) == 1 else 'them'} as they are. {'It is' if len(held) == 1 else 'They are'} held fast."
        )
    if rows:
        where = [f"{'row' if len(some) == 1 else 'rows'} {some_of(some)} of {of}" for of, some in rows.items()]
        warn(
            f"Probe(loss={name}): the loss depends on {' and '.join(where)}, and no gradient reaches them "
            "(padding_idx, perhaps), so training leaves them as they are. They are held fast."
        )
    return held, rows


def check_rows(source: Any, rows: int, device: torch.device) -> None:
    """Say it where the same samples are others each time that they are fetched.

    Args:
        source: of minibatches.
        rows: how many samples to fetch.
        device: where to compare them.
    """
    if not isinstance(source, HeldData):
        return
    numbers = torch.arange(min(rows, source.size), device="cpu")
    first, second = (tree_leaves(move(source.rows(numbers), device)) for _ in range(2))
    if len(first) != len(second) or not all(map(_same, first, second)):
        warn(
            "Probe(data=...): the same samples are others when they are fetched again, by augmentation or masking that "
            "is drawn anew. One drawing of each minibatch is kept for all snapshots, the same in a replay."
        )


def loss_of_the_original(loss: ModelLoss, batch: Any, model: nn.Module | None) -> tuple[float, set[str]] | None:
    """The loss of a user's own model in evaluation mode, without the user's hooks, and the parameters it depends on.

    Args:
        loss: of its copy.
        batch: a minibatch.
        model: the user's, left as it is.

    Returns:
        The loss, and the parameters' names; None where it can't be run, or not without a risk.
    """
    if model is None or not _can_be_run(model):
        return None
    device = next(model.parameters()).device
    try:
        with as_it_was(model), untouched_randomness(SEED):
            torch.clear_autocast_cache()
            value = scalar_of(loss.loss(model, move(batch, device)))
            leaves = leaves_of(value)
            names = {name for name, parameter in model.named_parameters() if id(parameter) in leaves}
            return float(value.detach()), names
    except torch.OutOfMemoryError:
        raise
    except Exception:  # on another device, say; what its copy can't do is said elsewhere
        return None


def _can_be_run(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    plain = all(type(parameter.data) is Tensor for parameter in parameters)  # not sharded over processes
    # A larger one beside its copy would take a third set of its weights.
    return plain and sum(parameter.numel() for parameter in parameters) <= LARGE


def _keep_hooks(loss: ModelLoss, batch: Any, copied: Copied) -> None:
    """Attach the hooks of the user's that change the loss, each in its copied form."""
    hooks = copied.hooks
    if not hooks:
        return

    def value() -> float:
        with torch.no_grad(), untouched_randomness(SEED):
            return float(loss.value(batch))

    without = together = None
    try:
        without = value()
        for hook in hooks:
            hook.attach()
        together = value()
        alone = len(hooks) == 1 and together != without
        for hook in hooks if not alone and (len(hooks) <= MOST_HOOKS or together == without) else []:
            hook.detach()
            if together != without and value() != together:
                hook.attach()
    except Exception:  # what fails without hooks too is said of the loss
        together = None
    if together is None or together == without:
        for hook in hooks:
            hook.detach()


def _first_value(loss: ModelLoss, batch: Any, name: str) -> Any:
    try:
        return loss.value(batch)
    except (PhasewatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PhasewatchError(
            f"Probe(loss={name}): {name}(model, batch) failed on a minibatch of data ({in_words(error)}). "
            "It is called with a copy of the model and one minibatch, in this order and nothing else."
        ) from error


def _first_backward(loss: ModelLoss, value: Tensor, name: str) -> None:
    try:
        loss.backward(value)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise PhasewatchError(
            f"Probe(loss={name}): the backward pass of what {name}(model, batch) returned failed ({in_words(error)}). "
            "Return the loss itself, and leave backward() to the probe."
        ) from error


def _compare_with_the_original(
    loss: ModelLoss, value: Tensor, original: tuple[float, set[str]], reached: set[str], given: Given, name: str
) -> None:
    theirs, names = original
    sampled = set(loss.model.names)
    wanted = {given.renamed.get(parameter, parameter) for parameter in names}
    if lost := (wanted & sampled) - reached:
        raise PhasewatchError(
            f"Probe(loss={name}): in your model the loss depends on {some_of(lost)}, and in the probe's copy it "
            "doesn't. Something made from the weights is kept in the model, or a function in it belongs to the "
            "original. Give the function that builds the model: Probe(make_model, ...)."
        )
    tolerance = ROUGH if given.rough else ALIKE
    mine = float(value.detach())
    if given.copied.hooks or abs(mine - theirs) <= tolerance * max(abs(theirs), 1e-3):
        return
    warn(
        f"Probe(loss={name}): the probe's copy of the model has a loss of {mine:g} where your model has {theirs:g} in "
        "evaluation mode, so λ̂ is of another function. Give the function that builds the model: Probe(make_model, ...)."
    )


def _once_more(
    loss: ModelLoss, batch: Any, model: nn.Module | None, first: Collection[int], name: str
) -> tuple[Tensor, Reading]:
    """The loss and its gradient again, in place of the first one."""
    loss.model.module.zero_grad(set_to_none=True)
    reading = Reading(model)
    again = reading.of(lambda: loss.value(batch))
    if reading.found:
        raise PhasewatchError(
            f"Probe(model=...): the probe's copy reads {reading.found} of the model that it was copied from, through a "
            "function or an object that belongs to the original. "
            "Give the function that builds the model: Probe(make_model, ...)."
        )
    try:
        loss.backward(again)
        lost = set(first) - leaves_of(again)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        lost = set(first)
    parameters = dict(zip(loss.model.names, loss.model.parameters, strict=True))
    if names := {n for n, parameter in parameters.items() if id(parameter) in lost}:
        raise PhasewatchError(
            f"Probe(loss={name}): called again, {name}(model, batch) no longer depends on {some_of(names)}. Something "
            "made from the weights is kept between calls, by functools.cache or in an attribute, so the loss wouldn't "
            "move with them. Compute it anew in each call, at least in evaluation mode."
        )
    return again.detach(), reading


def _same(a: Any, b: Any) -> bool:
    """Whether two leaves of a batch are equal; where that can't be told, they are taken for equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if type(a) is type(b) and hasattr(a, "__dict__") and (is_dataclass(a) or type(a).__eq__ is object.__eq__):
        mine, theirs = tree_leaves(vars(a)), tree_leaves(vars(b))
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    try:
        return a is b or bool(np.all(a == b))
    except Exception:
        return True
