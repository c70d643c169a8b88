"""A model's loss at many sets of weights at once, as one vectorised axis (`torch.func.vmap`)."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.outputs import scalar_of
from phasewatch.monitor.model.weights import SampledModel, Weights

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""The kernels of attention that are right under `vmap`. Of the others, the memory-efficient one raises in the backward
pass, and cuDNN's returns wrong gradients without an error (torch 2.11 on an H200)."""


class VectorisedLoss:
    """The loss of a model at rows of weights, each on a minibatch of its own.

    Args:
        model: whose parameters the weights stand for.
        loss: `loss(model, batch)`, a scalar tensor.

    Attributes:
        leaves_something: whether an evaluation sets attributes of the model's modules, which are then put back.
    """

    def __init__(self, model: SampledModel, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        self._model = model
        self._slots = _slots(model)
        self._called = _LossModule(model.module, loss)
        self.leaves_something = False
        self._compiled: dict[int, Callable[[Weights, Any], Tensor]] = {}

    def rows(self, weights: Weights, batches: Batches) -> Tensor:
        """The loss of each row of weights on its own minibatch.

        Args:
            weights: each of shape (row, ...), or without the leading axis for all rows.
            batches: a minibatch for each row, of one shape.

        Returns:
            Shape (row,).
        """
        torch.clear_autocast_cache()  # it may hold half-precision copies of other weights
        shared = weights[0].shape == self._model.parameters[0].shape
        with torch.no_grad(), sdpa_kernel(ATTENTION), attention_of_one_type(), self._left_as_it_was():
            return vmap(self._functional_loss, (None if shared else 0, 0))(weights, batches.stacked)

    def rows_and_gradients(self, weights: Weights, batches: Batches) -> tuple[Tensor, Weights]:
        """The loss of each row of weights on its own minibatch, and its gradient.

        Args:
            weights: each of shape (row, ...).
            batches: a minibatch for each row, of one shape.

        Returns:
            Losses of shape (row,), and gradients of the weights' shapes.
        """
        torch.clear_autocast_cache()
        leaves = [weight.detach().requires_grad_() for weight in weights]
        function = self._compiled.get(len(weights[0])) or vmap(self._functional_loss)
        with sdpa_kernel(ATTENTION), attention_of_one_type(), self._left_as_it_was():
            losses = function(leaves, batches.stacked)
            grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        return losses.detach(), [grad if grad.layout is torch.strided else grad.to_dense() for grad in grads]

    def is_compiled(self, rows: int) -> bool:
        """Whether `compile` was called for this many rows."""
        return rows in self._compiled

    def compile(self, rows: int) -> None:
        """Compile for this many rows, on a GPU."""
        from phasewatch.monitor.model.compiled import compiled

        self._compiled[rows] = compiled(vmap(self._functional_loss))

    def leave_uncompiled(self, rows: int) -> None:
        """Take the plain function for this many rows from now on."""
        self._compiled[rows] = vmap(self._functional_loss)

    def forget_compiled(self, rows: int) -> None:
        """Let `compile` be tried again."""
        self._compiled.pop(rows, None)

    def _left_as_it_was(self) -> AbstractContextManager[Any]:
        return self._model.attributes_kept() if self.leaves_something else nullcontext()

    def _functional_loss(self, weights: Weights, batch: Any) -> Tensor:
        tensors = {}
        for name, weight, parameter in zip(self._model.names, weights, self._model.parameters, strict=True):
            tensors |= dict.fromkeys(self._slots[name], weight.to(parameter.dtype))
        return functional_call(self._called, tensors, (batch,), tie_weights=False)


@contextmanager
def attention_of_one_type() -> Iterator[None]:
    """Cast what attention takes to the type of mixed precision, as torch does, but not under `vmap` on a GPU.

    Rotary positions, say, leave queries and keys in float32 beside values in bfloat16.
    """
    attention = F.scaled_dot_product_attention

    @functools.wraps(attention)
    def cast(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        place = query.device.type
        if torch.is_autocast_enabled(place) and not query.dtype == key.dtype == value.dtype:
            dtype = torch.get_autocast_dtype(place)
            query, key, value = (each.to(dtype) for each in (query, key, value))
            attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        return attention(query, key, value, attn_mask, *args, **kwargs)

    F.scaled_dot_product_attention = cast
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


class _LossModule(nn.Module):
    """A loss as a module, so that `functional_call` reaches a model however the loss uses it."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return scalar_of(self.loss(self.model, batch))


def _slots(model: SampledModel) -> dict[str, list[str]]:
    """Where each parameter sits: every attribute of every module object, named once, as the loss module sees it.

    A parameter tied in two places has two slots. A module reachable by two names has one: naming it twice makes
    `functional_call` put the sampled weights back for good.
    """
    first_name = {id(parameter): name for name, parameter in zip(model.names, model.parameters, strict=True)}
    slots: dict[str, list[str]] = {name: [] for name in model.names}
    for module_name, module in model.module.named_modules(prefix="model"):
        for attribute, parameter in module._parameters.items():
            if id(parameter) in first_name:
                slots[first_name[id(parameter)]].append(f"{module_name}.{attribute}")
    return slots
