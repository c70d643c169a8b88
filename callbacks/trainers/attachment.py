"""What the callbacks of all trainers have in common: their arguments, and the monitor that they make of a trainer."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from phasewatch.callbacks.trainers.arguments import check_call, checked_sinks
from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.ranks import Ranks
from phasewatch.callbacks.trainers.schedule import Schedule
from phasewatch.monitor.errors import PhasewatchError, warn
from phasewatch.monitor.model.copying import own_copy, whole_copy
from phasewatch.monitor.model.data import dataset_of
from phasewatch.monitor.model.isolation import untouched_randomness
from phasewatch.monitor.model.loss import Loss
from phasewatch.monitor.model.random_state import own_copy_of
from phasewatch.monitor.probing.automatic import WORD
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.probing.subject import Metric, Parts
from phasewatch.monitor.runs.sink import Sink
from phasewatch.monitor.sampling.settings import Langevin, Sampler

EVAL_SAMPLES = 256
"""Samples that the loss of a point is taken on, of the trainer's evaluation data, or all if there are fewer."""

EVAL_TOKENS = 2**14
"""The same in tokens, where samples are sequences: the logits of as many take 3 GB with a vocabulary of 50,000."""


class CopyOf:
    """Builds the model that a trainer trains, in another process too: copies of a copy on the CPU.

    Args:
        model: the one in training, left as it is.
        parameters: its parameters where ZeRO 3 has spread them, as `whole_parameters` gives them.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[int, nn.Parameter] | None = None) -> None:
        self._model = (own_copy(model) if parameters is None else whole_copy(model, parameters)).to("cpu")

    def __call__(self) -> nn.Module:
        """A model of its own."""
        return copy.deepcopy(self._model)


@dataclass(frozen=True)
class Found:
    """What a trainer has.

    Attributes:
        model: a module, or a function that builds one.
        loss: `loss(model, batch)`.
        data: a loader of the training data, which is never iterated.
        eval_data: a loader of the evaluation data, which is never iterated; None if there is none.
        batch_size: of the training on one device.
        autocast: the type that the loss is taken in; None for the weights' own.
    """

    model: Any
    loss: Loss
    data: Any
    eval_data: Any
    batch_size: int
    autocast: torch.dtype | None


class Attachment:
    """Makes the monitor of a trainer, with what the user gave in place of what the trainer has.

    Args:
        name: of the callback.
        at: which steps.
        probe: measures in place of a probe of the trainer's parts.
        sampler: of the probe that is made; "calibrate" to find the setting in the run.
        metrics: of the probe that is made.
        parts: of the probe that is made.
        loss: in place of the trainer's.
        data: in place of the trainer's.
        eval_batch: in place of samples of the trainer's evaluation data.
        seed: of the probe that is made.
        run: the run's folder.
        sinks: told of points and transitions.
        measure: where to measure.
        keep_snapshots: keep each snapshot's file.
        average: the share of the steps to average weights over.

    Attributes:
        monitor: of the training that runs, or ran last; None before.
        probe: of the same; None on another rank than 0.

    Raises:
        PhasewatchError: if the arguments make no sense.
    """

    def __init__(
        self,
        name: str,
        at: Schedule,
        *,
        probe: Probe | None,
        sampler: Sampler | Literal["calibrate"] | None,
        metrics: Mapping[str, Metric] | None,
        parts: Parts,
        loss: Loss | None,
        data: Any,
        eval_batch: Any,
        seed: int,
        run: str | Path | None,
        sinks: Sequence[Sink],
        measure: Literal["inline", "background"],
        keep_snapshots: bool,
        average: float | None,
    ) -> None:
        check_call(nn.Identity(), "." if run is None else run, at, measure, name=name)
        given = {"metrics": metrics, "parts": parts, "loss": loss, "data": data, "eval_batch": eval_batch}
        if probe is not None:
            if not isinstance(probe, Probe):
                raise PhasewatchError(f"{name}(probe=...) must be a Probe; a {type(probe).__name__} came.")
            double = [key for key, value in given.items() if value is not None]
            if isinstance(sampler, Sampler):
                double.append("sampler")
            if double:
                raise PhasewatchError(
                    f"{name}(probe=..., {double[0]}=...) says it twice: the probe has its own {double[0]}. "
                    "Leave one of them out."
                )
        elif sampler is not None and sampler != WORD and not isinstance(sampler, Sampler):
            raise PhasewatchError(
                f"{name}(sampler={sampler!r}) must be pw.Langevin(...), pw.SGLD(...) or 'calibrate', the default."
            )
        if loss is not None and not callable(loss):
            raise PhasewatchError(f"{name}(loss={loss!r}) must be a function of a model and a batch.")
        self.monitor: PhaseMonitor | None = None
        self.probe = probe
        self.run = None if run is None else Path(run)
        self._name = name
        self._at = at
        self._own_probe = probe
        self._sampler = sampler
        self._given = given
        self._seed = seed
        self._sinks = checked_sinks(sinks, name)
        self._measure: Literal["inline", "background"] = measure
        self._keep_snapshots = keep_snapshots
        self._average = average

    @property
    def in_background(self) -> bool:
        """Whether another process measures."""
        return self._measure == "background"

    @property
    def has_own_loss(self) -> bool:
        """Whether the trainer's loss isn't needed."""
        return self._own_probe is not None or self._given["loss"] is not None

    @property
    def has_own_data(self) -> bool:
        """Whether the trainer's data isn't needed."""
        return self._own_probe is not None or self._given["data"] is not None

    def begin(self, model: nn.Module, run: Path, find: Any) -> None:
        """Make the monitor, before the first step.

        Args:
            model: the one in training, in its wrapper if the weights are sharded.
            run: the run's folder, unless the user gave one.
            find: gives what the trainer has, a `Found`; asked on rank 0 alone.

        Raises:
            PhasewatchError: if that can't be measured.
        """
        self.stop()
        for sink in self._sinks:
            join = getattr(sink, "join_trainer", None)
            if callable(join):
                join()
        ranks = Ranks.of_training(self.run or run, together=False)
        self.probe = None
        if ranks and not ranks.is_first:
            ranks.wait_for_preparation()
        else:
            with ranks.preparing() if ranks else nullcontext():
                self.probe = self._own_probe or self.make_probe(find())
        calibrate = self._sampler == WORD or (self._sampler is None and self._own_probe is None)
        self.monitor = PhaseMonitor(
            model,
            self.probe,
            run=self.run or run,
            at=self._at,
            sinks=self._sinks,
            measure=self._measure,
            keep_snapshots=self._keep_snapshots,
            average=self._average,
            sampler=WORD if calibrate else None,
        )

    def make_probe(self, found: Found) -> Probe:
        """The probe of a trainer's model, loss and data.

        Args:
            found: what the trainer has.

        Returns:
            The probe.

        Raises:
            PhasewatchError: if it can't be measured.
        """
        data = found.data if self._given["data"] is None else self._given["data"]
        sampler = self._sampler if isinstance(self._sampler, Sampler) else Langevin(batch_size=found.batch_size)

        def measured_on(eval_batch: Any) -> Probe:
            try:
                return Probe(
                    found.model,
                    self._given["loss"] or found.loss,
                    data,
                    eval_batch=eval_batch,
                    sampler=sampler,
                    metrics=self._given["metrics"],
                    parts=self._given["parts"],
                    seed=self._seed,
                    autocast=found.autocast,
                )
            except PhasewatchError as error:
                if self._given["loss"] is not None or not str(error).startswith("Probe(loss="):
                    raise
                name = getattr(found.loss, "__name__", "the trainer's loss")
                raise PhasewatchError(
                    f"{error} Where {name} can't be measured by itself, give the loss of a batch: "
                    f"{self._name}(..., loss=...)."
                ) from error

        if self._given["eval_batch"] is not None:
            return measured_on(self._given["eval_batch"])
        if found.eval_data is not None:
            probe = measured_on(_first_samples(found.eval_data, self._seed))
            if _has_loss(probe):
                return probe
            warn(
                f"{self._name}(...): the loss of training can't be taken on the evaluation data, so a point's loss is "
                f"that of the first training samples. Give {self._name}(..., eval_batch=...) for another."
            )
        return measured_on(None if found.data is None else _first_samples(found.data, self._seed))

    def stop(self) -> None:
        """Let go of a training that ended without a word; what waits is left to a resumed run or a replay."""
        if self.monitor:
            self.monitor.close(measure_rest=False)


def _first_samples(loader: DataLoader, seed: int) -> DataLoader:
    """The first samples of a loader's dataset, as many as one pass may take."""
    own: Any = own_copy_of(loader.dataset)
    with untouched_randomness(seed):
        count = max(1, min(len(own), EVAL_SAMPLES, EVAL_TOKENS // _tokens(own[0])))
    return DataLoader(Subset(own, range(count)), collate_fn=loader.collate_fn)


def _has_loss(probe: Probe) -> bool:
    """Whether the loss can be taken on what the points' loss is to be taken on."""
    subject = probe.subject
    try:
        with subject.measuring(), torch.no_grad():
            return bool(subject.loss.value(subject.eval_batch).isfinite())
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False


def held_loader(name: str, loader: Any) -> DataLoader:
    """A loader that is asked for its dataset and its collate function alone, whatever the trainer's own one does.

    Args:
        name: of the callback.
        loader: the trainer's own.

    Raises:
        PhasewatchError: if the dataset has no length.
    """
    dataset = dataset_of(loader)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise PhasewatchError(
            f"{name}(...): the training data is a {type(dataset).__name__}, which can only be iterated. Give a "
            f"batch as training gets it, or a function that draws one: {name}(..., data=batch_of_samples)."
        )
    return DataLoader(dataset, collate_fn=loader.collate_fn)


def _tokens(sample: Any) -> int:
    """The length of a sample's longest row of whole numbers; 1 where it has none."""
    values = list(sample.values()) if isinstance(sample, Mapping) else sample if isinstance(sample, tuple) else [sample]
    lengths = [1]
    for value in values:
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            lengths.append(value.numel())
        elif isinstance(value, list) and value and isinstance(value[0], int):
            lengths.append(len(value))
    return max(lengths)
