"""The loss of a LightningModule's `training_step`, as a function of a module and a batch."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from phasewatch.monitor.errors import PhasewatchError

_INERT = (
    "log", "log_dict", "print", "optimizers", "lr_schedulers", "lr_scheduler_step", "toggle_optimizer",
    "untoggle_optimizer", "clip_gradients", "configure_gradient_clipping",
)  # fmt: skip
"""Methods by which a training step logs, or steps its optimizers."""


class TrainingStepLoss:
    """What `training_step` returns or, in manual optimization, the sum of what it gives to `manual_backward`.

    The step logs nothing and steps no optimizer. `trainer.global_step` and `trainer.current_epoch` are 0 in it.

    Args:
        module: a LightningModule; only its methods are looked at.
        optimizers: how many it has.

    Raises:
        PhasewatchError: if its step takes an iterator in place of a batch.
    """

    def __init__(self, module: Any, optimizers: int = 1) -> None:
        self.__name__ = f"{type(module).__name__}.training_step"
        parameters = list(inspect.signature(module.training_step).parameters)
        if parameters[:1] == ["dataloader_iter"]:
            raise PhasewatchError(
                f"LightningCallback(...): {self.__name__} draws its batches from dataloader_iter. Give a loss of one "
                "batch: LightningCallback(..., loss=...)."
            )
        self._takes_number = len(parameters) > 1
        self._optimizers = optimizers
        self._before, self._after = (
            _is_overridden(module, name) for name in ("on_before_batch_transfer", "on_after_batch_transfer")
        )

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a scalar.

        Raises:
            PhasewatchError: if the step gives none.
        """
        module: Any = model
        with _by_itself(module, self._optimizers) as losses:
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


class Inert:
    """Does nothing, whatever it is asked to do."""

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        """Itself."""
        return self

    def __getattr__(self, name: str) -> "Inert":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> "Inert":
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> "Inert":
        return self

    def __exit__(self, *error: Any) -> None: ...


class InertTrainer(Inert):
    """What a training step sees as its trainer."""

    global_step = 0
    current_epoch = 0


@contextmanager
def _by_itself(module: Any, optimizers: int) -> Iterator[list[Tensor]]:
    """Let a module step inside without its trainer; it is as it was afterwards.

    Yields:
        What it gives to `manual_backward`.
    """
    losses: list[Tensor] = []

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss)

    some: Any = Inert() if optimizers == 1 else [Inert()] * optimizers
    replaced: dict[str, Any] = {name: Inert() for name in _INERT if hasattr(type(module), name)}
    replaced |= {"manual_backward": manual_backward, "optimizers": lambda *args, **kwargs: some}
    replaced["_trainer"] = InertTrainer()
    own = vars(module)
    before = {name: own[name] for name in replaced if name in own}
    own.update(replaced)
    try:
        yield losses
    finally:
        for name in replaced:
            del own[name]
        own.update(before)


def _is_overridden(module: Any, name: str) -> bool:
    for kind in type(module).__mro__:
        if name in vars(kind):
            return not kind.__module__.startswith(("lightning.", "pytorch_lightning."))
    return False
