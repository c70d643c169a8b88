"""Run folders of somebody else's: every file mutated, replaced, linked away (see tests/hostile.py)."""

import json
import os
import shutil
import warnings

import pytest
import torch
from hostile import NUMBERS, WORDS, Mutator, cell, check_answer, command, hunt, is_a_sentence, watched
from made_points import rising_points
from tiny_run import Told, make_model, make_probe, train

from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.schedule import every
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.runs.replay import replay

FILES = ("run.json", "points.jsonl", "transitions.json", "report.html", ".lock", "snapshots")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of three points, and the points of a longer one."""
    folder = tmp_path_factory.mktemp("original") / "run"
    train(folder, steps=6, probe=make_probe())
    many = "".join(json.dumps(point.as_json()) + "\n" for point in rising_points(24))
    return folder, many


def mutated_line(mutator, line):
    try:
        return json.dumps(mutator.json(json.loads(line), 0.05))
    except ValueError:  # mutated before
        return line


def damage(run, mutator, many):
    if mutator.maybe(0.4):
        (run / "points.jsonl").write_text(many)
    for _ in range(mutator.some((1, 1, 2))):
        path = run / mutator.some(FILES[:3] if mutator.maybe(0.8) else FILES)
        how = mutator.random.random()
        if how < 0.08 or path.is_symlink() or not path.exists():
            mutator.replace(path)
        elif path.name == "points.jsonl" and path.is_file():
            lines = path.read_text(errors="replace").split("\n")
            for i in range(len(lines)):
                if mutator.maybe(0.15):
                    lines[i] = mutator.some(
                        [
                            mutated_line(mutator, lines[i]),
                            lines[i - 1],
                            lines[i].replace('"step": 1', f'"step": {mutator.some(NUMBERS)}'),
                            lines[i].replace('"accuracy"', json.dumps(mutator.some(WORDS))),
                        ]
                    )
            content = "\n".join(lines).encode("utf-8", "surrogatepass") + mutator.some([b"\n", b"", b'{"step'])
            path.write_bytes(mutator.bytes(content) if how < 0.3 else content)
        elif path.suffix == ".json" and path.is_file():
            try:
                path.write_bytes(mutator.document(json.loads(path.read_bytes())))
            except (ValueError, RecursionError):
                path.write_bytes(b"")
        elif path.name == "snapshots" and path.is_dir() and (there := sorted(path.iterdir())):
            file = mutator.some(there)
            if mutator.maybe(0.5):
                mutator.replace(file)
            elif file.is_file() and not file.is_symlink():
                file.write_bytes(mutator.bytes(file.read_bytes()))


def resume(run):
    """Training that goes on in the folder, and is what it is without a monitor."""
    model = make_model()
    try:
        monitor = PhaseMonitor(model, make_probe(), run=run, at=every(2), sinks=[Told()])
    except PhasewatchError as error:
        is_a_sentence(error)
        return
    for step in (8, 9):
        with torch.no_grad():
            model.weight.mul_(0.5)
        monitor(step)
    monitor.close()
    assert torch.equal(model.weight, make_model().weight * 0.25)


def measure_again(run):
    try:
        list(replay(run, make_probe(), run=run.with_name("again")))
    except PhasewatchError as error:
        is_a_sentence(error)


def test_mutated_run_folders(tmp_path, original, monkeypatch):
    whole, many = original
    monkeypatch.chdir(tmp_path)
    # Drawing takes a second: every fiftieth page has its picture.
    from phasewatch.callbacks.sinks import report

    picture = report._picture

    def attempt(seed):
        mutator = Mutator(seed)
        monkeypatch.setattr(report, "_picture", picture if seed % 50 == 0 else lambda *_: "")
        with cell(tmp_path) as folder:
            run = folder / "run"
            shutil.copytree(whole, run)
            damage(run, mutator, many)
            action = mutator.some(["transitions", "transitions", "report", "emergence", "resume", "replay"])
            with watched(folder):
                if action in ("resume", "replay"):
                    with warnings.catch_warnings(record=True) as told:
                        warnings.simplefilter("always")
                        (resume if action == "resume" else measure_again)(run)
                    for warning in told:
                        is_a_sentence(warning.message)
                elif action == "emergence":
                    check_answer(
                        *command("emergence", run, "--sharp", "accuracy", "--smooth", mutator.some(["loss", "llc"]))
                    )
                else:
                    check_answer(*command(action, run))
            assert not [name for name in os.listdir(folder) if name not in {"run", "again", "run-2"}]

    hunt(60, attempt)
