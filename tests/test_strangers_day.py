"""A fine-tune with Hugging Face's trainer, by the commands of the manual, to a report and an offline W&B run."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import environment

import phasewatch as pw

PAGE = (Path(__file__).parents[1] / "docs/trainers.md").read_text(encoding="utf-8")
EXTRAS = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")


def section():
    return PAGE.split("## Hugging Face", 1)[1].split("## Lightning", 1)[0]


def commands():
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```", section(), re.DOTALL | re.MULTILINE)
    return [line for info, block in fenced if not info for line in block.splitlines() if line]


def test_the_extras_of_its_first_command_are_there():
    (install, *_) = commands()
    (names,) = re.findall(r'pip install "phasewatch\[(.*?)\]"', install)
    assert all(re.search(rf"^{name} = \[", EXTRAS, re.MULTILINE) for name in names.split(","))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_its_commands_lead_from_nothing_to_a_report_and_a_run_of_wandb(tmp_path):
    title, script = re.search(r'^```python title="(.*?)".*?\n(.*?)^```', section(), re.DOTALL | re.MULTILINE).groups()
    (tmp_path / title).write_text(script, encoding="utf-8")
    began = time.monotonic()
    for line in commands()[1:]:
        words = shlex.split(line)
        settings = dict(word.split("=") for word in words if re.fullmatch(r"[A-Z_]+=\w+", word))
        program, *arguments = words[len(settings) :]
        command = {"python": [sys.executable], "phasewatch": [sys.executable, "-m", "phasewatch.cli"]}[program]
        environ = environment(**settings, WANDB_SILENT="true", WANDB_DIR=str(tmp_path))
        environ.pop("WANDB_API_KEY", None)
        done = subprocess.run([*command, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
    print(f"{time.monotonic() - began:.0f} s on {os.cpu_count()} cores")
    run = tmp_path / "runs/finetune/phasewatch"
    trajectory = pw.Trajectory.read(run / "points.jsonl")
    assert len(trajectory) >= 14
    assert trajectory.loss[-1] < 0.8 * trajectory.loss[0]
    assert "data:image/svg+xml" in (run / "report.html").read_text(encoding="utf-8")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
