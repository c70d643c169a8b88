"""A copy of the user's model to measure with, so that the one in training is never run, switched or hooked into."""

import copy

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.snapshot import unwrap


def own_copy(model: nn.Module) -> nn.Module:
    """Copy a module without gradients and without the user's hooks.

    Tensors that a forward pass left on the module are detached. Hooks that the user registered stay behind, since
    they would write the chains' activations where training's belong; those of torch itself, such as weight
    normalisation's, come along. The mixed precision that accelerate's `prepare` puts around `forward` stays behind too,
    as wrappers do: `Probe(autocast=...)` measures in it.

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
    model = unwrap(model)
    detached = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in tree_leaves(list(vars(module).values()))
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    try:
        copied = copy.deepcopy(model, detached)
    except Exception as error:
        raise PhasewatchError(
            f"Probe(model={type(model).__name__}(...)) can't copy the model ({error}). "
            "Give the function that builds it instead: Probe(make_model, ...)."
        ) from error
    for parameter in copied.parameters():
        parameter.grad = None
    for module in copied.modules():
        _remove_hooks_of_the_user(module)
        _remove_wrapper_of_accelerate(module)
    return copied


def _remove_wrapper_of_accelerate(module: nn.Module) -> None:
    """Go back to the class's own `forward`, which accelerate keeps beside its wrapped one."""
    original = vars(module).get("_original_forward")
    if original is not None and getattr(original, "__func__", None) is type(module).forward:
        del module.forward, module._original_forward


def _remove_hooks_of_the_user(module: nn.Module) -> None:
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ):
        for key, hook in list(hooks.items()):
            if not getattr(hook, "__module__", type(hook).__module__).startswith("torch."):
                del hooks[key]
