"""The loss of a `transformers.Trainer`, as a function of a model and a batch."""

import copy
import functools
from typing import Any

import cloudpickle
from torch import Tensor, nn

from phasewatch.monitor.model.clock import Clock, plain

_LEFT_OUT = (
    "model", "model_wrapped", "deepspeed", "optimizer", "lr_scheduler", "callback_handler", "train_dataset",
    "eval_dataset", "model_init", "compute_metrics", "preprocess_logits_for_metrics", "_memory_tracker", "hub_model_id",
    "_eval_dataloaders", "_train_dataloader", "accelerator", "state", "control", "jit_compilation_time",
)  # fmt: skip
"""Attributes of a trainer that hold its model or data, or change as it trains."""


class TrainerLoss:
    """What `Trainer.training_step` takes the gradient of, for one batch that is not accumulated.

    It calls `compute_loss` of a copy of the trainer that has neither its model nor its data, and whose containers are
    made anew for each call, so that what `compute_loss` notes, as TRL's trainers do, is not in the trainer's own logs.
    No other process is asked anything. Its `state` has the numbers that the trainer's had at the snapshot's step.

    Args:
        trainer: left as it is.

    Attributes:
        state: those numbers.
    """

    def __init__(self, trainer: Any) -> None:
        bare = object.__new__(type(trainer))
        kept = {name: value for name, value in vars(trainer).items() if name not in _LEFT_OUT}
        vars(bare).update(kept)
        args = copy.copy(trainer.args)
        vars(args).update(_n_gpu=1, average_tokens_across_devices=False)
        vars(bare).update(
            args=args,
            model=None,
            model_wrapped=None,
            accelerator=OneProcess(trainer.accelerator),
            state=copy.copy(trainer.state),  # but for its plain values
            current_gradient_accumulation_steps=1,
            is_fsdp_enabled=False,
            is_deepspeed_enabled=False,
            log=_nothing,
        )
        self._trainer = bare
        self.state = Clock(trainer, _plain_state)
        self.__name__ = f"{type(trainer).__name__}.compute_loss"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a scalar."""
        trainer = copy.copy(self._trainer)
        for name, value in vars(trainer).items():
            if isinstance(value, dict | list | set):
                vars(trainer)[name] = _own(value)
        trainer.model = trainer.model_wrapped = model
        trainer.state = _state_at(self.state, trainer.state)
        inputs = dict(batch)
        items = trainer._get_num_items_in_batch([inputs], next(model.parameters()).device)
        return trainer.compute_loss(model, inputs, num_items_in_batch=items)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without what can't be sent there."""
        bare = copy.copy(self._trainer)
        for name, value in list(vars(bare).items()):
            try:
                cloudpickle.dumps(value)
            except Exception:
                del vars(bare)[name]
        return {"_trainer": bare, "state": self.state, "__name__": self.__name__}


class OneProcess:
    """Stands in for an accelerator where a loss is measured: one process, which exchanges nothing with others.

    Args:
        accelerator: of the trainer, which answers what isn't answered here.
    """

    num_processes = 1
    process_index = local_process_index = 0
    is_main_process = is_local_main_process = sync_gradients = True
    parallelism_config = None

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def gather(self, tensor: Any) -> Any:
        """What all processes have: what this one has."""
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """The same."""
        return tensor

    pad_across_processes = reduce

    def unwrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The probe's model has no wrapper."""
        return model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (accelerator := vars(self).get("_accelerator")) is None:
            raise AttributeError(f"an accelerator has no {name} where a loss is measured in another process")
        return getattr(accelerator, name)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _plain_state(trainer: Any) -> dict[str, Any]:
    """The plain values of a trainer's state; before training `epoch` is None there."""
    values = plain(vars(trainer.state))
    return values | {"epoch": values.get("epoch") or 0.0}


def _state_at(clock: Clock, state: Any) -> Any:
    """A copy of a trainer's state with the clock's values, which tells the clock what is read."""
    copied = object.__new__(_telling(type(state)))
    vars(copied).update({name: _own(value) for name, value in vars(state).items()}, **clock, _clock=clock)
    return copied


@functools.cache
def _telling(kind: type) -> type:
    """A trainer's state that tells its clock what is read."""

    def __getattribute__(self: Any, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "_clock").seen.add(name)
        return object.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": __getattribute__})


def _own(value: Any) -> Any:
    """A copy of a container and of the containers in it, without what else they hold."""
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _own(held) for key, held in value.items()})
        return copied
    return copy.copy(value) if isinstance(value, list | set) else value


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what writes to the trainer's logs."""
