"""A copy of the user's model to measure with, so that the one in training is never run, switched or hooked into."""

import copy
import gc
import io
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils._pytree import tree_leaves

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.random_state import parts_of
from phasewatch.monitor.model.rebinding import Rebinding, methods_of_copies, without_compilation
from phasewatch.monitor.snapshots.sharded import is_sharded
from phasewatch.monitor.snapshots.snapshot import unwrap

_FORWARD_HOOKS = "_forward_hooks", "_forward_pre_hooks"
_BACKWARD_HOOKS = "_backward_hooks", "_backward_pre_hooks"
_SHARED = (
    type(threading.Lock()), type(threading.RLock()), threading.local, threading.Thread, io.IOBase, types.GeneratorType,
)  # fmt: skip
"""What has no copy and holds no weights: a model that has such an attribute shares it with its copy."""

_CAST = "_original_forward"
"""Where accelerate keeps the `forward` that it puts mixed precision around."""


class Hook(NamedTuple):
    """A forward hook of the user's, as it is for the copy.

    Attributes:
        module: of the copy.
        kind: the module's attribute that holds hooks of its kind.
        key: the hook's place in it.
        function: the hook, with a closure of its own.
    """

    module: nn.Module
    kind: str
    key: int
    function: Any

    def attach(self) -> None:
        """Have the module call it."""
        getattr(self.module, self.kind)[self.key] = self.function

    def detach(self) -> None:
        """Have the module no longer call it."""
        getattr(self.module, self.kind).pop(self.key, None)


@dataclass(frozen=True)
class Copied:
    """A copy of a model.

    Attributes:
        module: the copy, without the user's hooks.
        hooks: the user's forward hooks; which of them are part of the function is for their outputs to show.
        rounded: whether a wrapper that computes in mixed precision stayed behind.
    """

    module: nn.Module
    hooks: list[Hook]
    rounded: bool


def own_copy(model: nn.Module) -> nn.Module:
    """The module of `copy_of`.

    Args:
        model: any module.

    Returns:
        The copy.

    Raises:
        PhasewatchError: if the module can't be copied.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model(model.weight).sum().backward()
        >>> own_copy(model).weight.grad is None
        True
    """
    return copy_of(model).module


LARGE = 2**28
"""Parameters from which another set of a model's weights is avoided: one that was built for a probe isn't copied."""


def copy_of(model: nn.Module, *, built: bool = False) -> Copied:
    """Copy a module without gradients and without the user's hooks.

    Tensors that a forward pass left on the module are detached. Functions that its objects hold, such as a patched
    `forward`, are bound to the copy. Hooks that the user registered are handed back apart, with closures of their own,
    since they would write the chains' activations where training's belong; those of torch itself, such as weight
    normalisation's, come along. The mixed precision that accelerate's `prepare` puts around `forward` stays behind, as
    wrappers do: `Probe(autocast=...)` measures in it. Embeddings are made such that their gradient is that of the loss.

    Args:
        model: any module.
        built: whether it was built for the probe; a large one that nothing else refers to is then taken as it is, and
            so is one that is sharded over processes.

    Returns:
        The copy.

    Raises:
        PhasewatchError: if the module can't be copied.
    """
    model = unwrap(model)
    if is_sharded(model) and built:
        return _prepared(model, hooks_apart=False)  # some of them may make the processes one model
    if is_sharded(model):
        raise PhasewatchError(
            f"Probe(model={type(model).__name__}(...)) is spread over several processes (FSDP, tensor parallelism or "
            "ZeRO 3), and a probe measures a whole model of its own. Give the function that builds it: "
            "Probe(make_model, ...)."
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise PhasewatchError(
            f"Probe(model={type(model).__name__}(...)) has parts that torch.jit compiled, whose weights no copy can be "
            "given. Give the model that they were compiled from, or the function that builds it."
        )
    large = not is_lazy(model) and sum(parameter.numel() for parameter in model.parameters()) > LARGE
    return _prepared(model if built and large and not _is_referred_to(model) else _copied(model))


def is_lazy(model: nn.Module) -> bool:
    """Whether some of a model's weights have no shape before its first batch."""
    return any(isinstance(tensor, UninitializedTensorMixin) for tensor in [*model.parameters(), *model.buffers()])


def whole_copy(model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> nn.Module:
    """As `own_copy`, of a module that ZeRO 3 has spread over processes.

    Args:
        model: the module, left as it is.
        parameters: the whole of each parameter, by the `id` of the one in the module.

    Returns:
        The copy.

    Raises:
        PhasewatchError: if the module can't be copied.
    """
    return _prepared(_copied(unwrap(model), parameters)).module


def _copied(model: nn.Module, parameters: Mapping[int, nn.Parameter] | None = None) -> nn.Module:
    """A copy that holds the parameters given in place of copies of the model's."""
    memo: dict[int, Any] = dict(parameters or {})
    memo |= {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in tree_leaves(list(vars(module).values()))
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    memo |= {id(part): part for part in parts_of((model,), through_globals=False) if isinstance(part, _SHARED)}
    try:
        with methods_of_copies():
            functions = Rebinding(model, memo)
            without_compilation(model, memo)
            copied = copy.deepcopy(model, memo)
            functions.bind()
    except Exception as error:
        raise PhasewatchError(
            f"Probe(model={type(model).__name__}(...)) can't copy the model ({error}). "
            "Give the function that builds it instead: Probe(make_model, ...)."
        ) from error
    return copied


def _is_referred_to(model: nn.Module) -> bool:
    """Whether anything but the model itself and functions that run holds it, a part of it, or a parameter."""
    modules, parameters = list(model.modules()), list(model.parameters())
    own = {id(modules), id(parameters)}
    for module in modules:
        own |= {id(vars(module)), id(module._modules), id(module._parameters)}
    referrers = gc.get_referrers(*modules, *parameters)
    return any(id(found) not in own and not isinstance(found, FrameType) for found in referrers)


def _prepared(copied: nn.Module, *, hooks_apart: bool = True) -> Copied:
    """A module of our own as it is measured."""
    for parameter in copied.parameters():
        parameter.grad = None
    hooks, rounded = [], False
    for module in copied.modules():
        hooks += _without_hooks_of_the_user(module) if hooks_apart else []
        rounded |= _without_wrapper_of_accelerate(module)
        _uncompiled(module)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            _with_gradient_of_the_loss(module)
    return Copied(copied, hooks, rounded)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Run a user's model inside in evaluation mode and without the user's hooks, and leave no trace of it.

    Attributes, containers among them, buffers, and parameters that a forward pass writes to are put back bit for bit.

    Args:
        model: the model.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    kept = {id(v): v for of_one in attributes for v in of_one.values() if isinstance(v, dict | list | set)}
    contents = [(container, container.copy()) for container in kept.values()]
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        for module in modules:
            vars(module)["training"] = False
            for kind in _FORWARD_HOOKS + _BACKWARD_HOOKS:
                hooks = vars(module)[kind]
                vars(module)[kind] = type(hooks)((k, h) for k, h in hooks.items() if not _is_of_the_user(h))
        yield
    finally:
        for tensor, before in tensors:
            if not torch.equal(tensor.detach(), before):
                tensor.data.copy_(before)
        for module, before in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(before)
        for container, before in contents:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)


def _is_of_the_user(hook: Any) -> bool:
    return not getattr(hook, "__module__", type(hook).__module__).startswith("torch.")


def _without_hooks_of_the_user(module: nn.Module) -> Iterable[Hook]:
    taken = []
    for kind in _FORWARD_HOOKS + _BACKWARD_HOOKS:
        hooks = getattr(module, kind)
        for key, hook in list(hooks.items()):
            if _is_of_the_user(hook):
                del hooks[key]
                if kind in _FORWARD_HOOKS:
                    taken.append(Hook(module, kind, key, hook))
    return taken


def _without_wrapper_of_accelerate(module: nn.Module) -> bool:
    """Go back to the class's own `forward`, which accelerate keeps beside its wrapped one."""
    original = vars(module).get(_CAST)
    if original is None or not _is_same_function(getattr(original, "__func__", None), type(module).forward):
        return False
    del module.forward, module._original_forward
    return True


def _is_same_function(copied: Any, function: Any) -> bool:
    """Whether a function is another one, or the copy that a decorated one, whose closure holds it, gets."""
    names = "__code__", "__module__", "__qualname__"
    return copied is function or all(
        getattr(copied, name, None) is not None and getattr(copied, name) == getattr(function, name, None)
        for name in names
    )


def _uncompiled(module: Any) -> None:
    """Run a block that was compiled by itself as it was before, as a model that was compiled as a whole is."""
    if type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module):
        module.forward = module._orig_mod.__call__


def _with_gradient_of_the_loss(module: nn.Embedding | nn.EmbeddingBag) -> None:
    """Take away what makes an embedding's gradient another one than its loss has, or a sparse one.

    The row of `padding_idx` is held fast by `padding_rows` where it isn't trained.
    """
    module.sparse = False
    module.scale_grad_by_freq = False
    if type(module).forward is nn.Embedding.forward:
        cast(Any, module).__class__ = type(type(module).__name__, (_PlainEmbedding, type(module)), {})
    elif type(module).forward is nn.EmbeddingBag.forward and module.max_norm is not None:
        cast(Any, module).__class__ = type(type(module).__name__, (_CappedEmbeddingBag, type(module)), {})


def padding_rows(model: nn.Module) -> dict[str, Tensor]:
    """Rows of embeddings that training leaves as they are, since no gradient reaches `padding_idx`.

    A weight that another module uses too, such as a tied output layer, is trained through that one, and moves.

    Args:
        model: a module of `copy_of`.

    Returns:
        For each such weight, by its first name, a boolean mask of its shape, False in the row.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for module in model.modules():
        row = module.padding_idx if isinstance(module, nn.Embedding | nn.EmbeddingBag) else None
        if row is not None and owners.get(id(module.weight)) == 1 and id(module.weight) in names:
            mask = torch.ones(module.weight.shape, dtype=torch.bool)  # pyright: ignore[reportCallIssue, reportArgumentType]
            mask[row] = False
            found[names[id(module.weight)]] = mask
    return found


def _capped(module: Any) -> Tensor:
    """The rows no longer than `max_norm`, as a function of the weights instead of a change to them."""
    if module.max_norm is None:
        return module.weight
    norms = torch.linalg.vector_norm(module.weight, module.norm_type, dim=1, keepdim=True)
    return module.weight * torch.where(norms > module.max_norm, module.max_norm / (norms + 1e-7), 1.0)


class _PlainEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, _capped(self))


class _CappedEmbeddingBag(nn.EmbeddingBag):
    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return F.embedding_bag(
            input, _capped(self), offsets, mode=self.mode, per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset, padding_idx=self.padding_idx,
        )  # fmt: skip
