"""What works where only the core is installed, and what names the extra that is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = """
import importlib.abc, sys
from phasewatch.monitor.errors import EXTRAS
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def run(code: str, *arguments, cwd) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


COMMAND = "from phasewatch.cli import main; main()"


def test_a_run_is_watched_and_replayed_and_names_the_extra_for_its_report(tmp_path):
    done = run(
        """
import torch, phasewatch as pw
model, x = torch.nn.Linear(3, 1), torch.randn(64, 3)
def loss(model, batch): return model(batch).square().mean()
sampler = pw.Langevin(step_size=1e-3, nbeta=10.0, chains=2, draws=8, burn_in=2, batch_size=16)
probe = pw.Probe(model, loss, x, sampler=sampler)
with pw.PhaseMonitor(model, probe, run="runs/first", at=pw.every(1)) as monitor:
    for step in range(1, 4):
        monitor(step)
print(len(list(pw.replay("runs/first", probe))), monitor.trajectory.steps.tolist())
""",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "3 [1, 2, 3]"
    assert "which isn't installed. Run: pip install 'phasewatch[report]'" in done.stderr
    assert (tmp_path / "runs/first/transitions.json").exists()


def test_a_hub_names_its_extra(tmp_path):
    done = run("import phasewatch as pw; pw.open_series('hf://org/name')", cwd=tmp_path)
    assert "open_series('hf://org/name') needs the package huggingface_hub, which isn't installed." in done.stderr
    assert "pip install 'phasewatch[hub]'" in done.stderr


def test_transitions_of_a_table_need_nothing_more(tmp_path):
    done = run(COMMAND, "transitions", ROOT / "tests/data/published/lr_seed1.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "type B transition" in done.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["demo"], r"phasewatch\[(toys|report)\]"),
        (["transitions", ROOT / "tests/data/published/lr_seed1.csv", "--plot", "picture.png"], r"phasewatch\[report\]"),
    ],
)
def test_a_command_that_needs_more_says_what(arguments, extra, tmp_path):
    done = run(COMMAND, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(rf"isn't installed\. Run: pip install '{extra}'", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_public_name_that_needs_more_says_what(tmp_path):
    code = "import phasewatch as pw\ntry: pw.write_report\nexcept pw.PhasewatchError as error: print(error)"
    assert "phasewatch.write_report needs the package" in run(code, cwd=tmp_path).stdout
