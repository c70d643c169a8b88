"""The recipes of CONTRIBUTING.md work: each is followed on a toy, word for word."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quadratic import Quadratic, excess_losses, mean_and_error
from tiny_run import Told, a_snapshot, lines, loss, make_data, make_model, make_probe

import phasewatch as pw
from phasewatch.monitor.runs.executor import PLACES
from phasewatch.monitor.sampling import settings, steps
from phasewatch.monitor.sampling.chains import run_chains
from phasewatch.monitor.snapshots import scan
from phasewatch.monitor.snapshots.formats import FORMATS

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = {
    "sampler": {"monitor/sampling/steps.py", "monitor/sampling/settings.py"},
    "sink": {"callbacks/sinks/tab_separated.py"},
    "checkpoint format": {"monitor/snapshots/formats/numpy_files.py", "monitor/snapshots/formats/__init__.py"},
    "trainer": {"callbacks/trainers/optimizer_hook.py"},
    "executor": {"callbacks/executors/shell.py", "monitor/runs/executor.py"},
    "transition kind": {"monitor/trajectories/kinds.py", "callbacks/figures/style.py"},
}


def blocks(recipe):
    """The code of a recipe: (language, file, code), in order."""
    (section,) = re.findall(rf"^### Add an? {recipe}\n(.*?)(?=^###? |^<!-- )", CONTRIBUTING, re.DOTALL | re.MULTILINE)
    return re.findall(r'^```(\w+) title="(.*?)"\n(.*?)^```', section, re.DOTALL | re.MULTILINE)


def run_code(code, name, **there):
    """What a block defines, in a namespace that holds what its file already has."""
    namespace = {**there, "__name__": name}
    exec(compile(code, name, "exec"), namespace)
    return SimpleNamespace(**namespace)


def module(recipe):
    """The only Python block of a recipe, as the new file that it is."""
    ((_, file, code),) = [block for block in blocks(recipe) if block[0] == "python"]
    return run_code(code, file)


def edited(content, diff):
    """A file's content after an edit whose context must be there, once."""
    before = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] != "+")
    after = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] != "-")
    assert content.count(before) == 1, before
    return content.replace(before, after)


def test_there_is_a_recipe_for_each_thing_and_it_touches_the_files_that_it_says():
    assert re.findall(r"^### Add an? (.*)$", CONTRIBUTING, re.MULTILINE) == list(RECIPES)
    for recipe, files in RECIPES.items():
        assert {file for _, file, _ in blocks(recipe)} == files, recipe
        for language, file, code in blocks(recipe):
            if language == "diff":
                assert edited((ROOT / file).read_text(encoding="utf-8"), code)
            elif not (ROOT / file).exists():
                assert (ROOT / file).parent.is_dir(), file


# A sampler


def the_sampler(**fields):
    (_, _, step), (_, _, sampler) = blocks("sampler")
    made = run_code(step, steps.__name__, **vars(steps))
    made = run_code(sampler, settings.__name__, **vars(settings), exponential_step=made.exponential_step)
    return made.exponential_step, made.ExponentialSGLD(**fields)


def test_the_step_of_the_recipe_by_hand():
    step, _ = the_sampler()
    w, anchor, grad, noise = (torch.tensor([value], dtype=torch.float64) for value in (2.0, 1.0, 3.0, 0.5))
    q = math.exp(-0.01 * 4 / 2)
    by_hand = 1 + q * (2 - 1) - (1 - q) / 4 * 10 * 3 + math.sqrt((1 - q * q) / 4) * 0.5
    assert step(w, anchor, grad, noise, nbeta=10.0, gamma=4.0, eps=0.01).item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(("vectorised", "draws"), [(True, 2000), (False, 200)])
def test_the_sampler_of_the_recipe_samples_a_quadratic(vectorised, draws):
    h = torch.tensor([0.0, 0.5, 2.0, 3.0], dtype=torch.float64)
    _, sampler = the_sampler(
        step_size=0.02, localization=3.0, nbeta=10.0, chains=16, draws=draws, burn_in=150, batch_size=None
    )
    target = Quadratic(h, torch.zeros(4, dtype=torch.float64), vectorised=vectorised)
    (chains,) = run_chains(target, [target.pieces(target.centre)], sampler, seed=3)
    q = math.exp(-0.02 * 3 / 2)
    kept = q - (1 - q) / 3 * 10 * h  # of w − w* at each step; the rest of its variance is the noise's
    truth = (10 * h / 2 * (1 - q * q) / 3 / (1 - kept**2)).sum().item()
    found, error = mean_and_error(excess_losses(chains, 10.0))
    assert abs(found - truth) < 4 * error
    assert error < truth / draws**0.5


def test_a_probe_takes_the_sampler_of_the_recipe():
    _, sampler = the_sampler(step_size=1e-3, nbeta=20.0, chains=2, draws=8, burn_in=2, batch_size=16)
    probe = make_probe(sampler=sampler)
    assert probe.settings["sampler"]["sampler"] == "ExponentialSGLD"
    assert math.isfinite(probe(a_snapshot(1)).llc.value)


# A sink


def test_the_sink_of_the_recipe_is_fed_by_a_replay(tmp_path):
    folder = saved_snapshots(tmp_path / "snapshots", [10, 20, 30])
    sink = module("sink").TabSeparatedSink(tmp_path / "points.tsv")
    points = list(pw.replay(folder, make_probe(), sinks=[sink]))
    written = [line.split("\t") for line in (tmp_path / "points.tsv").read_text().splitlines()]
    assert [(int(s), float(a), float(b)) for s, a, b in written] == [(p.step, p.loss, p.llc.value) for p in points]
    assert len(points) == 3


def saved_snapshots(path, at):
    folder = pw.SnapshotFolder(path)
    for step in at:
        folder.save(a_snapshot(step, seed=step))
    return folder


# A format


def test_the_format_of_the_recipe_reads_a_series(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "FORMATS", (*FORMATS, module("checkpoint format").NumpyFile()))
    for step in (100, 20):
        weights = {name: tensor.numpy() for name, tensor in a_snapshot(step, seed=step).tensors.items()}
        np.savez(tmp_path / f"step{step}.npz", **weights)
    opened = pw.open_series(tmp_path)
    assert opened.steps == (20, 100)
    assert torch.equal(opened.load(100).tensors["weight"], a_snapshot(100, seed=100).tensors["weight"])
    assert [point.step for point in pw.replay(opened, make_probe())] == [20, 100]


def test_the_format_of_the_recipe_runs_nothing_and_says_what_is_damaged(tmp_path, monkeypatch):
    form = module("checkpoint format").NumpyFile()
    np.savez(tmp_path / "step1.npz", weight=np.array([object()], dtype=object))
    (tmp_path / "step2.npz").write_bytes(b"PK\x03\x04 cut off")
    for step in (1, 2):
        with pytest.raises(pw.PhasewatchError, match=f"step{step}.npz is empty, cut off, or not a checkpoint"):
            form.load(tmp_path / f"step{step}.npz", tmp_path)


# A trainer


def trained(hook_of=None):
    model, (x, y) = make_model(), make_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    hook = hook_of(model, optimizer) if hook_of else None
    for _ in range(6):
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        optimizer.step()
    if hook:
        hook.close()
        optimizer.step()  # after close nothing is counted
    return model


def test_the_trainer_of_the_recipe_watches_a_toy_loop_and_changes_nothing(tmp_path):
    def hook_of(model, optimizer):
        monitor = pw.PhaseMonitor(model, make_probe(), run=tmp_path / "run", at=pw.every(2))
        return module("trainer").OptimizerHook(monitor, optimizer, taken=10)

    with pytest.warns(pw.PhasewatchWarning, match=r"jumped over \(2, 4, 6 and 2 more\)"):
        trained(hook_of)
    assert pw.Trajectory.read(tmp_path / "run/points.jsonl").steps.tolist() == [11, 12, 14, 16]
    last = pw.open_series(tmp_path / "run").load(16).tensors
    assert all(torch.equal(last[name], value) for name, value in trained().state_dict().items())


# An executor


def test_the_executor_of_the_recipe_is_used_by_replay(tmp_path, monkeypatch):
    folder, sink = saved_snapshots(tmp_path / "snapshots", [10, 20, 30]), Told()
    monkeypatch.setitem(sys.modules, "phasewatch.callbacks.executors.shell", module("executor"))
    monkeypatch.setitem(PLACES, "shell", "phasewatch.callbacks.executors.shell")
    monkeypatch.setenv("SUBMIT", "env WHERE=there")
    there = pw.replay(folder, make_probe(), run=tmp_path / "run", on="shell", workers=2, sinks=[sink])
    assert {p.step: p.as_json() for p in there} == {p.step: p.as_json() for p in pw.replay(folder, make_probe())}
    assert len(lines(tmp_path / "run").splitlines()) == len(sink.points) == 3


def test_two_places_to_measure_are_refused(tmp_path):
    folder = saved_snapshots(tmp_path / "snapshots", [10])
    with pytest.raises(pw.PhasewatchError, match=r"replay\(workers=2, on=...\) says twice where to measure"):
        pw.replay(folder, make_probe(), workers=2, on=lambda probe, snapshots: None)


# A kind


A_RUN_OF_THE_NEW_KIND = """
import sys
import numpy as np
import phasewatch as pw
from phasewatch.callbacks.figures.trajectory import draw_trajectory
from phasewatch.callbacks.sinks.terminal import print_transitions

steps = np.unique(np.geomspace(1, 100_000, 60).round())
rise = 1 / (1 + (300 / steps) ** 3)
noise = np.random.default_rng(0).normal(size=(2, len(steps)))
trajectory = pw.Trajectory.from_values(steps, loss=1 + rise + 0.01 * noise[0], llc=10 + 80 * rise + 0.3 * noise[1])
found = pw.find_transitions(trajectory)
assert [transition.kind for transition in found] == [pw.Kind.C], found
assert pw.Transition.from_json(found[0].as_json()) == found[0]
print(found[0].sentence())
print_transitions(trajectory, found)
figure = draw_trajectory(trajectory, found)
assert "C" in [text.get_text() for text in figure.axes[0].texts]
figure.savefig(sys.argv[1])
"""


def test_the_kind_of_the_recipe_is_found_and_drawn(tmp_path):
    for folder in ("monitor", "callbacks", "src"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for _, file, diff in blocks("transition kind"):
        path = tmp_path / file
        path.write_text(edited(path.read_text(encoding="utf-8"), diff), encoding="utf-8")
    package = tmp_path / "installed" / "phasewatch"
    shutil.copytree(tmp_path / "src/phasewatch", package)
    for folder in ("monitor", "callbacks"):
        (tmp_path / folder).rename(package / folder)
    setup = f"import sys; sys.path.insert(0, {str(package.parent)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + A_RUN_OF_THE_NEW_KIND, tmp_path / "figure.svg"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "a type C transition, the model became more complex and fits the data worse" in done.stdout
    assert (tmp_path / "figure.svg").stat().st_size > 1000
