"""What a loss reads: which tensors, and in which precision."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Reading:
    """Watches one evaluation of a loss.

    Args:
        foreign: a model whose tensors it shouldn't read; None for none.

    Attributes:
        found: the name of such a tensor that it read; "" if it read none.
        rough: whether a tensor of half precision was among what it read.
    """

    def __init__(self, foreign: nn.Module | None) -> None:
        self.found = ""
        self.rough = False
        self._names: dict[int, str] = {}
        if foreign is not None:
            for name, tensor in [*foreign.named_parameters(), *foreign.named_buffers()]:
                if type(tensor.data) is Tensor and tensor.numel():
                    self._names[tensor.untyped_storage().data_ptr()] = name

    def of(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """Evaluate, and watch if that can be watched."""
        try:
            with _Watch(self._see):
                return evaluate()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what is compiled can't be watched
            return evaluate()

    def _see(self, tensor: Tensor) -> None:
        self.rough |= tensor.dtype in {torch.bfloat16, torch.float16}
        if not self.found and tensor.layout is torch.strided and tensor.numel():
            self.found = self._names.get(tensor.untyped_storage().data_ptr(), "")


class _Watch(TorchDispatchMode):
    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see_tensor = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._see_tensor(leaf)
        return func(*args, **(kwargs or {}))


def leaves_of(value: Tensor) -> set[int]:
    """The numbers, by `id`, of the tensors that the gradient of a value goes to.

    Args:
        value: with its graph.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> leaves_of((3 * weight).sum()) == {id(weight)}
        True
    """
    waiting, seen, found = [value.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))  # pyright: ignore[reportAttributeAccessIssue]
        waiting += [after for after, _ in node.next_functions]
    return found
