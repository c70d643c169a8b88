"""A loss that reads what its trainer was at: measured with the values of the snapshot's step, alone and with others."""

from types import SimpleNamespace

import cloudpickle
import pytest
import torch
from torch import nn

import phasewatch as pw
from phasewatch.monitor.model.clock import Clock


class Trainer(SimpleNamespace):
    """Can be referred to weakly."""


class Annealed:
    """A loss that grows with what it reads."""

    __name__ = "annealed"

    def __init__(self, trainer, name):
        self.trainer, self.name = Clock(trainer, lambda trainer: dict(vars(trainer))), name

    def __call__(self, model, batch):
        return model(batch).square().mean() * self.trainer.look(self.name)


def snapshots(trainer, clock, steps=(3, 6, 9)):
    model = nn.Linear(3, 1)
    for step in steps:
        trainer.global_step, trainer.epoch = step, step / 2
        clock.note(step)
        yield pw.Snapshot.of(model, step)


@pytest.mark.parametrize(("name", "found"), [("global_step", [3, 6, 9]), ("epoch", [1.5, 3, 4.5])])
def test_snapshots_that_are_measured_together_have_each_their_own_values(name, found):
    torch.manual_seed(0)
    trainer = Trainer(global_step=1, epoch=0.5)
    loss = Annealed(trainer, name)
    sampler = pw.SGLD(step_size=1e-4, chains=2, draws=4, burn_in=2, batch_size=8)
    probe = pw.Probe(nn.Linear(3, 1), loss, torch.randn(32, 3), sampler=sampler)
    series = list(snapshots(trainer, loss.trainer))
    together = probe.measure(series)
    assert together == [probe(snapshot) for snapshot in series]
    assert [point.loss / together[0].loss for point in together] == pytest.approx([now / found[0] for now in found])


def test_another_process_has_what_was_noted_and_else_the_step_alone():
    trainer = Trainer(global_step=0, epoch=0.0)
    clock = Clock(trainer, lambda trainer: dict(vars(trainer)))
    before = cloudpickle.loads(cloudpickle.dumps(clock))
    list(snapshots(trainer, clock))
    after = cloudpickle.loads(cloudpickle.dumps(clock))
    assert before.at(6) == {"global_step": 6, "epoch": 0.0}
    assert clock.at(6) == after.at(6) == {"global_step": 6, "epoch": 3.0}
    del trainer
    after.note(12)
    clock.note(12)  # the trainer is gone
    assert clock.at(12) == after.at(12) == {"global_step": 12, "epoch": 0.0}
