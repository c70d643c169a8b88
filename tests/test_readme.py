"""What the README shows works as it stands there."""

import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import phasewatch as pw

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_lines_that_attach_it_attach_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (attach,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "train_step" in block]
    lines = [line for line in attach.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 15
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(96, 3)
    y = (x[:, 0] > 0).long()

    def train_step(model, batch):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    data = {"x_train": x[:64], "y_train": y[:64], "x_val": x[64:], "y_val": y[64:]}
    exec(attach, {"F": F, "model": model, "train_step": train_step, "loader": [(x, y)] * 6, **data})
    assert Path("runs/first/report.html").exists()
    assert pw.Trajectory.read("runs/first/points.jsonl").steps.tolist() == [1, 2, 3, 4, 5, 6]
