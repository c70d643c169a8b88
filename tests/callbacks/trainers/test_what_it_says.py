"""What a monitor says of a model that nobody trains, and of one that changes where no snapshot can see it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_run import loss, make_data, make_model, make_probe, one_warning

from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.schedule import every
from phasewatch.monitor.errors import PhasewatchWarning
from phasewatch.monitor.runs.replay import replay
from phasewatch.monitor.sampling.settings import SGLD

pytestmark = pytest.mark.usefixtures("reported")


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
    with one_warning(r"temperature was 0\.9 at step 1 of the training and is 1 here"):
        assert list(replay(tmp_path / "run", make_probe(Tempered))) == list(monitor.trajectory)


def test_a_model_built_anew_with_another_number_is_said_by_a_replay(tmp_path):
    class Options:
        scale = 1.0

    class Cooled(Tempered):
        def __init__(self):
            super().__init__()
            self.options = Options()
            self.options.shift = 2.0

        def forward(self, x):
            return super().forward(x) + self.options.shift

    def colder():
        model = Cooled()
        model.temperature, model.options.shift = 0.25, 2.5
        return model

    model = Cooled()
    with PhaseMonitor(model, make_probe(model), run=tmp_path / "run", at=every(1)) as monitor:
        monitor(1)
    with pytest.warns(PhasewatchWarning) as told:
        list(replay(tmp_path / "run", make_probe(colder)))
    said = sorted(str(warning.message)[:60] for warning in told)
    assert said == [
        "options.shift was 2 at step 1 of the training and is 2.5 here"[:60],
        "temperature was 1 at step 1 of the training and is 0.25 here"[:60],
    ]
    assert list(replay(tmp_path / "run", make_probe(Cooled))) == list(monitor.trajectory)


WEIGHT = 1.0


@pytest.mark.parametrize("where", ["global", "closure", "attribute", "namespace"])
def test_a_number_that_the_loss_reads_and_that_changes_is_said(tmp_path, where, monkeypatch):
    options, inner = SimpleNamespace(weight=1.0), 1.0

    def change():
        nonlocal inner
        monkeypatch.setitem(globals(), "WEIGHT", 0.5)
        inner = options.weight = weighted.weight = 0.5

    class Weighted:
        weight, calls = 1.0, 0

        def __init__(self):
            self.weight, self.calls = 1.0, 0

        def __call__(self, model, batch):
            self.calls += 1
            return self.weight * loss(model, batch)

    weighted = Weighted()
    of = {
        "global": lambda model, batch: WEIGHT * loss(model, batch),
        "closure": lambda model, batch: inner * loss(model, batch),
        "attribute": weighted,
        "namespace": lambda model, batch: options.weight * loss(model, batch),
    }[where]
    model = make_model()
    monitor = PhaseMonitor(model, make_probe(model, loss=of), run=tmp_path / "run", at=every(1))
    monitor(1)
    with torch.no_grad():
        model.weight.add_(1)
    change()
    with one_warning(r"(?i)(weight|inner), which .* reads, is 0\.5 now and was 1 when the monitor began"):
        monitor(2)
        monitor.close()
    with one_warning(r"(?i)(weight|inner), which .* reads, was 1 at step 1 of the training and is 0\.5 here"):
        list(replay(tmp_path / "run", make_probe(model, loss=of)))


@pytest.mark.parametrize(
    ("before", "said"), [(False, r"trains, and is held fast"), (True, r"doesn't train, and is sampled")]
)
def test_a_layer_that_is_unfrozen_or_frozen_later_is_said_once(tmp_path, before, said):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(before)
    with one_warning(rf"0\.weight \(and 1 more\) {said} by the probe"):
        with PhaseMonitor(model, make_probe(model), run=tmp_path / "run", at=every(1)) as monitor:
            for step in range(1, 4):
                with torch.no_grad():
                    model[1].weight.add_(0.1)
                monitor(step)
                model[0].requires_grad_(not before)


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
