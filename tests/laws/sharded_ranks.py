"""One rank of a group that holds a model together, started by `test_sharded.py` with an order; it prints what it got."""

import datetime
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import phasewatch as pw

WORDS, WIDTH, LENGTH = 99, 10, 6
SETTING = {"step_size": 1e-4, "nbeta": 20.0, "localization": 50.0, "chains": 2, "draws": 8, "burn_in": 4}
SAMPLERS = {
    "sgld": pw.SGLD(**SETTING, batch_size=12),
    "langevin": pw.Langevin(**SETTING, batch_size=12),
    "momentum": pw.Langevin(**SETTING, batch_size=12, momentum=0.6),
    "kappa": pw.Langevin(**{**SETTING, "step_size": None}, kappa=0.3, batch_size=12),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 23), nn.Linear(23, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class TinyLM(nn.Module):
    """Its embedding is its output layer too, one of its parameters has fewer rows than there are ranks, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.1), requires_grad=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale + self.shift)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 11), nn.Linear(11, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.first(x).tanh()).tanh())


def language_loss(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


def pairwise_loss(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """Not the mean over samples, so that no process may take a part of the minibatch."""
    logits = model(words).mean(1)
    return (logits @ logits.T).square().mean() / 100 + language_loss(model, words)


def squared_error(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def words() -> torch.Tensor:
    return torch.randint(WORDS, (60, LENGTH), generator=torch.Generator().manual_seed(1))


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(2))
    return x, x[:, :3].sin()


def mesh(**dims: int):
    return init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))


def fsdp(model: nn.Module | None = None, over=None, **options) -> nn.Module:
    model, over = model or TinyLM(), over or mesh(dp=dist.get_world_size())
    for block in model.blocks:
        fully_shard(block, mesh=over, **options)
    return fully_shard(model, mesh=over, **options)


def hsdp() -> nn.Module:
    return fsdp(over=mesh(outer=2, inner=dist.get_world_size() // 2))


def half() -> nn.Module:
    return fsdp(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel() -> nn.Module:
    return parallelize_module(MLP(), mesh(tp=dist.get_world_size()), PLAN)


def both() -> nn.Module:
    over = mesh(dp=2, tp=dist.get_world_size() // 2)
    model = parallelize_module(MLP(), over["tp"], PLAN)
    return fully_shard(model, mesh=over["dp"])


KINDS = {
    "fsdp": (fsdp, language_loss, words, TinyLM),
    "hsdp": (hsdp, language_loss, words, TinyLM),
    "half": (half, language_loss, words, TinyLM),
    "pairwise": (fsdp, pairwise_loss, words, TinyLM),
    "tp": (tensor_parallel, squared_error, pairs, MLP),
    "both": (both, squared_error, pairs, MLP),
}
PARTS = {
    "fsdp": {"first": "blocks.0", "some": {"embedding.weight": torch.arange(WORDS * WIDTH).view(WORDS, WIDTH) % 3 > 0}},
    "tp": {"up": "up", "some": {"down.weight": torch.arange(33).view(3, 11) % 2 > 0}},
}


def snapshot(kind: str) -> pw.Snapshot:
    """Of other weights than those that the models are built with."""
    model = KINDS[kind][3]()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return pw.Snapshot.of(model, step=7)


def measured(kind: str, sampler: str, *, sharded: bool) -> dict:
    make, loss, data, plain = KINDS[kind]
    metrics = {"size": lambda model, batch: float(loss(model, batch)) * 2}
    probe = pw.Probe(
        make if sharded else plain, loss, data(), sampler=SAMPLERS[sampler], parts=PARTS.get(kind), metrics=metrics
    )
    if not sharded:
        probe.subject.loss.vectorised = False
    point = probe(snapshot(kind))
    estimates = {"llc": point.llc, **point.parts}
    found = {name: [one.value, one.error, one.health.name] for name, one in estimates.items()}
    again = probe(snapshot(kind))
    return {
        "loss": point.loss, "metric": point.metrics["size"], "path": probe.path, "estimates": found,
        "again": again == point, "settings": probe.settings,
    }  # fmt: skip


def start(store: str, rank: int, size: int, timeout: float) -> None:
    end = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=end)


def main() -> None:
    order, rank = json.loads(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    start(order["store"], rank, order["size"], order.get("timeout", 60))
    found = {}
    try:
        for kind, sampler in order.get("measure", []):
            found[f"{kind} {sampler}"] = measured(kind, sampler, sharded=True)
        if "misuse" in order:
            found["said"] = MISUSE[order["misuse"]](rank)
    except pw.PhasewatchError as error:
        found["said"] = str(error)
    print(json.dumps(found), flush=True)
    Path(f"{order['store']}-{rank}").touch()
    os._exit(0)


MISUSE = {}


if __name__ == "__main__":
    main()
