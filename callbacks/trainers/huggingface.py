"""A callback of `transformers.Trainer` that watches its training."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phasewatch.callbacks.trainers.attachment import Attachment, CopyOf, Found, held_loader
from phasewatch.callbacks.trainers.huggingface_loss import TrainerLoss
from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.schedule import Schedule
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.loss import Loss
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.probing.subject import Metric, Parts
from phasewatch.monitor.runs.sink import Sink
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.sharded import is_in_zero_3, is_sharded, whole_parameters
from phasewatch.monitor.snapshots.snapshot import unwrap


class HuggingFaceCallback(TrainerCallback):
    """Watches a training by `transformers.Trainer` or a subclass, such as TRL's `SFTTrainer`.

    Model, loss, training and evaluation data are the trainer's: the loss is what `compute_loss` returns for a batch
    that its collator made, with label smoothing or `compute_loss_func` where the trainer has them, under its mixed
    precision. Training is bit-identical with and without it. A step is the trainer's `global_step`.

    The run lies in `output_dir/phasewatch`, and a training that resumes from a checkpoint goes on with it. In a
    distributed training rank 0 measures and writes.

    Args:
        at: which steps, as in `PhaseMonitor`.
        sinks: told of each point and each transition. A `WandbSink` joins the trainer's W&B run.
        sampler: how to sample. By default, "calibrate", the setting is found on the run's first snapshots, with
            minibatches as large as `per_device_train_batch_size`.
        metrics: name to `f(model, eval_batch) -> float`.
        parts: the parts of the model to measure, as in `Probe`.
        probe: measures in place of a probe that is made of the trainer's model, loss and data.
        loss: `loss(model, batch)` in place of the trainer's.
        data: what minibatches are drawn from, as in `Probe`, in place of the trainer's training data. Needed where that
            can only be iterated.
        eval_batch: what `Point.loss` and the metrics are taken on, in place of the first 256 samples of the evaluation
            data, or of fewer with long sequences.
        run: the run's folder, in place of `output_dir/phasewatch`.
        measure: "inline" or "background", as in `PhaseMonitor`.
        keep_snapshots: keep each snapshot's file after it is measured.
        average: as in `PhaseMonitor`.
        seed: of the minibatches and the noise.

    Raises:
        PhasewatchError: for arguments that make no sense, and before the first step for what can't be measured.

    Example:
        >>> import phasewatch as pw
        >>> callback = pw.HuggingFaceCallback(at=pw.every(50))
        >>> callback.monitor is None
        True
    """

    def __init__(
        self,
        at: Schedule,
        *,
        sinks: Sequence[Sink] = (),
        sampler: Sampler | Literal["calibrate"] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        parts: Parts = None,
        probe: Probe | None = None,
        loss: Loss | None = None,
        data: Any = None,
        eval_batch: Any = None,
        run: str | Path | None = None,
        measure: Literal["inline", "background"] = "inline",
        keep_snapshots: bool = True,
        average: float | None = None,
        seed: int = 0,
    ) -> None:
        self._attachment = Attachment(
            "HuggingFaceCallback", at, sinks=sinks, sampler=sampler, metrics=metrics, parts=parts, probe=probe,
            loss=loss, data=data, eval_batch=eval_batch, run=run, measure=measure, keep_snapshots=keep_snapshots,
            average=average, seed=seed,
        )  # fmt: skip
        self._unsharded: CopyOf | None = None

    @property
    def monitor(self) -> PhaseMonitor | None:
        """The monitor of the training that runs or ran last; None before."""
        return self._attachment.monitor

    @property
    def probe(self) -> Probe | None:
        """What measures it; None before, and on another rank than 0."""
        return self._attachment.probe

    def make_probe(self, trainer: Trainer) -> Probe:
        """The probe of a trainer, to replay a run with when the training is over.

        Args:
            trainer: made as for the training.

        Returns:
            The probe.

        Raises:
            PhasewatchError: if it can't be measured.
        """
        return self._attachment.make_probe(self._found(trainer, None))

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep a whole model for a training that will shard it, or that has loaded it in shards (ZeRO 3)."""
        trainer, model = _trainer_with(self), kwargs["model"]
        if trainer is None or not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            return
        parameters = whole_parameters(model) if is_in_zero_3(model) else None
        if args.process_index == 0 and (parameters or not is_sharded(model)):
            self._unsharded = CopyOf(model, parameters)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the probe and the monitor."""
        trainer = _trainer_with(self)
        if trainer is None:
            raise PhasewatchError(
                "HuggingFaceCallback(...) works in a transformers.Trainer: Trainer(..., callbacks=[callback]) or "
                "trainer.add_callback(callback)."
            )
        model = trainer.model_wrapped if is_sharded(trainer.model_wrapped) else trainer.model
        run = Path(args.output_dir or ".") / "phasewatch"
        self._attachment.begin(model, run, lambda: self._found(trainer, kwargs["train_dataloader"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a snapshot if one is due; this comes once for the batches whose gradients are accumulated."""
        if self.monitor:
            self.monitor(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure what waits, tell the sinks, and write the report."""
        if self.monitor:
            self.monitor.close()

    def _found(self, trainer: Any, loader: Any) -> Found:
        args, attachment = trainer.args, self._attachment
        data = eval_data = None
        if not attachment.has_own_data:
            loader = _without_a_trace(trainer) if loader is None else loader
            data = held_loader("HuggingFaceCallback", loader)
            held_out = _like(trainer.eval_dataset, loader.dataset)
            eval_data = None if held_out is None else DataLoader(held_out, collate_fn=loader.collate_fn)
        batch_size = args.per_device_train_batch_size * max(1, args.n_gpu)
        return Found(
            model=self._model(trainer),
            loss=_no_loss if attachment.has_own_loss else TrainerLoss(trainer),
            data=data,
            eval_data=eval_data,
            batch_size=batch_size if data is None else min(batch_size, len(data.dataset)),  # pyright: ignore[reportArgumentType]
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        )

    def _model(self, trainer: Any) -> Any:
        model = unwrap(trainer.model)
        if not is_sharded(trainer.model_wrapped) and not is_sharded(model):
            return CopyOf(model) if self._attachment.in_background else model
        if self._unsharded is None:
            raise PhasewatchError(
                "HuggingFaceCallback(...): the model is spread over several processes, and there was no whole one as "
                "the trainer was made. Give the callback in Trainer(callbacks=[...]), or "
                "HuggingFaceCallback(probe=Probe(make_model, loss, data))."
            )
        return self._unsharded


def _trainer_with(callback: TrainerCallback) -> Any:
    """The trainer that calls a callback, which it isn't told; None if there is none."""
    frame = sys._getframe(1)
    while frame:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and any(held is callback for held in found.callback_handler.callbacks):
            return found
        frame = frame.f_back
    return None


def _without_a_trace(trainer: Any) -> Any:
    """A training loader of a trainer that doesn't train yet, which doesn't know of it afterwards."""
    prepared = list(trainer.accelerator._dataloaders)
    loader = trainer.get_train_dataloader()
    trainer.accelerator._dataloaders[:] = prepared
    return loader


def _like(dataset: Any, trained: Any) -> Any:
    """An evaluation dataset with the columns that training has, the first of several; None if there is none."""
    if isinstance(dataset, Mapping) and not hasattr(dataset, "column_names"):
        return _like(next(iter(dataset.values()), None), trained)
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    columns, select = getattr(trained, "column_names", None), getattr(dataset, "select_columns", None)
    if columns and select:
        return select(columns) if set(columns) <= set(getattr(dataset, "column_names", ())) else None
    return dataset


def _no_loss(model: nn.Module, batch: Any) -> Any:
    raise NotImplementedError
