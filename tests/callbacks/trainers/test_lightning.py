"""A training by Lightning's trainer: bit-identical with the callback, measured as it trains, and resumed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from law_models import labelled
from processes import environment
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trainer_runs import SAMPLER, bits, differences, streams

import phasewatch as pw

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}:phasewatch.monitor.errors.PhasewatchWarning")
    for start in ("3 points in a row are", "The chains run one after")
] + [pytest.mark.filterwarnings("ignore:::lightning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


class Automatic(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return {"loss": loss, "step": self.global_step}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Manual(Automatic):
    def __init__(self, optimizers=1):
        super().__init__()
        self.automatic_optimization = False
        self.count = optimizers

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for scale, optimizer in enumerate(optimizers if self.count > 1 else [optimizers], start=1):
            with optimizer.toggle_model():
                loss = scale * F.cross_entropy(self.net(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 1.0, "norm")
                optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self):
        if self.count == 1:
            return super().configure_optimizers()
        some, others = list(self.parameters())[:4], list(self.parameters())[4:]
        return [torch.optim.AdamW(some, 1e-2), torch.optim.SGD(others, 1e-2)]


def train(folder, callback=None, make=Automatic, resume=None, **changes):
    lightning.seed_everything(3, verbose=False)
    module = make()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    of = {"max_steps": 6, "logger": False, "enable_checkpointing": False, **quiet, **changes}
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=[callback] if callback else [], **of)
    loader = DataLoader(TensorDataset(*labelled()), batch_size=8, shuffle=True)
    trainer.fit(module, loader, ckpt_path=resume)
    state = {name: bits(tensor) for name, tensor in module.state_dict().items()}
    for number, optimizer in enumerate(trainer.optimizers):
        for key, held in optimizer.state_dict()["state"].items():
            state |= {f"optimizer {number} {key} {name}": bits(value) for name, value in held.items()}
    state |= {name: (part.training, sorted(vars(part))) for name, part in module.named_modules()}
    state["logged"] = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return trainer, state | streams()


def watching(**options):
    return pw.LightningCallback(**{"at": pw.every(2), "sampler": SAMPLER, **options})


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        pytest.param(Automatic, {}, id="automatic"),
        pytest.param(Automatic, {"accumulate_grad_batches": 2, "max_steps": 4}, id="accumulation"),
        pytest.param(Automatic, {"precision": "bf16-mixed"}, id="bf16"),
        pytest.param(Manual, {}, id="manual"),
    ],
)
def test_training_is_bit_identical_and_a_replay_gives_the_same(make, changes, tmp_path):
    callback = watching()
    trainer, with_it = train(tmp_path / "with", callback, make, **changes)
    assert differences(train(tmp_path / "without", None, make, **changes)[1], with_it) == []
    assert callback.monitor.run == tmp_path / "with" / "phasewatch"
    assert callback.monitor.trajectory.steps.tolist() == list(range(2, trainer.global_step + 1, 2))
    assert list(pw.replay(callback.monitor.run, callback.probe)) == list(callback.monitor.trajectory)


@pytest.mark.slow
def test_the_background_gives_the_same(tmp_path):
    inline, background = watching(), watching(measure="background")
    train(tmp_path / "a", inline)
    train(tmp_path / "b", background)
    assert list(inline.monitor.trajectory) == list(background.monitor.trajectory)


def test_several_optimizers_give_the_sum_and_a_word_or_a_loss_of_ones_own(tmp_path):
    def own(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1])

    summed, given = watching(at=pw.every(4)), watching(at=pw.every(4), loss=own)
    with pytest.warns(pw.PhasewatchWarning, match=r"Manual has 2 optimizers, so λ̂ is that of the sum"):
        train(tmp_path / "a", summed, lambda: Manual(2), max_steps=8)
    train(tmp_path / "b", given, lambda: Manual(2), max_steps=8)
    assert summed.monitor.trajectory.steps.tolist() == [4, 8]
    assert summed.monitor.trajectory.loss == pytest.approx(3 * given.monitor.trajectory.loss, rel=1e-5)


def test_a_checkpoint_names_the_run_that_a_resumed_training_goes_on_with(tmp_path):
    def of_one_folder(name):
        return {"logger": CSVLogger(tmp_path / name), "enable_checkpointing": True}

    whole, first, second = watching(), watching(), watching()
    train(tmp_path, whole, **of_one_folder("whole"))
    trainer, _ = train(tmp_path, first, max_steps=4, **of_one_folder("resumed"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = train(tmp_path, second, resume=tmp_path / "last.ckpt", **of_one_folder("resumed"))
    assert resumed.log_dir.endswith("version_1")
    assert second.monitor.run == first.monitor.run
    assert "version_0" in str(second.monitor.run)
    assert second.monitor.trajectory.steps.tolist() == whole.monitor.trajectory.steps.tolist() == [2, 4, 6]
    assert list(second.monitor.trajectory)[:2] == list(whole.monitor.trajectory)[:2]
    assert first.state_key == second.state_key != watching(run=tmp_path / "other").state_key


def test_what_cannot_be_drawn_from_is_named(tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_steps=1,
        callbacks=[watching()],
        accelerator="cpu",
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    loaders = [DataLoader(TensorDataset(*labelled()), batch_size=8)] * 2
    with pytest.raises(pw.PhasewatchError, match=r"the training data is a list, not one DataLoader.*data=\.\.\."):
        trainer.fit(Automatic(), loaders)


class Repeatable(Automatic):
    """It draws nothing: Lightning's checkpoints hold no random state."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.Identity()


class Killer(lightning.Callback):
    """Kills its process where a batch has ended, before or after the callbacks that come first."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_with_checkpoints(folder, callback, kill_at=0, first=False, resume=None):
    """All steps see the same batch: Lightning doesn't go on within an epoch where it was."""
    lightning.seed_everything(3, verbose=False)
    checkpoints = ModelCheckpoint(folder / "checkpoints", save_last=True, every_n_train_steps=3)
    callbacks = [callback, Killer(kill_at)]
    trainer = lightning.Trainer(
        max_steps=9, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, logger=CSVLogger(folder / "logs"),
        callbacks=[*(callbacks[::-1] if first else callbacks), checkpoints],
    )  # fmt: skip
    data = TensorDataset(*(tensor[:24] for tensor in labelled()))
    trainer.fit(Repeatable(), DataLoader(data, batch_size=24), ckpt_path=resume)


@pytest.mark.slow
@pytest.mark.parametrize(("measure", "first"), [("inline", False), ("inline", True), ("background", False)])
def test_after_kill_9_a_resumed_training_ends_with_the_same_points(measure, first, tmp_path):
    train_with_checkpoints(tmp_path / "whole", whole := watching())
    for step, resume in ((5, None), (8, "last"), (0, "last")):
        order = f"Path({str(tmp_path / 'killed')!r}), watching(measure={measure!r}), {step}, {first}, {resume!r}"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"from test_lightning import *; train_with_checkpoints({order})"],
            env=environment(PYTHONPATH=f"{Path(__file__).parent}:{environment()['PYTHONPATH']}"),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == (-signal.SIGKILL if step else 0), done.stderr
    (run,) = (tmp_path / "killed").glob("logs/**/phasewatch")
    left = list(pw.Trajectory.read(run / "points.jsonl"))
    assert [point.step for point in left] == [2, 4, 6, 8]
    assert left == list(whole.monitor.trajectory)
    assert list(pw.replay(run, whole.probe)) == left
