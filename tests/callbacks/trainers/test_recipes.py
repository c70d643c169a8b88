"""The manual's lines for torchtitan, on a stand-in of the shape of its trainer: FSDP2, and distributed checkpoints."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_run import loss, make_data, make_model, make_probe
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

import phasewatch as pw

PAGE = (Path(__file__).parents[3] / "docs/trainers.md").read_text(encoding="utf-8")


class OptimizersContainer(Optimizer):
    """As torchtitan's: an optimizer itself, whose step is that of one for each part of the model."""

    def __init__(self, model_parts):
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=0.05) for part in model_parts]
        super().__init__([p for part in model_parts for p in part.parameters()], {"lr": 0.05})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class TitanTrainer:
    """It counts the step before it takes it, and saves the sharded model after every second one."""

    def __init__(self, checkpoints):
        self.step, self.checkpoints = 0, checkpoints
        self.model_parts = [fully_shard(make_model(), mesh=init_device_mesh("cpu", (1,)))]
        self.optimizers = OptimizersContainer(self.model_parts)

    def train_step(self):
        self.optimizers.zero_grad()
        loss(self.model_parts[0], make_data()).backward()
        self.optimizers.step()

    def train(self, steps):
        while self.step < steps:
            self.step += 1
            self.train_step()
            if self.step % 2 == 0:
                dcp.save(
                    get_model_state_dict(self.model_parts[0]), checkpoint_id=self.checkpoints / f"step-{self.step}"
                )


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
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
    plain, watched = TitanTrainer(tmp_path / "plain"), TitanTrainer(tmp_path / "watched")
    plain.train(6)
    monitor = names["watch"](watched, make_probe(make_model))
    watched.train(6)
    monitor.close()
    assert monitor.trajectory.steps.tolist() == [2, 4, 6]
    for before, after in zip(plain.model_parts[0].parameters(), watched.model_parts[0].parameters(), strict=True):
        assert torch.equal(before.full_tensor(), after.full_tensor())
    replayed = pw.replay(pw.open_series(tmp_path / "watched"), make_probe(make_model))
    assert list(replayed) == list(monitor.trajectory)
