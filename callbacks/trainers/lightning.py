"""A callback of Lightning's trainer that watches its training."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import DataLoader

from phasewatch.callbacks.trainers.attachment import Attachment, CopyOf, Found, held_loader
from phasewatch.callbacks.trainers.lightning_loss import TrainingStepLoss
from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.schedule import Schedule
from phasewatch.monitor.errors import PhasewatchError, warn
from phasewatch.monitor.model.data import dataset_of
from phasewatch.monitor.model.loss import Loss
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.probing.subject import Metric, Parts
from phasewatch.monitor.runs.sink import Sink
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.sharded import is_sharded

if TYPE_CHECKING or importlib.util.find_spec("lightning"):
    from lightning.pytorch import Callback
else:  # the same library under its older name
    from pytorch_lightning import Callback

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LightningCallback(Callback):
    """Watches a training by `lightning.Trainer`.

    Model, training and validation data are the trainer's, and the loss is what the module's `training_step` returns for
    a batch; in manual optimization it is the sum of what the step gives to `manual_backward`. Training is bit-identical
    with and without it. A step is the trainer's `global_step`, which counts the steps of all optimizers.

    The run lies in `phasewatch/` in the trainer's `log_dir`, or in `default_root_dir` without a logger. A checkpoint of
    the trainer names it, so that a training that resumes from one goes on with the run of the folder that it began in.
    In a distributed training rank 0 measures and writes.

    Args:
        at: which steps, as in `PhaseMonitor`.
        sinks: told of each point and each transition. A `WandbSink` joins the run of a `WandbLogger`.
        sampler: how to sample. By default, "calibrate", the setting is found on the run's first snapshots, with
            minibatches as large as the training loader's.
        metrics: name to `f(module, eval_batch) -> float`.
        parts: the parts of the module to measure, as in `Probe`.
        probe: measures in place of a probe that is made of the trainer's module, loss and data.
        loss: `loss(module, batch)` in place of `training_step`.
        data: what minibatches are drawn from, as in `Probe`, in place of the trainer's training data. Needed where that
            can only be iterated, or is of several loaders.
        eval_batch: what `Point.loss` and the metrics are taken on, in place of the first 256 samples of the validation
            data, or of fewer with long sequences.
        run: the run's folder, in place of `log_dir/phasewatch`.
        measure: "inline" or "background", as in `PhaseMonitor`.
        keep_snapshots: keep each snapshot's file after it is measured.
        average: as in `PhaseMonitor`.
        seed: of the minibatches and the noise.

    Raises:
        PhasewatchError: for arguments that make no sense, and before the first step for what can't be measured.

    Example:
        >>> import phasewatch as pw
        >>> callback = pw.LightningCallback(at=pw.every(50))
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
            "LightningCallback", at, sinks=sinks, sampler=sampler, metrics=metrics, parts=parts, probe=probe,
            loss=loss, data=data, eval_batch=eval_batch, run=run, measure=measure, keep_snapshots=keep_snapshots,
            average=average, seed=seed,
        )  # fmt: skip
        self._whole: CopyOf | None = None
        self._resumed: Path | None = None
        self._last_step = -1

    @property
    def monitor(self) -> PhaseMonitor | None:
        """The monitor of the training that runs or ran last; None before."""
        return self._attachment.monitor

    @property
    def probe(self) -> Probe | None:
        """What measures it; None before, and on another rank than 0."""
        return self._attachment.probe

    @property
    def state_key(self) -> str:
        """What tells this callback's state from another one's in a checkpoint."""
        return self._generate_state_key(run=None if self._attachment.run is None else str(self._attachment.run))

    def state_dict(self) -> dict[str, Any]:
        """The run's folder, for a checkpoint."""
        return {"run": str(self.monitor.run.absolute())} if self.monitor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the run that a checkpoint names, if it is there."""
        run = state_dict.get("run")
        if isinstance(run, str) and Path(run, "run.json").is_file():
            self._resumed = Path(run)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Keep a whole module while there is one, for a strategy that will shard it."""
        shards = type(trainer.strategy).__name__ in {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
        if stage == "fit" and shards and trainer.global_rank == 0 and next(pl_module.parameters(), None) is not None:
            self._whole = CopyOf(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the probe and the monitor."""
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "phasewatch"  # asks all ranks
        model = trainer.strategy.model if is_sharded(trainer.strategy.model) else pl_module
        self._last_step = trainer.global_step
        self._attachment.begin(model, self._resumed or folder, lambda: self._found(trainer, pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take a snapshot if one is due, once for the batches whose gradients are accumulated."""
        if self.monitor and trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.monitor(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure what waits, tell the sinks, and write the report."""
        if self.monitor:
            self.monitor.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the run, and leave what waits to a resumed run or a replay."""
        if self.monitor:
            self.monitor.__exit__(type(exception), exception, exception.__traceback__)

    def _found(self, trainer: Any, module: Any) -> Found:
        attachment = self._attachment
        data, batch_size, held_out = None, None, None
        if not attachment.has_own_data:
            loader = trainer.train_dataloader
            if not isinstance(loader, DataLoader):
                raise PhasewatchError(
                    f"LightningCallback(...): the training data is a {type(loader).__name__}, not one DataLoader. Give "
                    "what minibatches are drawn from: LightningCallback(..., data=...)."
                )
            data = held_loader("LightningCallback", loader)
            batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
            held_out = _held_out(trainer.val_dataloaders)
        manual = not module.automatic_optimization
        if manual and not attachment.has_own_loss and len(trainer.optimizers) > 1:
            warn(
                f"LightningCallback(...): {type(module).__name__} has {len(trainer.optimizers)} optimizers, so λ̂ is "
                "that of the sum of what training_step gives to manual_backward. Give the loss to look at, "
                "LightningCallback(..., loss=...), if they oppose each other."
            )
        batch_size = batch_size or 32
        return Found(
            model=self._model(trainer, module),
            loss=_no_loss if attachment.has_own_loss else TrainingStepLoss(module, trainer),
            data=data,
            eval_data=held_out,
            batch_size=batch_size if data is None else min(batch_size, len(data.dataset)),  # pyright: ignore[reportArgumentType]
            autocast=_AUTOCAST.get(str(trainer.precision)),
        )

    def _model(self, trainer: Any, module: Any) -> Any:
        if not is_sharded(trainer.strategy.model):
            return CopyOf(module) if self._attachment.in_background else module
        if self._whole is None:
            raise PhasewatchError(
                "LightningCallback(...): the module is spread over several processes, and had no weights yet as the "
                "trainer began (configure_model makes them). Give the function that builds it: "
                "LightningCallback(probe=Probe(make_module, loss, data))."
            )
        return self._whole


def _held_out(loaders: Any) -> DataLoader | None:
    """The first loader of the validation data, to be asked for its samples."""
    while isinstance(loaders, list | tuple | dict) and loaders:
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders))
    if not isinstance(loaders, DataLoader) or not hasattr(loaders.dataset, "__len__"):
        return None
    return DataLoader(dataset_of(loaders), collate_fn=loaders.collate_fn)


def _no_loss(model: Any, batch: Any) -> Any:
    raise NotImplementedError
