"""The loss of a LightningModule's `training_step`, as a function of a module and a batch."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from phasewatch.callbacks.trainers.lightning_view import HeldDataModule, Inert, SeenTrainer, values_of
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.clock import Clock

_INERT = (
    "log", "log_dict", "print", "lr_scheduler_step", "toggle_optimizer", "untoggle_optimizer", "clip_gradients",
    "configure_gradient_clipping",
)  # fmt: skip
"""Methods by which a training step logs, or steps its optimizers."""

_WHOLE = {"64-true", "16-true", "bf16-true"}
"""Precisions in which Lightning has batches of the type of the weights."""


class TrainingStepLoss:
    """What `training_step` returns or, in manual optimization, the sum of what it gives to `manual_backward`.

    The step logs nothing and steps no optimizer. It reads the plain values of its trainer, such as the epoch and the
    learning rates, as they were at the snapshot's step.

    Args:
        module: a LightningModule; only its methods are looked at.
        trainer: that trains it; left as it is.

    Attributes:
        trainer: those values.

    Raises:
        PhasewatchError: if its step takes an iterator in place of a batch.
    """

    def __init__(self, module: Any, trainer: Any) -> None:
        self.__name__ = f"{type(module).__name__}.training_step"
        parameters = list(inspect.signature(module.training_step).parameters)
        if parameters[:1] == ["dataloader_iter"]:
            raise PhasewatchError(
                f"LightningCallback(...): {self.__name__} draws its batches from dataloader_iter. Give a loss of one "
                "batch: LightningCallback(..., loss=...)."
            )
        self._takes_number = len(parameters) > 1
        self.trainer = Clock(trainer, values_of)
        self._datamodule = HeldDataModule(getattr(trainer, "datamodule", None))
        self._optimizers, self._schedulers = len(trainer.optimizers), len(trainer.lr_scheduler_configs)
        self._converts = str(trainer.precision) in _WHOLE
        self._before, self._after = (
            _is_overridden(module, name) for name in ("on_before_batch_transfer", "on_after_batch_transfer")
        )

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a scalar.

        Raises:
            PhasewatchError: if the step gives none.
        """
        module: Any = model
        losses: list[Tensor] = []
        kinds = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
        dtype = kinds[0] if self._converts and kinds else None
        with _replaced(module, self._alone(module, losses)), _default_type(dtype or torch.get_default_dtype()):
            if dtype is not None:
                batch = _in_type(batch, dtype)
            if self._before:
                batch = module.on_before_batch_transfer(batch, 0)
            if self._after:
                batch = module.on_after_batch_transfer(batch, 0)
            found = module.training_step(batch, 0) if self._takes_number else module.training_step(batch)
        if losses:
            return sum(losses[1:], losses[0])
        if isinstance(found, Mapping):
            found = found.get("loss")
        if not isinstance(found, Tensor):
            raise PhasewatchError(
                f"{self.__name__} gave no loss: it returned {type(found).__name__} and called no manual_backward. "
                "Give LightningCallback(..., loss=...)."
            )
        return found

    def _alone(self, module: Any, losses: list[Tensor]) -> dict[str, Any]:
        """What a module has in place of its trainer, and of what acts; its losses are put in a list."""

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            losses.append(loss)

        trainer = SeenTrainer(self.trainer, module, self._optimizers, self._schedulers, self._datamodule)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs] or [None]
        return {name: Inert(f"self.{name}") for name in _INERT if hasattr(type(module), name)} | {
            "_trainer": trainer,
            "manual_backward": manual_backward,
            "optimizers": lambda *args, **kwargs: _one_or_all(trainer.optimizers),
            "lr_schedulers": lambda: _one_or_all(schedulers),
            "all_gather": lambda data, *args, **kwargs: data,
        }


@contextmanager
def _replaced(module: Any, replaced: Mapping[str, Any]) -> Iterator[None]:
    """Let a module have other attributes inside; it is as it was afterwards."""
    own = vars(module)
    before = {name: own[name] for name in replaced if name in own}
    own.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del own[name]
        own.update(before)


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    """Have new tensors in double precision inside, for a module in double precision, as Lightning does."""
    before = torch.get_default_dtype()
    if dtype == torch.float64:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _in_type(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating tensors in another type."""
    from lightning_utilities.core.apply_func import apply_to_collection

    return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _one_or_all(some: list[Any]) -> Any:
    """As Lightning gives optimizers: one by itself, several in a list."""
    return some[0] if len(some) == 1 else some


def _is_overridden(module: Any, name: str) -> bool:
    for kind in type(module).__mro__:
        if name in vars(kind):
            return not kind.__module__.startswith(("lightning.", "pytorch_lightning."))
    return False
