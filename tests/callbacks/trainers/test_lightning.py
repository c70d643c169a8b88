"""A training by Lightning's trainer: bit-identical with the callback, measured as it trains, and resumed."""

import gc
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
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from trainer_runs import SAMPLER, bits, differences, streams

import phasewatch as pw

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}:phasewatch.monitor.errors.PhasewatchWarning")
    for start in ("3 points in a row are", "The chains run one after")
] + [
    pytest.mark.usefixtures("reported"),
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Trainers collect garbage as they start and end, and go through all that was imported unless it is frozen."""
    gc.freeze()
    yield
    gc.unfreeze()


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
        pytest.param(Automatic, {"precision": "64-true"}, id="double"),
        pytest.param(Automatic, {"precision": "bf16-true"}, id="bf16 weights"),
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


class Validated(Automatic):
    def validation_step(self, batch, batch_idx):
        return self.net(batch[0]).sum()


def test_loaders_of_parts_of_a_dataset_are_measured_on_their_parts(tmp_path):
    """Of one dataset the first third is trained on and the second held out; the last holds no numbers."""
    x, y = labelled()
    trained_on, held_out, left = (part.tolist() for part in torch.arange(len(x)).tensor_split(3))
    x[left] = torch.nan
    loaders = [
        DataLoader(TensorDataset(x, y), batch_size=8, sampler=SubsetRandomSampler(part))
        for part in (trained_on, held_out)
    ]
    callback = watching(run=tmp_path / "run")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        max_steps=4, callbacks=[callback], accelerator="cpu", logger=False, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(Validated(), *loaders)
    subject = callback.probe.subject
    assert torch.equal(subject.eval_batch[0], x[held_out])
    kept = subject.kept(callback.probe.sampler)
    for batch in (kept[number] for number in range(len(kept))):
        assert all((row == x[trained_on]).all(dim=1).any() for row in batch[0])


class Reading(Automatic):
    """Its loss is another one by what it reads of its trainer, and its gradient isn't."""

    def __init__(self, read):
        super().__init__()
        self.read, self.found = read, []

    def training_step(self, batch, batch_idx):
        found = self.read(self)
        self.log("loss", found)
        return F.cross_entropy(self.net(batch[0]), batch[1]) + found

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1.0)
        halved = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": halved, "interval": "step"}]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.found.append(float(self.read(self)))


def clock(module):
    trainer = module.trainer
    return module.current_epoch + trainer.current_epoch + 10 * (module.global_step + trainer.global_step)


def settings(module):
    trainer = module.trainer
    numbers = trainer.max_steps + trainer.num_training_batches + trainer.world_size + trainer.estimated_stepping_batches
    flags = trainer.training and not (trainer.sanity_checking or trainer.validating or trainer.should_stop)
    absent = [trainer.logger, module.logger, trainer.datamodule, trainer.checkpoint_callback]
    texts = [trainer.precision, trainer.state.fn]
    assert absent == [None] * 4
    assert texts == ["32-true", "fit"]
    return numbers + trainer.accumulate_grad_batches + 100 * flags + len(trainer.train_dataloader.dataset)


def rates(module):
    (group,) = module.optimizers().param_groups
    (rate,) = module.lr_schedulers().get_last_lr()
    (config,) = module.trainer.lr_scheduler_configs
    of_trainer = module.trainer.optimizers[0].param_groups[0]
    return group["lr"] + 10 * rate + of_trainer["lr"] + of_trainer["betas"][0] + config.scheduler.last_epoch


@pytest.mark.parametrize("read", [clock, settings, rates])
def test_a_step_reads_its_trainer_as_it_is_at_the_snapshots_step(read, tmp_path):
    modules = []

    def make(read=read):
        modules.append(Reading(read))
        return modules[-1]

    callback, plain = watching(), watching()
    _, with_it = train(tmp_path / "with", callback, make)
    assert differences(train(tmp_path / "without", None, make)[1], with_it) == []
    train(tmp_path / "plain", plain, lambda: make(lambda module: 0.0))
    assert modules[0].found == modules[1].found
    read_by_probe = callback.monitor.trajectory.loss - plain.monitor.trajectory.loss
    assert read_by_probe == pytest.approx(modules[0].found[1::2], abs=1e-4)
    assert list(pw.replay(callback.monitor.run, callback.probe)) == list(callback.monitor.trajectory)


def test_nothing_that_a_step_does_to_its_trainer_reaches_it(tmp_path):
    def meddle(module):
        if type(module.trainer) is not lightning.Trainer:
            module.optimizers().param_groups[0]["lr"] = 5.0
            module.trainer.optimizers[0].param_groups.clear()
            module.optimizers().step()
            module.lr_schedulers().step()
            module.trainer.should_stop = True
            module.trainer.fit_loop.max_epochs = 0
            module.trainer.save_checkpoint("there")
            module.logger.experiment.add_scalar("a", 1)
            module.trainer.datamodule.seen.append(1)
            module.trainer.datamodule.scale = 7.0
        return module.trainer.datamodule.scale

    class Data(lightning.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.scale, self.seen = 3.0, []

        def train_dataloader(self):
            return DataLoader(TensorDataset(*labelled()), batch_size=8)

    def fit(folder, *callbacks):
        lightning.seed_everything(3, verbose=False)
        module, data = Reading(meddle), Data()
        trainer = lightning.Trainer(
            max_steps=4, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=folder, logger=CSVLogger(folder), callbacks=list(callbacks),
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        left = [trainer.global_step, rates, data.seen, data.scale, module.found]
        return left, {name: bits(tensor) for name, tensor in module.state_dict().items()}

    callback = watching()
    assert fit(tmp_path / "with", callback) == fit(tmp_path / "without")
    assert callback.monitor.trajectory.steps.tolist() == [2, 4]
    assert callback.monitor.trajectory.loss.min() > 7  # the probe meddled


@pytest.mark.slow
def test_a_clock_that_another_process_does_not_know_is_named(tmp_path):
    def by_epoch(module):
        return 5.0 * max(0, module.current_epoch - 1)

    named = (
        r"trainer\.current_epoch, which Reading\.training_step reads, is 2 at step \d+\. Another process .* with 0 as"
    )
    callback = watching(measure="background", at=pw.every(4))
    with pytest.warns(pw.PhasewatchWarning, match=named):
        train(tmp_path, callback, lambda: Reading(by_epoch), max_steps=12 * len(labelled()[0]) // 32)


@pytest.mark.parametrize(
    ("read", "named"),
    [
        pytest.param(lambda module: module.trainer.callback_metrics["a"] * 2.0, "callback_metrics", id="arithmetic"),
        pytest.param(lambda module: torch.tensor(1.0) * module.trainer.callback_metrics["a"], "callback", id="tensor"),
        pytest.param(lambda module: 1.0 if module.trainer.fit_loop.done else 0.0, "fit_loop.done", id="truth"),
        pytest.param(lambda module: module.trainer.no_such + 1.0, "no_such", id="absent"),
    ],
)
def test_what_is_not_known_of_the_trainer_is_named_with_a_way_out(read, named, tmp_path):
    reads = (
        rf"training_step reads self\.trainer\.{named}.*, which isn't known.*LightningCallback\(\.\.\., loss=\.\.\.\)"
    )
    with pytest.raises(pw.PhasewatchError, match=reads):
        train(tmp_path / "a", watching(), lambda: Reading(read))


def test_a_step_that_fails_by_itself_is_named_with_a_way_out(tmp_path):
    def fail(module):
        raise ValueError("no such thing")

    with pytest.raises(pw.PhasewatchError, match=r"no such thing.*LightningCallback\(\.\.\., loss=\.\.\.\)\.$"):
        train(tmp_path / "a", watching(), lambda: Reading(fail))


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
