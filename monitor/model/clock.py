"""The plain values of a trainer that a loss may read, such as the epoch: no snapshot of tensors holds them."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Clock(dict[str, Any]):
    """What a trainer's plain values are at the step that is measured.

    At a step that isn't noted, as in a process that measures beside training, they are those of the beginning, but for
    the step itself.

    Args:
        trainer: whose values they are; not kept alive, and not sent to another process. None for no more notes.
        read: its values now, by name.
        step: the name of the training step among them.
        at: the values at the beginning, in place of those that the trainer has now.

    Attributes:
        seen: the names that the loss has looked at.

    Example:
        >>> class Trainer:
        ...     global_step, epoch = 0, 0
        >>> trainer = Trainer()
        >>> clock = Clock(trainer, lambda trainer: {"global_step": trainer.global_step, "epoch": trainer.epoch})
        >>> trainer.global_step, trainer.epoch = 10, 2
        >>> clock.note(10)
        >>> clock.at(10), clock.at(5), clock.at(10)
        ({'global_step': 10, 'epoch': 2}, {'global_step': 5, 'epoch': 0}, {'global_step': 10, 'epoch': 2})
    """

    def __init__(
        self, trainer: Any, read: Callable[[Any], dict[str, Any]], step: str = "global_step", at: Any = None
    ) -> None:
        super().__init__(read(trainer) if at is None else at)
        self._trainer = None if trainer is None else weakref.ref(trainer)
        self._read = read
        self._step = step
        self._begun = dict(self)
        self._noted: dict[int, dict[str, Any]] = {}
        self.seen: set[str] = set()

    def look(self, name: str) -> Any:
        """A value, for the loss.

        Raises:
            KeyError: if there is none of that name.
        """
        value = self[name]
        self.seen.add(name)
        return value

    def note(self, step: int) -> None:
        """Keep what changed by now, for the snapshot of this step."""
        trainer = self._trainer and self._trainer()
        if trainer is not None:
            begun = self._begun
            self._noted[step] = {
                name: value
                for name, value in self._read(trainer).items()
                if name not in begun or type(value) is not type(begun[name]) or value != begun[name]
            }

    def at(self, step: int) -> dict[str, Any]:
        """Have the values of a step from now on, and give a copy of them."""
        self.clear()
        self.update(self.elsewhere(step) if step not in self._noted else self._begun | self._noted[step])
        return dict(self)

    def elsewhere(self, step: int) -> dict[str, Any]:
        """The values at a step where nothing was noted."""
        return self._begun | {self._step: step}

    @contextmanager
    def other(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Have other values inside."""
        before = dict(self)
        self.update(values)
        try:
            yield
        finally:
            self.clear()
            self.update(before)

    def __reduce__(self) -> tuple[Any, ...]:
        return _sent, (self._step, self._begun, self._noted)


def clock_of(loss: Any) -> Clock | None:
    """The clock that a loss has among its attributes; None if it has none."""
    return next((held for held in getattr(loss, "__dict__", {}).values() if isinstance(held, Clock)), None)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers, strings and truth values among some, and None.

    Example:
        >>> plain({"epoch": 0.5, "best": None, "log": []})
        {'epoch': 0.5, 'best': None}
    """
    return {name: value for name, value in values.items() if value is None or isinstance(value, int | float | str)}


def _sent(step: str, begun: dict[str, Any], noted: dict[int, dict[str, Any]]) -> Clock:
    clock = Clock(None, plain, step, begun)
    clock._noted = dict(noted)
    return clock
