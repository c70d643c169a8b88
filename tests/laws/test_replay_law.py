"""Points measured live equal points replayed from what the run left, to the last bit."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from law_models import (
    COMPILED,
    COMPILED_BLOCK,
    DATA_PARALLEL,
    HOLDER,
    PERCEPTRON,
    PLAIN,
    TIED,
    TRANSFORMER,
    Case,
    Perceptron,
    classify,
    labelled,
)
from torch import Generator, nn
from torch.utils._pytree import tree_map

import phasewatch as pw
from phasewatch.monitor.model.loss import ModelLoss

pytestmark = pytest.mark.usefixtures("reported")
SAMPLER = pw.SGLD(step_size=1e-5, nbeta=30.0, chains=3, draws=5, burn_in=2, batch_size=16)
STEPS = (1, 2, 5)


def make_toy() -> nn.Module:
    from phasewatch.toy_tasks.in_context_regression import RegressionTransformer

    return RegressionTransformer(width=8, heads=2)


def toy_loss(model, batch):
    return (model(*batch) - batch[1]).square().mean()


def toy_batch(generator: Generator, size: int):
    x = torch.randn(size, 8, 4, generator=generator)
    return x, (x @ torch.randn(size, 4, 1, generator=generator)).squeeze(-1)


TOY = Case(make_toy, toy_loss, lambda: toy_batch)
METRICS = {"norm": lambda model, batch: sum(p.square().sum() for p in model.parameters()).item()}


def probe_of(case, make=None):
    return pw.Probe(make or case.make, case.loss, case.data(), sampler=SAMPLER, metrics=METRICS, seed=3)


def train(case, model, monitor, checkpoints=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = Generator().manual_seed(8)
    data = case.data()
    for step in range(1, max(STEPS) + 1):
        rows = torch.randperm(64, generator=generator)[:32]
        batch = data(generator, 32) if callable(data) else tree_map(lambda tensor, rows=rows: tensor[rows], data)
        optimizer.zero_grad()
        case.loss(model.train(), batch).backward()
        optimizer.step()
        if checkpoints and step in STEPS:
            torch.save(model.state_dict(), checkpoints / f"step{step}.pt")
        monitor(step)


@pytest.mark.parametrize("case", [PERCEPTRON, pytest.param(TOY, marks=pytest.mark.slow)], ids=["mlp", "toy"])
def test_live_points_equal_replayed_points(case, tmp_path):
    torch.manual_seed(4)
    start = case.make().state_dict()

    def live(run, measure, made=None):
        model = case.make()
        model.load_state_dict(start)
        torch.manual_seed(5)
        at = STEPS.__contains__
        with pw.PhaseMonitor(
            model, probe_of(case, made and model), run=tmp_path / run, at=at, measure=measure
        ) as monitor:
            train(case, model, monitor, tmp_path)
        return list(monitor.trajectory)

    inline = live("inline", "inline")
    assert [point.step for point in inline] == list(STEPS)
    assert len({point.llc.value for point in inline}) == len(STEPS)
    assert all(np.isfinite(point.llc.value) and np.isfinite(point.metrics["norm"]) for point in inline)
    assert live("module", "inline", made=True) == inline
    assert live("background", "background") == inline
    assert list(pw.replay(tmp_path / "inline", probe_of(case))) == inline
    assert list(pw.replay(tmp_path, probe_of(case))) == inline
    kept = pw.Trajectory(pw.replay(tmp_path / "background", probe_of(case), workers=2, run=tmp_path / "kept"))
    assert list(kept) == inline
    assert list(pw.Trajectory.read(tmp_path / "kept" / "points.jsonl")) == inline


WRAPPED = {
    "compiled block": COMPILED_BLOCK,
    "compiled whole": COMPILED,
    "data parallel": DATA_PARALLEL,
    "child called module": HOLDER,
    "tied, with a buffer that is not saved": TIED,
    "mask that is not saved": TRANSFORMER,
}


def live_points(case, path, wrap=lambda model: model):
    """The points of a run in `path / "run"`, with the model's state dicts in `path`."""
    torch.manual_seed(4)
    model = wrap(case.make())
    run, at = path / "run", STEPS.__contains__
    with pw.PhaseMonitor(model, probe_of(case), run=run, at=at, measure="inline") as monitor:
        train(case, model, monitor, path)
    points = list(monitor.trajectory)
    assert [point.step for point in points] == list(STEPS)
    assert len({point.llc.value for point in points}) == len(STEPS)
    return points


@pytest.mark.filterwarnings("ignore:The chains run one after another")
@pytest.mark.parametrize("case", WRAPPED.values(), ids=WRAPPED)
def test_live_points_equal_replayed_points_however_the_model_is_wrapped(case, tmp_path):
    points = live_points(case, tmp_path)
    assert list(pw.replay(tmp_path / "run", probe_of(case))) == points
    assert list(pw.replay(tmp_path / "run" / "snapshots", probe_of(case))) == points
    assert list(pw.replay(tmp_path, probe_of(case))) == points


@pytest.mark.filterwarnings("ignore:The chains run one after another")
@pytest.mark.parametrize("live", [PLAIN, COMPILED_BLOCK, COMPILED, DATA_PARALLEL])
@pytest.mark.parametrize("replayed", [PLAIN, COMPILED_BLOCK, COMPILED])
def test_a_checkpoint_of_a_plain_model_loads_into_a_wrapped_one_and_the_other_way_round(live, replayed, tmp_path):
    points = live_points(live, tmp_path)
    for series in (tmp_path / "run", tmp_path):
        for live_point, point in zip(points, pw.replay(series, probe_of(replayed)), strict=True):
            assert point.step == live_point.step
            assert point.loss == pytest.approx(live_point.loss, rel=1e-6)
            assert point.llc.value == pytest.approx(live_point.llc.value, rel=1e-3)


def test_live_points_equal_replayed_points_under_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        points = live_points(PLAIN, tmp_path, wrap=nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    assert list(pw.replay(tmp_path / "run", probe_of(PLAIN))) == points
    assert list(pw.replay(tmp_path, probe_of(PLAIN))) == points


def test_live_points_of_averaged_weights_equal_replayed_points(tmp_path):
    torch.manual_seed(4)
    start = Perceptron().state_dict()

    def live(measure):
        model = Perceptron()
        model.load_state_dict(start)
        torch.manual_seed(5)
        run, at, probe = tmp_path / measure, STEPS.__contains__, probe_of(PERCEPTRON)
        with pw.PhaseMonitor(model, probe, run=run, at=at, measure=measure, average=0.3) as monitor:
            train(PERCEPTRON, model, monitor)
        return list(monitor.trajectory)

    inline = live("inline")
    assert list(pw.replay(tmp_path / "inline", probe_of(PERCEPTRON))) == inline
    assert live("background") == inline


def test_a_replay_of_averages_is_the_same_with_workers_and_in_its_folder(tmp_path):
    series = pw.averaged(save_series(tmp_path / "series", range(1000, 1005)))
    probe = probe_of(PERCEPTRON)
    alone = list(pw.replay(series, probe, run=tmp_path / "run"))
    assert [point.step for point in alone] == list(range(1000, 1005))
    assert list(pw.Trajectory(pw.replay(series, probe, workers=2))) == alone
    assert alone == [probe(series.load(step)) for step in series.steps]
    plain = list(pw.replay(series.series, probe))
    assert [a == b for a, b in zip(alone, plain, strict=True)] == [True, False, False, False, True]


@pytest.mark.parametrize("first", ["plain", "averaged", "other"])
def test_a_folder_holds_points_of_one_average(first, tmp_path):
    plain = save_series(tmp_path / "series", range(1000, 1005))
    sorts = {"plain": plain, "averaged": pw.averaged(plain), "other": pw.averaged(plain, neighbours=1)}
    probe = probe_of(PERCEPTRON)
    points = list(pw.replay(sorts[first], probe, run=tmp_path / "run"))
    for sort, series in sorts.items():
        if sort == first:
            assert list(pw.replay(series, probe, run=tmp_path / "run")) == points
        else:
            with pytest.raises(pw.PhasewatchError, match=r"replay\(.*holds snapshots or points taken with average="):
                pw.replay(series, probe, run=tmp_path / "run")


def save_series(path, steps):
    torch.manual_seed(0)
    folder = pw.SnapshotFolder(path)
    for step in steps:
        folder.save(pw.Snapshot.of(Perceptron(), step))
    return folder


def test_the_order_of_measuring_does_not_matter(tmp_path):
    folder = save_series(tmp_path, (1, 2, 3))
    probe = probe_of(PERCEPTRON)
    forwards = [probe(folder.load(step)) for step in (1, 2, 3)]
    assert [probe(folder.load(step)) for step in (3, 2, 1)] == forwards[::-1]


def test_what_a_replay_holds_is_not_measured_again(tmp_path):
    folder = save_series(tmp_path / "series", (1, 2, 3, 4))
    measured = []
    counting = pw.Probe(
        Perceptron,
        classify,
        labelled(),
        sampler=SAMPLER,
        metrics={"count": lambda model, batch: float(len(measured.append(1) or measured))},
    )
    first = pw.replay(folder, counting, run=tmp_path / "run")
    points = [next(first), next(first)]
    first.close()
    assert [point.step for point in points] == [1, 2]
    assert len(measured) == 2
    again = list(pw.replay(folder, counting, run=tmp_path / "run"))
    assert again[:2] == points
    assert [point.step for point in again] == [1, 2, 3, 4]
    assert len(measured) == 4
    assert list(pw.replay(folder, counting, run=tmp_path / "run")) == again
    assert len(measured) == 4


class Closed:
    def __init__(self):
        self.items, self.closed = [], False

    def write(self, item):
        self.items.append(item)

    def close(self):
        self.closed = True


def test_an_abandoned_replay_lets_go_of_its_folder_and_its_sinks(tmp_path):
    folder = save_series(tmp_path / "series", (1, 2, 3))
    sink = Closed()
    for _ in pw.replay(folder, probe_of(PERCEPTRON), run=tmp_path / "run", sinks=[sink]):
        break
    assert sink.closed
    assert [point.step for point in sink.items] == [1]
    assert len(list(pw.replay(folder, probe_of(PERCEPTRON), run=tmp_path / "run"))) == 3


def test_both_paths_agree(monkeypatch, tmp_path):
    def make():
        return Perceptron().double()

    x, y = labelled()

    def build():
        return pw.Probe(make, classify, (x.double(), y), sampler=SAMPLER, seed=3)

    torch.manual_seed(0)
    snapshot = pw.Snapshot.of(make(), 1)
    vectorised = build()
    assert vectorised.subject.loss.vectorised
    monkeypatch.setattr(ModelLoss, "choose_path", lambda self, *given: None)
    looped = build()
    assert not looped.subject.loss.vectorised
    a, b = vectorised(snapshot), looped(snapshot)
    assert a.loss == pytest.approx(b.loss, rel=1e-12)
    assert a.llc.per_chain == pytest.approx(b.llc.per_chain, rel=1e-8)
    assert abs(a.llc.value) > 1e-3


def test_a_probe_rebuilt_elsewhere_has_torchs_defaults_of_where_it_was_made(tmp_path):
    folder = save_series(tmp_path / "series", ())
    x, y = labelled()
    torch.set_default_dtype(torch.float64)
    try:
        folder.save(pw.Snapshot.of(Perceptron(), 1))
        probe = pw.Probe(lambda: Perceptron(), classify, (x.double(), y), sampler=SAMPLER)
        inline = list(pw.replay(folder, probe))
        assert list(pw.replay(folder, probe, workers=2)) == inline
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_a_script_without_a_main_guard_measures_in_other_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from torch import nn
            import phasewatch as pw

            print("started")
            WIDTH = 3

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.layer = nn.Linear(WIDTH, 1)

                def forward(self, x):
                    return self.layer(x)

            def distance(a, b):
                return (a - b).square().mean()

            def loss(model, batch):
                return distance(model(batch), batch[:, :1])

            torch.manual_seed(0)
            model, data = Net(), torch.randn(64, WIDTH)
            probe = pw.Probe(Net, loss, data, sampler=pw.SGLD(draws=4, batch_size=8), metrics={"w": lambda m, b: WIDTH})
            with pw.PhaseMonitor(model, probe, run="run", at=pw.every(1), measure="background") as monitor:
                for step in range(3):
                    with torch.no_grad():
                        model.layer.weight += 0.1
                    monitor(step)
            live = list(monitor.trajectory)
            assert [p.step for p in live] == [0, 1, 2], live
            replayed = sorted(pw.replay("run", probe, workers=2), key=lambda p: p.step)
            assert replayed == live == list(pw.replay("run", probe))
            print("done")
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["started", "done"]
    assert "Error" not in done.stderr
