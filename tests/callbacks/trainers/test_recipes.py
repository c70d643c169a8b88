"""The manual's lines for torchtitan, on a stand-in with the attributes of its trainer that they use."""

import re
from pathlib import Path

import torch
from tiny_run import loss, make_data, make_model, make_probe
from torch.optim import optimizer as torch_optimizer

import phasewatch as pw

PAGE = (Path(__file__).parents[3] / "docs/trainers.md").read_text(encoding="utf-8")


class TitanTrainer:
    """It counts the step before it takes it, and steps every optimizer once in it."""

    def __init__(self):
        self.step = 0
        self.model_parts = [make_model()]
        self.optimizers = torch.optim.SGD(self.model_parts[0].parameters(), lr=0.05)

    def train(self, steps):
        while self.step < steps:
            self.step += 1
            self.optimizers.zero_grad()
            loss(self.model_parts[0], make_data()).backward()
            self.optimizers.step()


def test_the_lines_for_torchtitan(tmp_path, monkeypatch):
    (lines,) = re.findall(r'```python title="titan.py"\n(.*?)```', PAGE, re.DOTALL)
    body = [line for line in lines.split("def watch")[1].splitlines()[1:] if line.strip()]
    assert len(body) <= 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        torch_optimizer, "_global_optimizer_post_hooks", type(torch_optimizer._global_optimizer_post_hooks)()
    )
    names = {"pw": pw}
    exec(lines, names)
    plain, watched = TitanTrainer(), TitanTrainer()
    plain.train(6)
    monitor = names["watch"](watched, make_probe())
    watched.train(6)
    monitor.close()
    assert monitor.trajectory.steps.tolist() == [2, 4, 6]
    assert all(map(torch.equal, plain.model_parts[0].parameters(), watched.model_parts[0].parameters()))
