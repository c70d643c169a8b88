"""Numbers among a model's attributes that change in training, which no snapshot of tensors can know of."""

from typing import Any

import torch
from torch import nn

from phasewatch.monitor.errors import warn
from phasewatch.monitor.probing.subject import Subject
from phasewatch.monitor.snapshots.snapshot import unwrap


class ChangedNumbers:
    """Warns where a number of the model in training, such as an annealed temperature, is another one in the probe.

    Args:
        subject: of the probe.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._known: set[str] = set()

    def see(self, model: nn.Module) -> None:
        """Compare the model in training with the probe's; a number that doesn't change the loss is left in peace.

        Args:
            model: the one in training, only read.
        """
        subject, theirs = self._subject, dict(unwrap(model).named_modules())
        for prefix, module in subject.model.module.named_modules():
            for name, then in _numbers(module).items() if prefix in theirs else ():
                now, full = _numbers(theirs[prefix]).get(name, then), f"{prefix}.{name}" if prefix else name
                if now == then or full in self._known:
                    continue
                self._known.add(full)
                if self._matters(module, name, now):
                    warn(
                        f"{full} is {now:g} in the model that trains and {then:g} in the probe's. A snapshot holds "
                        f"tensors alone, so every point is measured with {then:g}, live and in a replay. Keep the "
                        f"number in a buffer, register_buffer({name!r}, torch.tensor(...)), to have it measured."
                    )

    def _matters(self, module: nn.Module, name: str, now: Any) -> bool:
        subject, then = self._subject, vars(module)[name]
        losses = []
        try:
            for value in (then, now):
                vars(module)[name] = value
                with subject.measuring(), torch.no_grad():
                    losses.append(float(subject.loss.value(subject.eval_batch)))
        except Exception:  # a number that the probe's model doesn't work with
            return True
        finally:
            vars(module)[name] = then
        return losses[0] != losses[1]


def _numbers(module: nn.Module) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith("_")
    }
