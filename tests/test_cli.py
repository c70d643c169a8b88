"""The command line, through its entry point: what it prints, what it keeps, and how it fails."""

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import interruptible
from tiny_run import wait_for
from torch import nn

from phasewatch import cli
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.probing import automatic
from phasewatch.monitor.sampling.settings import SGLD
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

PUBLISHED = sorted((Path(__file__).parent / "data" / "published").glob("*.csv"))
STEPS = (1, 20, 300, 4000, 50000)
PROBE = '''
import os
import time
from pathlib import Path

import torch
from torch import nn

from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.sampling.settings import SGLD

HERE = Path(__file__).parent

def make_model():
    return nn.Linear(3, 1)

def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()

def log(model, batch):
    """Leaves a line for each measurement, and takes its time from the second on if asked to."""
    with open(HERE / "log.txt", "a") as file:
        file.write("measured\\n")
    if len((HERE / "log.txt").read_text().splitlines()) > 1:
        time.sleep(float(os.environ.get("PHASEWATCH_TEST_NAP", 0)))
    return 1.5

def make_probe():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    sampler = SGLD(1e-3, 1.0, 10.0, chains=2, draws=8, burn_in=2, batch_size=16)
    return Probe(make_model, loss, (x, x.sum(1, keepdim=True)), sampler=sampler, metrics={"log": log}, threads=1)

probe = make_probe()

def fails():
    raise RuntimeError("no such data")

def returns_a_model():
    return make_model()

def wants_an_argument(size):
    return make_probe()

number = 3
'''


@pytest.fixture(autouse=True)
def imports_are_forgotten():
    """A probe file changes `sys.path`, and each test has its own file of one name."""
    path, modules = sys.path[:], set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name in {"my_probe", "broken", "leaves", "quits", "my-probe"}:
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory: a probe file and a series of checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_probe.py").write_text(PROBE)
    (tmp_path / "checkpoints").mkdir()
    for step in STEPS:
        torch.save(state_dict(step), tmp_path / "checkpoints" / f"step{step}.pt")
    return tmp_path


def state_dict(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"weight": 1 + torch.randn(1, 3, generator=generator) / step, "bias": torch.zeros(1)}


@pytest.fixture
def phasewatch(monkeypatch, capsys):
    """Run the command line in this process: its exit status, its output, its complaints."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["phasewatch", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as ending:
            status = ending.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


def start(*arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "phasewatch.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
        preexec_fn=interruptible,
    )


def measured(folder: Path) -> int:
    log = folder / "log.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


def one_sentence(err: str) -> str:
    """The one line on standard error."""
    (line,) = err.splitlines()
    assert line.startswith("phasewatch: ")
    assert line.endswith(".")
    return line


# Help and usage


def test_help_lists_the_commands(phasewatch):
    status, out, err = phasewatch("--help")
    assert (status, err) == (0, "")
    assert {"demo", "replay", "transitions", "report"} <= set(re.findall(r"\w+", out))


@pytest.mark.parametrize("command", ["demo", "replay", "work", "transitions", "report"])
def test_each_command_has_help(phasewatch, command):
    status, out, err = phasewatch(command, "--help")
    assert (status, err) == (0, "")
    assert "Usage: " in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["translate"],
        ["transitions"],
        ["transitions", PUBLISHED[0], "--colour"],
        ["replay", "checkpoints", "--probe", "my_probe.py:probe", "--workers", "0"],
        ["replay", "checkpoints", "--probe", "my_probe.py:probe", "--workers", "two"],
        ["replay", "checkpoints", "--probe", "my_probe.py:probe", "--sampler", "sgld"],
        ["demo", "--steps", "3"],
        ["demo", "--seed", "-1"],
    ],
)
def test_what_was_typed_wrong_has_status_2(phasewatch, folder, arguments):
    status, out, err = phasewatch(*arguments)
    assert status == 2
    assert out == ""
    assert "Usage: " in err
    assert {entry.name for entry in folder.iterdir()} == {"my_probe.py", "checkpoints"}


def test_a_replay_without_a_probe_says_that_it_needs_one(phasewatch):
    status, out, err = phasewatch("replay", "checkpoints")
    assert (status, out) == (2, "")
    assert "needs --probe FILE.py:NAME" in err


# transitions


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_transitions_as_json_are_those_of_the_library(phasewatch, file):
    status, out, err = phasewatch("transitions", file, "--json")
    assert (status, err) == (0, "")
    found = find_transitions(Trajectory.read(file))
    records = json.loads(out, parse_constant=pytest.fail)
    assert records == [transition.as_json() for transition in found]
    for record in records:
        assert record["signal"] == "llc"
        for boundary in ("start", "end"):
            low, high = record[f"{boundary}_interval"]
            assert low <= record[boundary] <= high
    assert [transition.kind.name for transition in found].count("B") >= 1


def test_transitions_in_words(phasewatch):
    status, out, err = phasewatch("transitions", PUBLISHED[0])
    assert (status, err) == (0, "")
    for transition in find_transitions(Trajectory.read(PUBLISHED[0])):
        assert " ".join(transition.sentence().split()[:6]) in " ".join(out.split())
    assert "190 points." in out


def test_transitions_of_a_run_folder(phasewatch, tmp_path):
    Trajectory.read(PUBLISHED[0]).write(tmp_path / "points.jsonl")
    _, expected, _ = phasewatch("transitions", PUBLISHED[0], "--json")
    for path in (tmp_path, tmp_path / "points.jsonl"):
        assert phasewatch("transitions", path, "--json") == (0, expected, "")


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG\r\n"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_picture(phasewatch, tmp_path, suffix, start):
    picture = tmp_path / f"x.{suffix}"
    status, out, err = phasewatch("transitions", PUBLISHED[0], "--json", "--plot", picture)
    assert (status, err) == (0, "")
    assert json.loads(out)
    assert picture.read_bytes().startswith(start)
    assert picture.stat().st_size > 10_000


def test_a_trajectory_without_transitions(phasewatch, tmp_path):
    flat = tmp_path / "flat.csv"
    flat.write_text("step,loss,llc\n" + "".join(f"{step},2.0,3.0\n" for step in range(5)))
    assert phasewatch("transitions", flat, "--json", "--plot", tmp_path / "flat.png") == (0, "[]\n", "")
    assert (tmp_path / "flat.png").exists()
    status, out, _ = phasewatch("transitions", flat)
    assert status == 0
    assert "No transition so far." in out
    assert "5 points." in out


SCORED = "".join(f"{2**i},{math.tanh(i - 9):.6f}\n" for i in range(18))


def test_transitions_of_a_metric(phasewatch, tmp_path):
    trajectory = Trajectory.read(PUBLISHED[1])
    scored = [replace(p, metrics={"score": math.atan(math.log10(p.step + 1) - 4)}) for p in trajectory]
    Trajectory(scored).write(tmp_path / "run.csv")
    for name in ("score", "loss"):
        status, out, err = phasewatch("transitions", tmp_path / "run.csv", "--signal", name, "--json")
        assert (status, err) == (0, "")
        records = json.loads(out)
        assert records == [t.as_json() for t in find_transitions(Trajectory(scored), signal=name)]
        assert {record["signal"] for record in records} == {name}
    status, out, err = phasewatch(
        "transitions", tmp_path / "run.csv", "--signal", "score", "--plot", tmp_path / "x.png"
    )
    assert (status, err) == (0, "")
    assert re.search(r"^kind +steps, 95 % intervals +score +loss +llc", out)
    assert re.search(r"goes with score|Alone: .*score", " ".join(out.split()))
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["score.csv", "score.jsonl"])
def test_transitions_of_a_metric_alone(phasewatch, tmp_path, name):
    rows = [row.split(",") for row in SCORED.splitlines()]
    lines = "".join(f'{{"step": {step}, "score": {score}}}\n' for step, score in rows)
    (tmp_path / name).write_text(f"step,score\n{SCORED}" if name.endswith("csv") else lines)
    picture = tmp_path / "x.svg"
    arguments = ("transitions", tmp_path / name, "--signal", "score")
    status, out, err = phasewatch(*arguments, "--plot", picture)
    assert (status, err) == (0, "")
    assert "18 points." in out
    assert "nan" not in out
    assert picture.exists()
    (record,) = json.loads(phasewatch(*arguments, "--json")[1], parse_constant=pytest.fail)
    assert (record["signal"], record["changes"]["score"]["trend"]) == ("score", "up")


def test_points_left_out_are_counted(phasewatch, tmp_path):
    lines = PUBLISHED[0].read_text().splitlines()
    for at in (20, 60, 100):
        step, loss, *rest = lines[at].split(",")
        lines[at] = ",".join([step, "" if at == 60 else loss, *("nan" if at < 100 else "" for _ in rest)])
    (tmp_path / "holes.csv").write_text("\n".join(lines))
    status, out, _ = phasewatch("transitions", tmp_path / "holes.csv")
    assert status == 0
    assert "190 points, 3 left out without λ̂ or loss." in out


@pytest.mark.parametrize("plot", [False, True])
def test_transitions_need_no_torch_and_little_time(tmp_path, plot):
    code = (
        "import atexit, sys, time; from phasewatch.cli import main; atexit.register(lambda: print("
        "{'torch', 'wandb', 'transformer_lens', 'devinterp', 'safetensors', 'scipy.interpolate'} & set(sys.modules), "
        "time.process_time())); main()"
    )
    picture = tmp_path / "x.png"
    arguments = ["--plot", picture] if plot else []
    done = subprocess.run(
        [sys.executable, "-c", code, "transitions", PUBLISHED[0], *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    heavy, seconds = done.stdout.splitlines()[-1].rsplit(maxsplit=1)
    assert heavy == "set()"
    assert float(seconds) < (6 if plot else 3)
    assert picture.exists() == plot


def test_a_terminal_that_shows_no_arrows():
    ascii_only = start("transitions", PUBLISHED[0], PYTHONIOENCODING="ascii")
    out, err = ascii_only.communicate(timeout=60)
    assert (ascii_only.returncode, err) == (0, "")
    assert "984 ? 35 290" in out


FOUR = "".join(f"{step},2,{step}\n" for step in range(1, 5))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.csv", None, r"missing\.csv is not there; check the path"),
        (
            "points.json",
            "{}",
            r"points\.json has no log_history; give the trainer_state\.json of a Trainer, a list of rows, a \.jsonl",
        ),
        ("empty.csv", "", r"has no points"),
        ("empty.jsonl", "", r"empty\.jsonl has no points, and transitions take at least 5; measure more"),
        ("lacks.csv", "step,loss\n1,2\n", r"has no column 'llc', and needs one; its columns are step, loss"),
        ("words.csv", "step,loss,llc\n1,two,3\n", r"Line 2 of .*, column 'loss', holds 'two', not a number"),
        ("infinite.csv", "step,loss,llc\n1,2,inf\n", r"infinite\.csv has a finite λ̂ and loss at 0 of 1 points"),
        ("negative.csv", "step,loss,llc\n-1,2,3\n", r"column 'step', holds '-1'; a training step is a whole number"),
        ("half.csv", "step,loss,llc\n0.5,2,3\n", r"column 'step', holds '0\.5'; a training step is a whole number"),
        ("twice.csv", "step,loss,llc\n1,2,3\n1,2,4\n", r"two different points at step 1, with λ̂ 3 and 4; pass"),
        ("four.csv", f"step,loss,llc\n{FOUR}5,,1\n4,2,4\n", r"has a finite λ̂ and loss at 4 of 5 points, and"),
        ("bytes.csv", b"\xff\xfe\x00\x01", r"can't be read as comma-separated text in UTF-8"),
        ("bytes.jsonl", b"\xff\xfe\x00\n", r"Line 1 of .*bytes\.jsonl is not text in UTF-8; mend or delete it"),
        ("list.jsonl", "[1]\n", r"Line 1 of .*list\.jsonl is not an object of named values; correct it or delete it"),
        (
            "broken.jsonl",
            "not json\n{}\n",
            r"Line 1 of .* is not JSON .*; mend or delete it",
        ),
        ("other.jsonl", "{}\n", r"other\.jsonl has no column 'step', and needs one"),
        ("folder", Path, r"folder is a folder without points\.jsonl, event files, .*; give"),
    ],
)
def test_trajectories_that_cannot_be_read(phasewatch, tmp_path, name, content, says):
    file = tmp_path / name
    if content is Path:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = phasewatch("transitions", file)
    assert (status, out) == (2, "")
    assert re.search(says, one_sentence(err))


@pytest.mark.parametrize("name", ["accuracy", "step", "llc_chain0", ""])
def test_a_signal_that_is_not_there(phasewatch, tmp_path, name):
    Trajectory.read(PUBLISHED[0]).write(tmp_path / "points.jsonl")
    for file in (PUBLISHED[0], tmp_path):
        status, out, err = phasewatch("transitions", file, "--signal", name)
        assert (status, out) == (2, "")
        assert one_sentence(err).endswith(f" has no signal '{name}'; it has loss, llc.")


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        ("nowhere/x.png", r"can't be written \("),
        ("folder.png", r"can't be written \(.*Is a directory"),
        ("x.word", r"can't be written: its name has to end in \.png, \.svg or \.pdf"),
        ("x", r"can't be written: its name has to end in"),
    ],
)
def test_a_picture_that_cannot_be_written(phasewatch, tmp_path, picture, says):
    (tmp_path / "folder.png").mkdir()
    status, out, err = phasewatch("transitions", PUBLISHED[0], "--plot", tmp_path / picture)
    assert (status, out) == (2, "")
    assert re.match(rf"phasewatch: --plot .*{picture} {says}", one_sentence(err))


def test_a_picture_as_wide_as_asked(phasewatch, tmp_path):
    picture = tmp_path / "x.svg"
    for width, inches in (((), 3.4), (("--width", "6.8"), 6.8)):
        assert phasewatch("transitions", PUBLISHED[0], "--json", "--plot", picture, *width)[0] == 0
        points = re.search(r'width="([\d.]+)pt"', picture.read_text())
        assert points is not None
        assert float(points[1]) == pytest.approx(72 * inches)


# replay


def test_replay_keeps_its_points_and_measures_none_twice(phasewatch, folder):
    command = ["replay", "checkpoints", "--probe", "my_probe.py:probe"]
    status, out, err = phasewatch(*command)
    assert status == 0
    assert err == "5 checkpoints of checkpoints, measured into checkpoints-replay/\n"
    assert "5 points" in out
    run = folder / "checkpoints-replay"
    assert {"run.json", "points.jsonl", "transitions.json", "report.html"} <= {f.name for f in run.iterdir()}
    points = (run / "points.jsonl").read_bytes()
    assert tuple(Trajectory.read(run / "points.jsonl").steps) == STEPS
    assert measured(folder) == 5

    again = phasewatch(*command)
    assert again == (status, out, err)
    assert measured(folder) == 5
    assert (run / "points.jsonl").read_bytes() == points

    torch.save(state_dict(6), folder / "checkpoints" / "step6.pt")
    assert phasewatch(*command)[0] == 0
    assert measured(folder) == 6
    assert 6 in Trajectory.read(run / "points.jsonl").steps


def test_replay_with_a_budget_measures_so_many_and_says_how_well_boundaries_are_known(phasewatch, folder):
    command = ["replay", "checkpoints", "--probe", "my_probe.py:probe", "--run", "few"]
    status, _, err = phasewatch(*command, "--budget", 3, "--within", 1.2)
    assert status == 0, err
    assert "phasewatch: 3 of 5 snapshots are measured." in err
    measured = Trajectory.read(folder / "few" / "points.jsonl").steps.tolist()
    assert len(measured) == 3
    assert (measured[0], measured[-1]) == (STEPS[0], STEPS[-1])
    status, _, err = phasewatch(*command, "--budget", 4)
    assert status == 0, err
    assert "phasewatch: 4 of 5 snapshots are measured." in err
    status, _, err = phasewatch(*command, "--within", 1)
    assert status == 2
    assert "replay(within=1.0) must be a finite number above 1, such as 1.2 for a fifth." in err


def test_replay_with_a_setting_of_its_own(phasewatch, folder, monkeypatch):
    found = SGLD(2e-3, 1.0, 10.0, chains=2, draws=8, burn_in=2, batch_size=16)
    asked = []
    monkeypatch.setattr(automatic, "calibrate", lambda snapshots, probe, show: asked.append(len(snapshots)) or found)
    command = ["replay", "checkpoints", "--probe", "my_probe.py:probe", "--sampler", "calibrate"]
    status, _, err = phasewatch(*command)
    assert status == 0
    assert f"calibrated on steps 1, 300, 50000: {found}; checkpoints-replay/calibration.txt says why" in err
    kept = json.loads((folder / "checkpoints-replay" / "run.json").read_text())
    assert kept["settings"]["sampler"] == found.as_json()
    for again in (command, command[:-2]):
        status, _, err = phasewatch(*again)
        assert status == 0
        assert "measuring with the setting that checkpoints-replay was calibrated to" in err
    assert asked == [3]


def test_a_function_that_returns_the_probe_measures_the_same(phasewatch, folder):
    for name in ("probe", "make_probe"):
        assert phasewatch("replay", "checkpoints", "--probe", f"my_probe.py:{name}", "--run", f"runs/{name}")[0] == 0
    first, second = ((folder / "runs" / name / "points.jsonl").read_bytes() for name in ("probe", "make_probe"))
    assert first == second


def test_workers_measure_the_same(phasewatch, folder):
    for workers in (1, 2):
        status, _, _ = phasewatch(
            "replay", "checkpoints", "--probe", "my_probe.py:probe", "--run", f"w{workers}", "--workers", workers
        )
        assert status == 0
    one, two = (Trajectory.read(folder / f"w{workers}" / "points.jsonl") for workers in (1, 2))
    assert one.points == two.points
    assert measured(folder) == 10


def test_workers_that_one_starts_oneself_share_a_replay(phasewatch, folder):
    command = ["replay", "checkpoints", "--probe", "my_probe.py:probe"]
    assert phasewatch(*command, "--run", "alone")[0] == 0
    with start(*command, "--run", "run", "--on", "external") as replay:
        wait_for(lambda: (folder / "run/work/tasks.jsonl").exists(), 60)
        status, out, _ = phasewatch("work", "run", "checkpoints", "--probe", "my_probe.py:probe")
        _, err = replay.communicate(timeout=100)
    assert (status, out) == (0, "5 checkpoints measured here; the replay collects them in run/points.jsonl.\n")
    assert replay.returncode == 0, err
    assert "workers are started by: phasewatch work run SERIES --probe FILE.py:NAME" in err
    points = [Trajectory.read(folder / run / "points.jsonl") for run in ("run", "alone")]
    assert points[0].steps.tolist() == points[1].steps.tolist()
    assert [p.llc for p in points[0]] == [p.llc for p in points[1]]
    status, out, _ = phasewatch("replay", "--status", "run")
    assert (status, out) == (0, "run: 5 checkpoints measured, 0 to go\n")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--on", "pbs"], r"replay\(on='pbs'\) must be one of 'local', 'external', 'slurm', 'ray', 'ray://HOST:PORT'"),
        (["--slurm", "partition=gpu"], "--slurm partition=gpu goes with --on slurm; --on local was given"),
        (["--on", "slurm", "--ray", "num_gpus=1"], "--ray num_gpus=1 goes with --on ray://HOST:PORT; --on slurm"),
        (["--on", "slurm", "--slurm", "gpu"], "--slurm gpu must be NAME=VALUE"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(phasewatch, folder, options, match):
    status, _, err = phasewatch("replay", "checkpoints", "--probe", "my_probe.py:probe", *options)
    assert status == 2
    assert re.search(match, err), err
    assert not (folder / "checkpoints-replay").exists()


def test_a_worker_takes_no_code_from_a_run(phasewatch, folder):
    status, _, err = phasewatch("work", "run")
    assert status == 2
    assert "phasewatch work run needs --probe FILE.py:NAME, the one of the replay: code is never taken" in err


def test_a_replay_of_a_replay_lies_beside_it(phasewatch, folder, monkeypatch):
    assert phasewatch("replay", "checkpoints", "--probe", "my_probe.py:probe")[0] == 0
    monkeypatch.chdir(folder / "checkpoints")
    status, _, err = phasewatch("replay", ".", "--probe", "../my_probe.py:probe")
    assert status == 0
    assert "checkpoints-replay/" in err
    assert measured(folder) == 5


def test_series_of_one_name_do_not_share_a_run(phasewatch, folder):
    for parent in ("a", "b"):
        (folder / parent / "checkpoints").mkdir(parents=True)
        torch.save(state_dict(1 if parent == "a" else 2), folder / parent / "checkpoints" / "step7.pt")
        assert phasewatch("replay", f"{parent}/checkpoints", "--probe", "my_probe.py:probe")[0] == 0
    a, b = (Trajectory.read(folder / p / "checkpoints-replay" / "points.jsonl") for p in ("a", "b"))
    assert a[0].loss != b[0].loss


def bad_checkpoint(kind: str, path: Path) -> None:
    if kind == "truncated":
        torch.save(state_dict(1), path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "a bare pickle":
        path.write_bytes(pickle.dumps(Path))
    elif kind == "a whole model":
        torch.save(nn.Linear(3, 1), path)
    elif kind == "other shapes":
        torch.save(nn.Linear(4, 1).state_dict(), path)
    elif kind == "other names":
        torch.save({"head.w": torch.zeros(3)}, path)
    elif kind == "no tensors":
        torch.save({"weight": "lost"}, path)
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_checkpoints_cost_their_own_points_alone(phasewatch, folder, workers):
    kinds = ["truncated", "a bare pickle", "a whole model", "other shapes", "other names", "no tensors", "empty"]
    for step, kind in enumerate(kinds, start=100):
        bad_checkpoint(kind, folder / "checkpoints" / f"step{step}.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the names that the model doesn't have
        status, out, err = phasewatch(
            "replay", "checkpoints", "--probe", "my_probe.py:probe", "--run", "run", "--workers", workers
        )
    assert status == 2
    assert tuple(Trajectory.read(folder / "run" / "points.jsonl").steps) == STEPS
    assert "5 points" in out
    assert (folder / "run" / "report.html").exists()
    sentences = err.splitlines()[1:]
    assert all(sentence.startswith("phasewatch: ") for sentence in sentences)
    left_out = [re.match(r"phasewatch: Step (\d+) is left out: .+\.$", sentence) for sentence in sentences]
    assert sorted(int(found[1]) for found in left_out if found) == list(range(100, 107))
    assert "step102.pt holds a pickled " in err
    assert "weight has shape (1, 4) where the probe's model has (1, 3)" in err


def test_weights_that_are_not_finite_are_a_point_with_a_verdict(phasewatch, folder):
    torch.save({"weight": torch.full((1, 3), torch.nan), "bias": torch.zeros(1)}, folder / "checkpoints/step100.pt")
    status, out, err = phasewatch("replay", "checkpoints", "--probe", "my_probe.py:probe")
    assert status == 0
    assert "1 left out without λ̂ or loss" in " ".join(out.split())
    assert len(err.splitlines()) == 1
    points = {p.step: p for p in Trajectory.read(folder / "checkpoints-replay" / "points.jsonl")}
    assert points[100].llc.health is Health.DIVERGED
    assert sum(p.llc.health is not Health.DIVERGED for p in points.values()) == 5


def test_nothing_but_bad_checkpoints(phasewatch, folder):
    for step in STEPS:
        bad_checkpoint("truncated", folder / "checkpoints" / f"step{step}.pt")
    status, out, err = phasewatch("replay", "checkpoints", "--probe", "my_probe.py:probe")
    assert (status, out) == (2, "")
    sentences = err.splitlines()[1:]
    assert len(sentences) == 6
    assert all(sentence.startswith("phasewatch: ") for sentence in sentences)
    assert sentences[-1] == "phasewatch: None of the 5 checkpoints could be measured; the messages above say why."


def test_a_warning_is_a_sentence_too(phasewatch, folder):
    torch.save(state_dict(9) | {"extra": torch.zeros(2)}, folder / "checkpoints" / "step9.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = phasewatch("replay", "checkpoints", "--probe", "my_probe.py:probe")
    assert status == 0
    assert "phasewatch: extra of the snapshots is not in the probe's model and is left out." in err.splitlines()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("my_probe.py", r"--probe my_probe\.py must be FILE\.py:NAME, .*the colon and the name are missing"),
        ("my_probe.py:", r"the colon and the name are missing"),
        (":probe", r"the colon and the name are missing"),
        ("nowhere.py:probe", r"--probe nowhere\.py:probe must be FILE\.py:NAME, .*there is no such file"),
        ("checkpoints:probe", r"there is no such file"),
        ("my_probe.py:prob", r"my_probe\.py has no prob\."),
        ("my_probe.py:number", r"must be a Probe or a function that returns one; a int came\."),
        ("my_probe.py:returns_a_model", r"must be a Probe or a function that returns one; a Linear came\."),
        ("my_probe.py:fails", r"--probe my_probe\.py:fails: fails\(\) failed with RuntimeError: no such data"),
        ("my_probe.py:wants_an_argument", r"wants_an_argument\(\) failed with TypeError: .*missing 1 required"),
        ("my_probe.py:Probe", r"Probe\(\) failed with TypeError"),
        ("broken.py:probe", r"importing broken\.py failed with SyntaxError"),
        ("leaves.py:probe", r"importing leaves\.py failed with ModuleNotFoundError: No module named 'nowhere'"),
        ("quits.py:probe", r"importing quits\.py called sys\.exit\(0\)"),
        ("json.py:probe", r"json is also the name of another module .*Rename the file\."),
        ("sys.py:probe", r"sys is also the name of another module \(built into Python\)"),
    ],
)
def test_bad_probes(phasewatch, folder, spec, says):
    (folder / "broken.py").write_text("probe = (")
    (folder / "leaves.py").write_text("import nowhere")
    (folder / "quits.py").write_text("import sys; sys.exit(0)")
    for name in ("json.py", "sys.py"):
        (folder / name).write_text(PROBE)
    status, out, err = phasewatch("replay", "checkpoints", "--probe", spec)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert re.match(f"phasewatch: .*{says}", line)
    assert not (folder / "checkpoints-replay").exists()


def test_a_probe_file_need_not_be_named_like_a_variable(phasewatch, folder):
    (folder / "my_probe.py").rename(folder / "my-probe.py")
    assert phasewatch("replay", "checkpoints", "--probe", "my-probe.py:probe")[0] == 0


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no folder", r"open_series\('nowhere'\): there is no such folder"),
        ("a file", r"this is a file"),
        ("empty", r"found nothing; give the folder that holds the checkpoints"),
        ("no checkpoints", r"found notes\.txt; give the folder"),
        ("one step twice", r"model_300\.pt and step300\.pt are both of step 300"),
        ("run is a file", r"run='taken' can't be written to"),
        ("run below a file", r"run='taken/run' can't be written to"),
        ("run of another", r"run='run' was measured with other settings: sampler\.draws was 8 and is 9"),
    ],
)
def test_folders_that_cannot_be_used(phasewatch, folder, case, says):
    series, run, spec = "checkpoints", "run", "my_probe.py:probe"
    if case == "no folder":
        series = "nowhere"
    elif case == "a file":
        series = "my_probe.py"
    elif case in {"empty", "no checkpoints"}:
        series = "other"
        (folder / "other").mkdir()
        if case == "no checkpoints":
            (folder / "other" / "notes.txt").write_text("nothing here")
    elif case == "one step twice":
        torch.save(state_dict(301), folder / "checkpoints" / "model_300.pt")
    elif case.startswith("run is") or case.startswith("run below"):
        (folder / "taken").write_text("")
        run = "taken" if case == "run is a file" else "taken/run"
    else:
        assert phasewatch("replay", series, "--probe", spec, "--run", run)[0] == 0
        (folder / "leaves.py").write_text(PROBE.replace("draws=8", "draws=9"))
        spec = "leaves.py:probe"
    before = measured(folder)
    status, out, err = phasewatch("replay", series, "--probe", spec, "--run", run)
    assert (status, out) == (2, "")
    *announced, line = err.splitlines()
    assert all(re.fullmatch(r"5 checkpoints of checkpoints, measured into \S+/", other) for other in announced)
    assert re.match(rf"phasewatch: .*{says}", line)
    assert measured(folder) == before


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupt_stops_at_once_and_the_same_command_goes_on(phasewatch, folder, workers):
    command = ["replay", "checkpoints", "--probe", "my_probe.py:probe", "--run", "run", "--workers", workers]
    process = start(*command, PHASEWATCH_TEST_NAP="20")
    points = folder / "run" / "points.jsonl"
    deadline = time.monotonic() + 60
    while not (points.exists() and points.read_bytes().count(b"\n")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - interrupted < 10  # not even the checkpoint at hand is finished
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    kept = points.read_bytes().count(b"\n")
    assert 1 <= kept < 5
    assert err.splitlines()[-1] == (
        f"phasewatch: stopped. {kept} of 5 checkpoints are measured and kept in run/points.jsonl; "
        "the same command goes on from there."
    )
    before = points.read_bytes()
    log = measured(folder)
    assert phasewatch("replay", "checkpoints", "--probe", "my_probe.py:probe", "--run", "run")[0] == 0
    assert measured(folder) == log + 5 - kept
    assert points.read_bytes().startswith(before)
    assert tuple(Trajectory.read(points).steps) == STEPS


# calibrate


def test_calibrate_prints_the_choice_and_why_and_draws_it(phasewatch, folder):
    arguments = ("calibrate", "checkpoints", "--probe", "my_probe.py:probe", "--budget", 6000)
    status, out, err = phasewatch(*arguments, "--plot", "why.png")
    assert status == 0
    assert err == "Trying settings at steps 1, 300, 50000 of checkpoints.\n"
    assert "step 1 " in out.splitlines()[0]
    assert "step 50 000" in out.splitlines()[0]
    assert re.search(r"All of this took \d[ \d]* of 6 000 gradient evaluations\.", out)
    assert re.fullmatch(r"SGLD\(step_size=.*batch_size=None\)", out.splitlines()[-1])
    assert (folder / "why.png").read_bytes().startswith(b"\x89PNG")
    assert measured(folder) == 0
    assert phasewatch(*arguments)[1] == out


def test_calibrate_takes_steps(phasewatch, folder):
    chosen = ("--step", 50000, "--step", 4000, "--budget", 6000)
    status, out, err = phasewatch("calibrate", "checkpoints", "--probe", "my_probe.py:probe", *chosen, "--error", 0.2)
    assert status == 0
    assert "Trying settings at steps 50000, 4000" in err
    assert "step 4 000" in out.splitlines()[0]
    assert "step 1 " not in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", 50], r"calibrate\(budget=50\) is too small"),
        (["--step", 7], r"has no step 7: .* the nearest is 1"),
        (["--budget", 6000, "--plot", "nowhere/why.png"], r"--plot nowhere/why\.png can't be written"),
    ],
)
def test_calibrations_that_cannot_be_made(phasewatch, folder, arguments, says):
    status, _, err = phasewatch("calibrate", "checkpoints", "--probe", "my_probe.py:probe", *arguments)
    assert status == 2
    assert re.search(says, err.splitlines()[-1])


def test_calibrate_says_where_nothing_works_and_shows_what_was_tried(phasewatch, folder):
    torch.save({"weight": torch.full((1, 3), 1000.0), "bias": torch.zeros(1)}, "checkpoints/step60000.pt")
    status, out, err = phasewatch("calibrate", "checkpoints", "--probe", "my_probe.py:probe", "--plot", "why.png")
    assert status == 2
    assert re.search(r"no setting whose estimate at step 60 000 can be used.* What may help", err.splitlines()[-1])
    assert "negative" in out
    assert (folder / "why.png").exists()


# report


def test_report(phasewatch, folder):
    assert phasewatch("replay", "checkpoints", "--probe", "my_probe.py:probe", "--run", "run")[0] == 0
    status, out, err = phasewatch("report", "run")
    assert (status, err) == (0, "")
    assert "The report: run/report.html" in out
    assert "5 points" in out
    assert phasewatch("report", "run", "--out", "page.html")[0] == 0
    page = (folder / "page.html").read_text()
    assert page.startswith("<!")
    assert "50000" in re.sub(r"\s", "", page)


def test_report_of_a_run_that_has_measured_nothing_yet(phasewatch, tmp_path):
    (tmp_path / "run.json").write_text('{"schema": 1, "probe": {}}')
    status, out, err = phasewatch("report", tmp_path)
    assert (status, err) == (0, "")
    assert "report.html" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], r"found neither run\.json nor points\.jsonl"),
        (["run", "--out", "nowhere/page.html"], r"names a folder that does not exist"),
        (["run", "--out", "checkpoints"], r"checkpoints: Is a directory"),
        (["damaged"], r"run\.json is not JSON"),
    ],
)
def test_reports_that_cannot_be_written(phasewatch, folder, arguments, says):
    for name, content in (("run", '{"schema": 1, "probe": {}}'), ("damaged", "{")):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(content)
    status, out, err = phasewatch("report", *arguments)
    assert (status, out) == (2, "")
    assert re.search(says, one_sentence(err))


# demo


def test_demo_never_writes_into_a_folder_that_exists(phasewatch, tmp_path, monkeypatch):
    from phasewatch import demo

    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda run, **settings: asked.append((run, settings)))
    for expected in ("run", "run-2", "run-3"):
        status, out, _ = phasewatch("demo", "--run", tmp_path / "run", "--steps", 200, "--seed", 3, "--no-wandb")
        assert status == 0
        assert asked.pop() == (tmp_path / expected, {"seed": 3, "steps": 200, "wandb": False})
        assert str(tmp_path / expected / "report.html") in out
        (tmp_path / expected).mkdir()
