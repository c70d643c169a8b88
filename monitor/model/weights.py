"""A model and its loss as a function of flat weights, one row a chain."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves

from phasewatch.monitor.errors import PhasewatchError, warn
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.snapshots.names import aliases_of, match_names, optional_buffers
from phasewatch.monitor.snapshots.snapshot import Snapshot, named_tensors, unwrap

Loss = Callable[[nn.Module, Any], Tensor]

LARGEST_VECTORISED_ROW = 8 * 2**20
"""Bytes that a chain takes from which a CPU is faster with one chain after another, which stays in its caches."""

AS_NEAR = 1.5
"""How far from full precision one mixed-precision gradient may be, in units of how far another is (0.8 to 1.3 seen)."""


class FlatMasks(Sequence[Tensor | None]):
    """Masks of parts over a flat vector, each made when it is asked for: those of every head weigh more than a model.

    Args:
        moving: the numbers of each part's weights, shape (number,); None for all of them.
        size: of the vector.
        device: where to make them.
    """

    def __init__(self, moving: list[Tensor | None], size: int, device: torch.device) -> None:
        self._moving = moving
        self._size = size
        self._device = device

    def __len__(self) -> int:
        return len(self._moving)

    def __getitem__(self, part: int) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Booleans of shape (parameter,), or None for all."""
        numbers = self._moving[part]
        if numbers is None:
            return None
        mask = torch.zeros(self._size, dtype=torch.bool)
        mask[numbers] = True
        return mask.to(self._device)

    @property
    def sizes(self) -> list[int]:
        """How many weights each part has."""
        return [self._size if numbers is None else len(numbers) for numbers in self._moving]


class FlatModel:
    """A model of our own in evaluation mode, whose trainable parameters are read and sampled as one flat vector.

    The chains are one vectorised axis (`torch.func.vmap`), where that is faster. A model that can't be vectorised is
    run chain after chain with the same weights and minibatches, and says so once.

    Args:
        model: the module; it is kept and changed, so give a copy (see `own_copy`).
        loss: `loss(model, batch)`, a scalar tensor.
        device: where to keep it; the model's own if None.
        only: the trainable parameters that are sampled, by their first names; all if None.

    Raises:
        PhasewatchError: if the model has no trainable parameters, or lies on the `meta` device.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, device: torch.device | None = None, only: Collection[str] | None = None
    ) -> None:
        tensors = dict(named_tensors(model))
        if any(tensor.is_meta for tensor in tensors.values()):
            raise PhasewatchError(
                "Probe(model=...) lies on the meta device, which holds shapes and no weights. "
                "Build it on a real device, or call model.to_empty(device=...) and load its weights first."
            )
        self.trainable = [n for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
        if not self.trainable:
            raise PhasewatchError(
                f"Probe(model={type(model).__name__}(...)) has no parameters with requires_grad=True, so there is "
                "nothing to sample. Give the model that is trained, with the parameters that are trained unfrozen."
            )
        if only is not None:
            self.trainable = [name for name in self.trainable if name in only]
        self.device = device or tensors[self.trainable[0]].device
        elsewhere = any(tensor.device != self.device for tensor in tensors.values())
        self.model = (model.to(self.device) if elsewhere else model).eval()
        _separate_overlapping_buffers(self.model)
        self.loss = loss
        self.vectorised = True
        self._tensors = dict(named_tensors(self.model))
        self._aliases = aliases_of(self.model)
        self._optional = {name: self._tensors[name].clone() for name in optional_buffers(self.model)}
        self._slots = _slots(self.model, self.trainable)
        self._shapes = [self._tensors[name].shape for name in self.trainable]
        self._sizes = [shape.numel() for shape in self._shapes]
        dtypes = {self._tensors[name].dtype for name in self.trainable}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        precisions = {*dtypes, getattr(loss, "autocast", self.dtype)}
        self._tolerance = (
            1e-6 if precisions == {torch.float64} else 1e-3 if min(d.itemsize for d in precisions) > 2 else 0.05
        )
        self._called = _LossModule(self.model, loss)
        self._warned: set[str] = set()
        self._compiled: dict[int, Callable[[list[Tensor], Any], Tensor]] = {}

    @property
    def size(self) -> int:
        """How many numbers are sampled."""
        return sum(self._sizes)

    @property
    def held(self) -> list[Tensor]:
        """The parameters and buffers that are not sampled."""
        return [tensor for name, tensor in self._tensors.items() if name not in self.trainable]

    def flat_masks(self, masks: Sequence[Mapping[str, Tensor] | None]) -> "FlatMasks":
        """Masks by parameter as rows over the flat vector; None stands for all of it.

        Args:
            masks: for each part, booleans of its parameters' shapes.
        """
        numbers = torch.arange(self.size).split(self._sizes)
        moving: list[Tensor | None] = []
        for mask in masks:
            found = None
            if mask is not None:
                flat = zip(self.trainable, numbers, strict=True)
                found = torch.cat([some[mask[name].flatten().cpu()] for name, some in flat if name in mask])
            moving.append(None if found is None or len(found) == self.size else found)
        return FlatMasks(moving, self.size, self.device)

    def bytes_of_a_row(self, batch: Any) -> int:
        """Memory that one more row takes: what the backward pass needs, and the row's weights, gradient and noise.

        Args:
            batch: a minibatch.
        """
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self.loss(self.model, batch)
        return 2 * sum(kept.values()) + 6 * self.size * self.dtype.itemsize

    def weights(self) -> Tensor:
        """The trainable parameters, flat, shape (parameter,)."""
        return torch.cat([self._tensors[name].detach().flatten().to(self.dtype) for name in self.trainable])

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Take over a snapshot's weights, whichever of a tensor's names the snapshot uses, in evaluation mode.

        Non-persistent buffers that the snapshot lacks become what they were when the model was given.

        Args:
            snapshot: of this model or one built like it.

        Raises:
            PhasewatchError: if a tensor is missing or has another shape.
        """
        match = match_names(snapshot.tensors.keys(), self._aliases, self._optional, step=snapshot.step)
        if match.left_out:
            self._warn_once(
                f"{match.left_out[0]} of the snapshots is not in the probe's model and is left out.", "unknown"
            )
        found = self._optional | {own: snapshot.tensors[saved] for own, saved in match.names.items()}
        for name, tensor in found.items():
            own = self._tensors[name]
            if own.shape != tensor.shape:
                raise PhasewatchError(
                    f"In the snapshot of step {snapshot.step}, {name} has shape {tuple(tensor.shape)} where the "
                    f"probe's model has {tuple(own.shape)}. Build the probe with the model that was saved."
                )
        for name, tensor in found.items():
            self._tensors[name].copy_(tensor)
        self.model.eval()

    def losses(self, weights: Tensor, batches: Batches) -> Tensor:
        """The loss of each row of weights on its own minibatch.

        Args:
            weights: shape (row, parameter), or (parameter,) for all rows.
            batches: a minibatch for each row.

        Returns:
            Shape (row,).
        """
        with torch.no_grad():
            if self.vectorised and batches.stacked is not None:
                in_dims = (None if weights.ndim == 1 else 0, 0)
                return vmap(self._functional_loss, in_dims)(self._pieces(weights), batches.stacked)
            rows = weights.expand(len(batches), -1)
            return torch.stack([self._loss_at(row, batches[i]) for i, row in enumerate(rows)])

    def losses_and_grads(self, weights: Tensor, batches: Batches) -> tuple[Tensor, Tensor]:
        """The loss of each row of weights on its own minibatch, and its gradient.

        Args:
            weights: shape (row, parameter).
            batches: a minibatch for each row.

        Returns:
            Losses of shape (row,) and gradients of shape (row, parameter).
        """
        if self.vectorised and batches.stacked is not None:
            pieces = [piece.detach().requires_grad_() for piece in self._pieces(weights)]
            losses = self._vectorised(len(weights))(pieces, batches.stacked)
            grads = torch.autograd.grad(losses.sum(), pieces, allow_unused=True, materialize_grads=True)
            return losses.detach(), torch.cat([grad.reshape(len(weights), -1) for grad in grads], dim=1)
        grads = torch.empty_like(weights)
        losses = [self._loss_and_grad_at(row, batches[i], grads[i]) for i, row in enumerate(weights)]
        return torch.stack(losses), grads

    def reaches(self, loss: Tensor) -> bool:
        """Whether the gradient of a loss of this model reaches any of its trainable parameters."""
        parameters = [self._tensors[name] for name in self.trainable]
        return any(grad is not None for grad in torch.autograd.grad(loss, parameters, allow_unused=True))

    def choose_path(self, batches: Batches) -> None:
        """Vectorise if the vectorised loss and gradient are those of the plain model; say so once if they aren't.

        On a CPU, rows too large for its caches run one after another all the same, and nothing is said.

        Args:
            batches: two or more minibatches.
        """
        if batches.stacked is None:
            batches = Batches([batches[0]] * len(batches))
        own, weights = self.weights(), self._nearby(len(batches))
        self.vectorised = False
        plain = *self.losses_and_grads(weights, batches), self.losses(weights, batches)
        self._load_flat(own)
        self.vectorised = True
        try:
            vectorised = *self.losses_and_grads(weights, batches), self.losses(weights, batches)
        except Exception as error:
            reason = _first_line(error)
        else:
            if self._agree(plain, vectorised, self._tolerance, weights, batches):
                in_cache = self.device.type != "cpu" or self.bytes_of_a_row(batches[0]) < LARGEST_VECTORISED_ROW
                self.vectorised = in_cache
                return
            reason = "its vectorised loss differs from its plain one"
        self.vectorised = False
        self._warn_once(
            f"The chains run one after another, which is slower: {type(self.model).__name__} "
            f"can't be vectorised ({reason}).",
            "path",
        )

    def prepare(self, batches: Batches) -> None:
        """Compile the vectorised loss for this many rows, on a GPU; where that can't be done right, say so once.

        Args:
            batches: a minibatch for each row.
        """
        if self.vectorised and self.device.type == "cuda" and len(batches) not in self._compiled:
            self._compile(batches)

    def _compile(self, batches: Batches) -> None:
        rows, plain = len(batches), vmap(self._functional_loss)
        self._compiled[rows] = plain
        weights = self._nearby(rows)
        expected = self.losses_and_grads(weights, batches)
        try:
            from phasewatch.monitor.model.compiled import compiled

            self._compiled[rows] = compiled(plain)
            found = self.losses_and_grads(weights, batches)
            exact = torch.get_float32_matmul_precision() == "highest"
            tolerance = self._tolerance if exact else max(self._tolerance, 0.05)
            if self._agree(expected, found, tolerance, weights, batches):
                return
            reason = "its compiled loss differs from its plain one"
        except torch.OutOfMemoryError:
            del self._compiled[rows]
            raise
        except Exception as error:
            reason = _first_line(error)
        self._compiled[rows] = plain
        self._warn_once(
            f"The chains run uncompiled, which is slower: {type(self.model).__name__} can't be compiled ({reason}).",
            "compiled",
        )

    def _agree(
        self, expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float, weights: Tensor, batches: Batches
    ) -> bool:
        """Whether losses, gradients, and losses once more if there are, are the expected ones but for rounding.

        At a minimum a gradient in mixed precision is a good part rounding, another on each path. There it must be as
        near to the one in full precision as the expected gradient is.
        """
        close = [_close(a, b, tolerance) for a, b in zip(expected, found, strict=True)]
        if not all(close[:1] + close[2:]):
            return False
        if close[1] or not hasattr(self.loss, "in_full_precision"):
            return close[1]
        try:
            exact = self._grads_in_full_precision(weights, batches)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a loss that needs autocast, of samples in half precision, say
            return False
        return bool((found[1] - exact).norm() <= AS_NEAR * (expected[1] - exact).norm())

    def _grads_in_full_precision(self, weights: Tensor, batches: Batches) -> Tensor:
        own, mixed, vectorised = self.weights(), self.loss, self.vectorised
        self.loss, self.vectorised = mixed.in_full_precision, False  # pyright: ignore[reportFunctionMemberAccess]
        try:
            return self.losses_and_grads(weights, batches)[1]
        finally:
            self.loss, self.vectorised = mixed, vectorised
            self._load_flat(own)

    def _nearby(self, rows: int) -> Tensor:
        """Weights close to its own, and no two rows alike; shape (row, parameter)."""
        spread = torch.linspace(-1e-3, 1e-3, rows, dtype=self.dtype, device=self.device)
        return self.weights() * (1 + spread.unsqueeze(-1))

    def _vectorised(self, rows: int) -> Callable[[list[Tensor], Any], Tensor]:
        return self._compiled.get(rows) or vmap(self._functional_loss)

    def _pieces(self, weights: Tensor) -> list[Tensor]:
        """The parameters in flat weights of shape (..., parameter), each copied to where its memory is aligned."""
        pieces = zip(weights.split(self._sizes, dim=-1), self._shapes, strict=True)
        return [piece.clone().unflatten(-1, shape) if shape else piece.clone().squeeze(-1) for piece, shape in pieces]

    def _functional_loss(self, pieces: list[Tensor], batch: Any) -> Tensor:
        tensors = {}
        for name, piece in zip(self.trainable, pieces, strict=True):
            tensors |= dict.fromkeys(self._slots[name], piece.to(self._tensors[name].dtype))
        return functional_call(self._called, tensors, (batch,), tie_weights=False)

    def _loss_at(self, row: Tensor, batch: Any) -> Tensor:
        self._load_flat(row)
        return self.loss(self.model, batch).to(self.dtype)

    def _loss_and_grad_at(self, row: Tensor, batch: Any, into: Tensor) -> Tensor:
        loss = self._loss_at(row, batch)
        parameters = [self._tensors[name] for name in self.trainable]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for piece, grad in zip(into.split(self._sizes), grads, strict=True):
            piece.copy_(grad.flatten())
        return loss.detach()

    @torch.no_grad()
    def _load_flat(self, row: Tensor) -> None:
        for name, shape, piece in zip(self.trainable, self._shapes, row.detach().split(self._sizes), strict=True):
            self._tensors[name].copy_(piece.reshape(shape))

    def _warn_once(self, message: str, topic: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warn(message)


class _LossModule(nn.Module):
    """A loss as a module, so that `functional_call` reaches a model however the loss uses it."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


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
        with torch.autocast(device_type, dtype):
            return loss(model, batch)

    taken.autocast = dtype  # pyright: ignore[reportAttributeAccessIssue]
    taken.in_full_precision = loss  # pyright: ignore[reportAttributeAccessIssue]
    return taken


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of a module to measure with, so that the one in training is never run, switched or hooked into.

    Tensors that a forward pass left on the module are detached. Hooks that the user registered stay behind, since
    they would write the chains' activations where training's belong; those of torch itself, such as weight
    normalisation's, come along.

    Args:
        model: any module.

    Returns:
        The copy, without gradients.

    Raises:
        PhasewatchError: if the module can't be copied.
    """
    model = unwrap(model)
    left_behind = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in tree_leaves(list(vars(module).values()))
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    try:
        copied = copy.deepcopy(model, left_behind)
    except Exception as error:
        raise PhasewatchError(
            f"Probe(model={type(model).__name__}(...)) can't copy the model ({error}). "
            "Give the function that builds it instead: Probe(make_model, ...)."
        ) from error
    for parameter in copied.parameters():
        parameter.grad = None
    for module in copied.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            for key, hook in list(hooks.items()):
                if not getattr(hook, "__module__", type(hook).__module__).startswith("torch."):
                    del hooks[key]
    return copied


def _slots(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """Where each parameter sits: every attribute of every module object, named once, as the loss module sees it.

    A parameter tied in two places has two slots. A module reachable by two names has one: naming it twice makes
    `functional_call` put the sampled weights back for good.
    """
    first_name = {id(dict(model.named_parameters())[name]): name for name in names}
    slots: dict[str, list[str]] = {name: [] for name in names}
    for module_name, module in model.named_modules(prefix="model"):
        for attribute, parameter in module._parameters.items():
            if id(parameter) in first_name:
                slots[first_name[id(parameter)]].append(f"{module_name}.{attribute}")
    return slots


def _separate_overlapping_buffers(model: nn.Module) -> None:
    """Give expanded buffers memory of their own: several elements in one place can't be written to."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and any(
                stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
            ):
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.allclose(
        a, b.to(a.dtype), rtol=tolerance, atol=tolerance * (a.abs().nan_to_num().max().item() or 1.0), equal_nan=True
    )


class LossOnBatches:
    """The loss of a model on kept minibatches, by their number: what chains sample.

    Args:
        model: the model.
        batches: the minibatches.
    """

    def __init__(self, model: FlatModel, batches: Batches) -> None:
        self._model = model
        self._batches = batches

    @property
    def minibatches(self) -> int:
        """How many there are."""
        return len(self._batches)

    @property
    def whole(self) -> bool:
        """Whether they are all there is."""
        return self._batches.whole

    def prepare(self, rows: int) -> None:
        """As `FlatModel.prepare`."""
        self._model.prepare(self._batches.take(torch.zeros(rows, dtype=torch.long, device=self._model.device)))

    def losses(self, weights: Tensor, which: Tensor) -> Tensor:
        """As `FlatModel.losses`, for minibatches of these numbers, shape (row,)."""
        return self._model.losses(weights, self._batches.take(which))

    def losses_and_grads(self, weights: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """As `FlatModel.losses_and_grads`, for minibatches of these numbers, shape (row,)."""
        return self._model.losses_and_grads(weights, self._batches.take(which))
