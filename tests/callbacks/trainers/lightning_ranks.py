"""One rank of a training by `lightning.Trainer`, started by `test_trainer_ranks.py`; it prints what it left."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from law_models import labelled
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trainer_runs import SAMPLER, digest

import phasewatch as pw

ORDER, RANK = json.loads(sys.argv[1]), int(sys.argv[2])
FOLDER = Path(ORDER["folder"])


class Spread(lightning.LightningModule):
    """Its weights are made with it, or "late", when its processes are known."""

    def __init__(self) -> None:
        super().__init__()
        if not ORDER.get("late"):
            self.make()

    def make(self) -> None:
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def configure_model(self) -> None:
        if ORDER.get("late"):
            self.make()
        if ORDER["kind"] == "tp":
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
        if ORDER["kind"] == "fsdp2":
            fully_shard(self.up, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.down, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        value = F.cross_entropy(self.down(F.dropout(self.up(batch[0]).tanh(), 0.2, self.training)), batch[1])
        self.log("loss", value)
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def strategy() -> Any:
    if ORDER["kind"] == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    sizes = {"tp": (1, 2), "fsdp2": (2, 1)}[ORDER["kind"]]
    return ModelParallelStrategy(*sizes, process_group_backend="gloo")


def train(folder: Path, callback: Any) -> dict[str, torch.Tensor]:
    lightning.seed_everything(3, verbose=False)
    module = Spread()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", devices=2, strategy=strategy(), default_root_dir=folder,
        callbacks=[callback] if callback else [], **quiet,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*labelled()), batch_size=8, shuffle=True))
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach() for name, t in module.named_parameters()}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    left: dict[str, Any] = {}
    try:
        if not ORDER.get("late"):
            left["without"] = digest(train(FOLDER / "without", None))
        for measure in ("inline", "background"):
            callback = pw.LightningCallback(at=pw.every(2), sampler=SAMPLER, measure=measure)
            trained = train(FOLDER / measure, callback)
            left[measure] = digest(trained)
            if RANK == 0:
                kept = load_file(FOLDER / measure / "phasewatch" / "snapshots" / "step-00000006.safetensors")
                assert trained.keys() == kept.keys()
                assert all(torch.equal(kept[name], tensor) for name, tensor in trained.items())
                assert list(pw.replay(callback.monitor.run, callback.probe)) == list(callback.monitor.trajectory)
    except pw.PhasewatchError as error:
        left["said"] = str(error)
    print(json.dumps(left), flush=True)
    os._exit(0)


main()
