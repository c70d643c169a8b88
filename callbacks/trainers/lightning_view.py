"""What a `training_step` sees of its Lightning trainer where its loss is measured: values, and nothing that acts."""

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from torch import Tensor, nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.clock import Clock, plain
from phasewatch.monitor.model.random_state import own_copy_of

_VALUES = (
    "global_step", "current_epoch", "max_epochs", "min_epochs", "max_steps", "min_steps", "estimated_stepping_batches",
    "num_training_batches", "num_val_batches", "num_sanity_val_batches", "training", "validating", "testing",
    "predicting", "evaluating", "sanity_checking", "enable_validation", "interrupted", "received_sigterm", "world_size",
    "num_nodes", "num_devices", "device_ids", "global_rank", "local_rank", "node_rank", "is_global_zero", "precision",
    "default_root_dir", "ckpt_path", "logger", "loggers", "datamodule", "scaler", "checkpoint_callback",
    "early_stopping_callback", "progress_bar_callback", "val_dataloaders", "distributed_sampler_kwargs",
)  # fmt: skip
"""Properties of a trainer that may be plain values, and that ask no other process."""


def values_of(trainer: Any) -> dict[str, Any]:
    """The plain values of a trainer, of its optimizers and of what else a step reads, by the path to them."""
    found = _plain({name: value for name, value in vars(trainer).items() if not name.startswith("_")})
    for name in (*_VALUES, *(["log_dir"] if trainer.world_size == 1 else [])):
        with suppress(Exception):  # what the trainer itself has no answer to
            found |= _plain({name: getattr(trainer, name)})
    found |= _within("state", _plain(vars(trainer.state)))
    found["is_last_batch"] = False  # as for most batches: the one that is measured is none of an epoch's
    for number, optimizer in enumerate(trainer.optimizers):
        groups = [{name: _unwrapped(value) for name, value in group.items()} for group in optimizer.param_groups]
        found[f"len(optimizers.{number}.param_groups)"] = len(groups)
        for place, group in enumerate(groups):
            found |= _within(f"optimizers.{number}.param_groups.{place}", _plain(group))
    for number, config in enumerate(trainer.lr_scheduler_configs):
        scheduler, path = config.scheduler, f"lr_schedulers.{number}"
        found |= _within(path, _plain({name: _unwrapped(value) for name, value in vars(scheduler).items()}))
        with suppress(Exception):  # one that has none
            found |= _within(
                f"{path}.get_last_lr", {str(at): float(lr) for at, lr in enumerate(scheduler.get_last_lr())}
            )
    loader = getattr(trainer, "train_dataloader", None)
    with suppress(TypeError, AttributeError):  # one without a length
        found["len(train_dataloader)"] = len(loader)  # pyright: ignore[reportArgumentType]
        found["train_dataloader.batch_size"] = loader.batch_size  # pyright: ignore[reportOptionalMemberAccess]
        found["len(train_dataloader.dataset)"] = len(loader.dataset)  # pyright: ignore[reportOptionalMemberAccess]
    if (datamodule := getattr(trainer, "datamodule", None)) is not None:
        found |= _within("datamodule", plain(vars(datamodule)))
    return found


class Inert:
    """Does nothing, whatever it is asked to do, and refuses to be taken for a value.

    Args:
        path: how a step reaches it, for a message.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        """Nothing."""
        return Inert(f"{self._path}(...)")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_path" not in vars(self):
            raise AttributeError(name)
        return Inert(f"{self._path}.{name}")

    def __getitem__(self, key: Any) -> "Inert":
        return Inert(f"{self._path}[{key!r}]")

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> "Inert":
        return self

    def __exit__(self, *error: Any) -> None: ...

    def __bool__(self) -> bool:
        return True if self._is_there else self._refuse()

    def __eq__(self, other: Any) -> bool:
        return self._refuse() if isinstance(other, int | float | str) else self is other

    def __hash__(self) -> int:
        return id(self)

    @property
    def _is_there(self) -> bool:
        """Whether it stands for an object that the trainer has, and for no value that isn't known."""
        return ".logger" in self._path or (self._path.count(".") <= 2 and not self._path.endswith("(...)"))

    def _refuse(self, *args: Any) -> NoReturn:
        raise PhasewatchError(
            f"LightningCallback(...): training_step reads {self._path}, which isn't known where the loss is measured. "
            "Give a loss that doesn't read it: LightningCallback(..., loss=...)."
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in [*args, *(kwargs or {}).values()]:
            if isinstance(value, Inert):
                value._refuse()
        return NotImplemented

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __neg__ = __abs__ = __round__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __float__ = __int__ = __index__ = __len__ = __contains__ = _refuse


class Seen(Inert):
    """An object of the trainer's: its plain values as they are at the step that is measured, and nothing else of it.

    Args:
        path: how a step reaches it.
        clock: the values.
        key: its own path among them.
    """

    def __init__(self, path: str, clock: Clock, key: str) -> None:
        super().__init__(path)
        self._clock = clock
        self._key = key

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_key" not in vars(self):
            raise AttributeError(name)
        key = f"{self._key}.{name}" if self._key else name
        if key in self._clock:
            value = self._clock.look(key)
            return copy.copy(value) if isinstance(value, list) else value
        return Seen(f"{self._path}.{name}", self._clock, key)

    def __len__(self) -> int:
        key = f"len({self._key})"
        return self._clock.look(key) if key in self._clock else self._refuse()


class SeenOptimizer(Seen):
    """An optimizer that steps nothing. Its groups have no parameters."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Copies of the groups' plain values."""
        path = f"{self._key}.param_groups"
        count = self._clock[f"len({path})"]
        return [_under(self._clock, f"{path}.{number}") | {"params": []} for number in range(count)]

    @property
    def optimizer(self) -> "SeenOptimizer":
        """What Lightning has wrapped."""
        return self


class SeenScheduler(Seen):
    """A scheduler that steps nothing."""

    def get_last_lr(self) -> list[float]:
        """The rates that it gave last."""
        rates = _under(self._clock, f"{self._key}.get_last_lr")
        return list(rates.values()) if rates else self._refuse()


class SeenTrainer(Seen):
    """What a training step sees as its trainer.

    Args:
        clock: the values.
        module: the one that is measured.
        optimizers: how many there are.
        schedulers: the same.
        datamodule: the trainer's.
    """

    def __init__(
        self, clock: Clock, module: nn.Module, optimizers: int, schedulers: int, datamodule: "HeldDataModule"
    ) -> None:
        super().__init__("self.trainer", clock, "")
        self.model = self.lightning_module = module
        self.optimizers = [
            SeenOptimizer(f"self.trainer.optimizers[{number}]", clock, f"optimizers.{number}")
            for number in range(optimizers)
        ]
        self.lr_scheduler_configs = []
        for number in range(schedulers):
            path = f"lr_scheduler_configs[{number}]"
            config = Seen(f"self.trainer.{path}", clock, path)
            scheduler = SeenScheduler(f"self.trainer.{path}.scheduler", clock, f"lr_schedulers.{number}")
            vars(config).update(scheduler=scheduler)
            self.lr_scheduler_configs.append(config)
        self._held = datamodule

    @property
    def datamodule(self) -> Any:
        """A copy for one call of the step, with the numbers of the step that is measured."""
        known = vars(self)
        if "_own_datamodule" not in known:
            known["_own_datamodule"] = own = copy.copy(self._held.copied)
            if own is not None:
                held = {n: copy.copy(v) if isinstance(v, dict | list | set) else v for n, v in vars(own).items()}
                vars(own).update(held | _under(self._clock, "datamodule"), trainer=self)
        return known["_own_datamodule"]


class HeldDataModule:
    """A trainer's datamodule, which is copied when a step first asks for it.

    Args:
        datamodule: left as it is and not kept alive; may be None.
    """

    def __init__(self, datamodule: Any) -> None:
        self._live = None if datamodule is None else weakref.ref(datamodule)
        self._copied: Any = None

    @property
    def copied(self) -> Any:
        """The copy, without the trainer; tensors, arrays and modules in it are shared. None where there is none."""
        live = self._live and self._live()
        if self._copied is None and live is not None:
            self._copied = object.__new__(type(live))
            held = {name: value for name, value in vars(live).items() if name != "trainer"}
            vars(self._copied).update({name: own_copy_of(value) for name, value in held.items()}, trainer=None)
        return self._copied

    def __getstate__(self) -> dict[str, Any]:
        """For another process: its plain values and tensors alone, not its data sets."""
        live = (self._live and self._live()) or self._copied
        if live is None:
            return {"_live": None, "_copied": None}
        bare, held = object.__new__(type(live)), vars(live)
        tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        vars(bare).update(_plain(held, private=True) | tensors, trainer=None)
        return {"_live": None, "_copied": bare}


def _plain(values: Mapping[str, Any], *, private: bool = False) -> dict[str, Any]:
    """The plain values among some, and the lists and tuples of such."""
    some = {name: value for name, value in values.items() if private or not str(name).startswith("_")}
    lists = {n: v for n, v in some.items() if type(v) in {list, tuple} and len(plain(dict(enumerate(v)))) == len(v)}  # pyright: ignore[reportArgumentType]
    return plain(some) | {name: copy.copy(value) for name, value in lists.items()}


def _unwrapped(value: Any) -> Any:
    """A number that an optimizer keeps in a tensor, as a number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value


def _within(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{path}.{name}": value for name, value in values.items()}


def _under(clock: Clock, path: str) -> dict[str, Any]:
    names = [name for name in clock if name.startswith(f"{path}.")]
    return {name[len(path) + 1 :]: clock.look(name) for name in names}
