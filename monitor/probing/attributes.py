"""Says where numbers that the loss depends on change in training, which no snapshot of tensors can know of."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from phasewatch.monitor.errors import warn
from phasewatch.monitor.model.clock import clock_of
from phasewatch.monitor.model.numbers import Place, places_in, places_outside, values_of
from phasewatch.monitor.probing.subject import Subject
from phasewatch.monitor.snapshots.snapshot import unwrap


class ChangedNumbers:
    """Warns, once for each, where such a number is another one than the probe has; one that doesn't matter is left.

    Args:
        subject: of the probe.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._clock = clock_of(subject.given_loss)
        self._inside = places_in(subject.model.module)
        outside = places_outside(subject.given_loss, subject.model.module)
        self._of_clock = {name: place for name, place in outside.items() if place.holder is self._clock}
        self._outside = {name: place for name, place in outside.items() if name not in self._of_clock}
        self._first = values_of(self._outside)
        self._known: set[str] = set()

    def note(self, step: int, *, elsewhere: bool) -> None:
        """Keep what the loss's trainer is at, so that the snapshot of this step is measured with it.

        Args:
            step: that the training is at now.
            elsewhere: whether another process measures, which doesn't know of it.
        """
        if self._clock is None:
            return
        self._clock.note(step)
        now = self._clock.at(step)
        if elsewhere and (found := self._differs_at(now, there := self._clock.elsewhere(step))):
            name, key = found
            reader, _, read = name.partition(": ")
            warn(
                f"{read}, which {reader} reads, is {now[key]!r} at step {step}. Another process measures, with "
                f"{there[key]!r} as it was when the monitor began. Measure with measure='inline', or give a loss "
                f"that doesn't read {read}."
            )

    def see(self, model: nn.Module) -> dict[str, float]:
        """Compare the model in training, and what the loss reads, with what the probe began with.

        Args:
            model: the one in training, only read.

        Returns:
            The numbers as they are now, by name.
        """
        self._see_what_trains(unwrap(model))
        theirs, outside = values_of(places_in(model)), values_of(self._outside)
        for name, place in self._inside.items():
            then, now = place.get(), theirs.get(name)
            if then is not None and now is not None and self._differs(name, place, then, now):
                warn(
                    f"{name} is {now:g} in the model that trains and {then:g} in the probe's. A snapshot holds "
                    f"tensors alone, so every point is measured with {then:g}, live and in a replay. {_mend(name)}"
                )
        for name, then in self._first.items():
            if name in outside and self._differs(name, self._outside[name], then, outside[name]):
                reader, _, read = name.partition(": ")
                warn(
                    f"{read}, which {reader} reads, is {outside[name]:g} now and was {then:g} when the monitor began. "
                    "A snapshot holds tensors alone, so points before and after are of different functions, and a "
                    f"replay measures all of them with what it is then. Give the probe a loss with a fixed {read}."
                )
        return theirs | outside | values_of(self._of_clock)

    def _see_what_trains(self, model: nn.Module) -> None:
        """Say where other parameters train than when the probe was made."""
        known, now = self._subject.trains, {name: p.requires_grad for name, p in model.named_parameters()}
        begun = [name for name, trains in now.items() if trains and known.get(name) is False]
        ended = [name for name, trains in now.items() if not trains and known.get(name) is True]
        for names, what in ((begun, "trains, and is held fast by"), (ended, "doesn't train, and is sampled by")):
            if names and what not in self._known:
                self._known.add(what)
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                warn(
                    f"{names[0]}{more} {what} the probe, in whose model requires_grad is {not now[names[0]]}. Make the "
                    "probe with the model as it is trained, and a probe of its own for each stage of a training."
                )

    def recall(self, step: int, numbers: Mapping[str, float]) -> None:
        """Compare what the probe has with what training had.

        Args:
            step: of training.
            numbers: what `see` returned there.
        """
        if self._clock is not None:
            mine = self._clock.at(step)
            theirs = {place.key: numbers[name] for name, place in self._of_clock.items() if name in numbers}
            if found := self._differs_at(mine | theirs, mine):
                reader, _, read = found[0].partition(": ")
                warn(
                    f"{read}, which {reader} reads, was {theirs[found[1]]!r} at step {step} of the training and is "
                    f"{mine[found[1]]!r} here. A snapshot holds tensors alone, so every point is measured with what it "
                    f"is here. Give the probe a loss that doesn't read {read}."
                )
        for name, place in (self._inside | self._outside).items():
            mine, theirs = place.get(), numbers.get(name)
            if mine is not None and theirs is not None and self._differs(name, place, mine, theirs):
                reader, _, read = name.rpartition(": ")
                warn(
                    f"{f'{read}, which {reader} reads,' if reader else name} was {theirs:g} at step {step} of the "
                    f"training and is {mine:g} here. A snapshot holds tensors alone, so every point is measured with "
                    f"{mine:g}. {'' if reader else _mend(name)}".rstrip()
                )

    def _differs_at(self, now: Mapping[str, Any], there: Mapping[str, Any]) -> tuple[str, str] | None:
        """The first value of the clock that the loss reads and isn't the same with, by its long and its short name.

        It is told once, and looked for at each step: an annealing may begin late.
        """
        clock = self._clock
        assert clock is not None
        for name, key in [(name, place.key) for name, place in self._of_clock.items() if place.key in clock.seen]:
            if name in self._known or now.get(key) == there.get(key):
                continue
            losses = []
            for value in (now.get(key), there.get(key)):
                with clock.other({**there, key: value}):
                    losses.append(self._loss())
            if losses[0] != losses[1]:
                self._known.add(name)
                return name, key
        return None

    def _loss(self) -> float | None:
        """The loss of the probe's model; None where there is none."""
        subject = self._subject
        try:
            with subject.measuring(), torch.no_grad():
                return float(subject.loss.value(subject.eval_batch))
        except Exception:  # a number that the probe's model doesn't work with
            return None

    def _differs(self, name: str, place: Place, then: float, now: float) -> bool:
        """Whether it is another number that the loss isn't the same with; says so once."""
        if then == now or name in self._known:
            return False
        self._known.add(name)
        losses = []
        for value in (then, now):
            before = place.put(value)
            try:
                losses.append(self._loss())
            finally:
                place.restore(before)
        return None in losses or losses[0] != losses[1]


def _mend(name: str) -> str:
    own = name.rpartition(".")[2]
    return f"Keep the number in a buffer, register_buffer({own!r}, torch.tensor(...)), to have it measured."
