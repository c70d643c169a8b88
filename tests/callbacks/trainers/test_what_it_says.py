"""What a monitor says of a model that nobody trains, and of one that changes where no snapshot can see it."""

import pytest
import torch
from tiny_run import loss, make_data, make_model, make_probe, one_warning

from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.schedule import every
from phasewatch.monitor.runs.replay import replay
from phasewatch.monitor.sampling.settings import SGLD


@pytest.mark.parametrize("measure", ["inline", "background"])
def test_a_model_that_nobody_trains_is_said_once(tmp_path, measure):
    with one_warning("steps 2 and 4 hold the same weights"):
        monitor = PhaseMonitor(make_model(), make_probe(), run=tmp_path / "run", at=every(2), measure=measure)
        for step in range(1, 9):
            monitor(step)
        monitor.close()


class Tempered(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 1)
        self.temperature, self.calls = 1.0, 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) / self.temperature


def test_a_number_that_changes_beside_the_weights_is_said_once_and_a_replay_is_the_same(tmp_path):
    torch.manual_seed(0)
    model = Tempered()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = PhaseMonitor(model, make_probe(model), run=tmp_path / "run", at=every(1))
    with one_warning(r"temperature is 0\.9 in the model that trains and 1 in"):
        for step in range(1, 4):
            optimizer.zero_grad()
            loss(model, make_data()).backward()
            optimizer.step()
            model.temperature *= 0.9
            monitor(step)
        monitor.close()
    assert list(replay(tmp_path / "run", make_probe(Tempered))) == list(monitor.trajectory)


def test_three_points_with_one_doubtful_verdict_name_calibrate(tmp_path):
    torch.manual_seed(0)
    model = make_model()
    creeping = SGLD(step_size=1e-7, localization=1.0, nbeta=20.0, chains=2, draws=40, burn_in=10, batch_size=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        loss(model, make_data()).backward()
        optimizer.step()
    monitor = PhaseMonitor(model, make_probe(sampler=creeping), run=tmp_path / "run", at=every(1))
    with one_warning(r"3 points in a row are CREEPING: .* calibrate\(snapshots, probe\)"):
        for step in range(1, 6):
            with torch.no_grad():
                model.weight.add_(1e-4)
            monitor(step)
        monitor.close()
