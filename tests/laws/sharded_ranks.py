"""The ranks of groups that hold a model, which `test_sharded.py` orders: forks of one process that imports everything.

Each leaves what it found in its group's folder, as lines of JSON in `rank-0.out` and so on.
"""

import datetime
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import phasewatch as pw
from phasewatch.monitor.snapshots.folder import SnapshotFolder

WORDS, WIDTH, LENGTH = 99, 10, 6
SETTING = {"step_size": 4e-3, "nbeta": 20.0, "localization": 10.0, "chains": 2, "draws": 4, "burn_in": 2}
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
    """Its embedding is its output layer too, a parameter has fewer rows than there are ranks, and one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.1), requires_grad=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale + self.shift)


class Recurrent(TinyLM):
    """Calls its first block twice."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[1](self.blocks[0](self.blocks[0](self.embedding(words)))) * self.scale)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.first(x).tanh()).tanh())


def language_loss(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


def pairwise_loss(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """Not the mean over samples, so that no process may take a part of the minibatch."""
    logits = model(words).mean(1)
    return (logits @ logits.T).square().mean() / 10 + language_loss(model, words)


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


def double() -> nn.Module:
    return fsdp(TinyLM().double())


def recurrent() -> nn.Module:
    return fsdp(Recurrent().double())


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel() -> nn.Module:
    """Its plain parameters are other ones on each rank, until a snapshot is loaded."""
    model = parallelize_module(MLP(), mesh(tp=dist.get_world_size()), PLAN)
    nn.init.normal_(model.first.weight, generator=torch.Generator().manual_seed(dist.get_rank()))
    return model


def both() -> nn.Module:
    over = mesh(dp=2, tp=dist.get_world_size() // 2)
    model = parallelize_module(MLP(), over["tp"], PLAN)
    return fully_shard(model, mesh=over["dp"])


KINDS = {
    "fsdp": (fsdp, language_loss, words, TinyLM),
    "hsdp": (hsdp, language_loss, words, TinyLM),
    "double": (double, language_loss, words, lambda: TinyLM().double()),
    "recurrent": (recurrent, language_loss, words, lambda: Recurrent().double()),
    "pairwise": (fsdp, pairwise_loss, words, TinyLM),
    "tp": (tensor_parallel, squared_error, pairs, MLP),
    "both": (both, squared_error, pairs, MLP),
}
PARTS = {
    "double": {
        "first": "blocks.0",
        "some": {"embedding.weight": torch.arange(WORDS * WIDTH).view(WORDS, WIDTH) % 3 > 0},
    },
    "tp": {"up": "up", "some": {"down.weight": torch.arange(36).view(3, 12) % 2 > 0}},
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
    again = probe(snapshot(kind)) if kind == "fsdp" else point
    return {
        "loss": point.loss, "metric": point.metrics["size"], "path": probe.path, "estimates": found,
        "again": again == point, "settings": probe.settings,
    }  # fmt: skip


def said(action) -> str:
    try:
        action()
    except pw.PhasewatchError as error:
        return str(error)
    return "nothing"


def probe_of(make=fsdp, loss=language_loss, seed: int = 0, **arguments) -> pw.Probe:
    return pw.Probe(make, loss, words(), sampler=SAMPLERS["sgld"], seed=seed, **arguments)


def doubled_gradient(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    value = language_loss(model, batch)
    return 2 * value - value.detach()


def misuse(rank: int) -> dict[str, str]:
    mine, probe = fsdp(), probe_of()
    right = snapshot("fsdp")
    narrow = pw.Snapshot(7, {**right.tensors, "scale": torch.ones(2)})
    other = pw.Snapshot(7, {name: tensor + rank for name, tensor in right.tensors.items()})
    found = {
        "a module": said(lambda: probe_of(mine)),
        "the model in training": said(lambda: probe_of(lambda: mine)),
        "seeds": said(lambda: probe_of(seed=rank)),
        "models": said(lambda: probe_of(fsdp if rank else lambda: fsdp(TinyLM().double()))),
        "losses": said(lambda: probe_of(loss=lambda model, batch: (1 + rank) * language_loss(model, batch))),
        "gradients": said(lambda: probe_of(loss=doubled_gradient)),
        "shapes": said(lambda: probe(narrow)),
        "snapshots": said(lambda: probe(other)),
        "steps": said(lambda: probe(pw.Snapshot(7 + rank, right.tensors))),
        "samplers": said(lambda: probe.with_sampler(SAMPLERS["sgld" if rank else "kappa"])(right)),
        "device": said(lambda: probe_of(device="meta")),
        "fails": said(lambda: probe_of(loss=lambda model, batch: model(batch).nonsense)),
        "shape of the loss": said(lambda: probe_of(loss=lambda model, batch: model(batch))),
        "another model": said(lambda: probe_of(loss=lambda model, batch: language_loss(TinyLM(), batch))),
        "after all that": said(lambda: probe(right)),
    }
    return found


def replayed(rank: int) -> dict[str, object]:
    """A series on all ranks, resumed with a checkpoint that can't be read, and what goes with whole models alone."""
    folder = Path(ORDER["folder"])
    series = SnapshotFolder(folder / "series")
    if rank == 0:
        for step in (1, 2, 3):
            series.save(pw.Snapshot(step, {name: t * (1 + step / 100) for name, t in snapshot("fsdp").tensors.items()}))
    dist.barrier()
    probe, run, said_of = probe_of(), folder / "run", []
    first = next(points := pw.replay(series, probe, run=run))
    points.close()
    rest = list(pw.replay(series, probe, run=run))
    dist.barrier()
    if rank == 0:
        series.source(3).write_bytes(b"nothing")
    dist.barrier()
    lacking = list(pw.replay(series, probe, on_error=said_of.append))
    values = [[[point.step, point.llc.value] for point in some] for some in ([first], rest, lacking)]
    training = fsdp()
    refused = said(lambda: pw.PhaseMonitor(training, probe, run=folder / "live", at=pw.every(1)))
    workers = said(lambda: pw.replay(series, probe, workers=2))
    taken = said(lambda: list(pw.replay(series, probe, run=folder / "series" / "step-00000001.safetensors")))
    size = probe.subject.loss.bytes_of_a_row(words()[:12])  # as on a GPU
    return {"values": values, "said": said_of, "monitor": refused, "workers": workers, "taken": taken, "bytes": size}


def held_at_once(rank: int) -> int:
    """How many new gradients the parameters hold at most while they are looked at, beside those put aside."""
    subject = pw.Probe(recurrent, language_loss, words(), sampler=SAMPLERS["sgld"]).subject
    vector, counts = subject.loss.vector, []

    def see(grad: torch.Tensor, before: torch.Tensor | None) -> None:
        counts.append(sum(s.own.grad is not None or s.local.grad is not None for s in vector._shards))

    for _ in range(2):
        with vector.intercepted(None, see, add=True):
            subject.loss.add_gradient(words()[:12])
    return max(counts)


def unsharded_on_rank_1(rank: int) -> str:
    return said(lambda: probe_of(TinyLM if rank == 1 else fsdp)(snapshot("fsdp")))


def dies(rank: int) -> str:
    def deadly(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        calls.append(batch)
        if rank == 1 and len(calls) == 30:
            os._exit(0)
        return language_loss(model, batch)

    calls: list[torch.Tensor] = []
    return said(lambda: probe_of(loss=deadly)(snapshot("fsdp")))


ORDER: dict[str, Any] = {}
"""Of the group that this process belongs to."""


def take_part(rank: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{ORDER['folder']}/store",
        rank=rank,
        world_size=ORDER["size"],
        timeout=datetime.timedelta(seconds=60),
    )
    for kind, sampler in ORDER["measure"]:
        print(json.dumps({f"{kind} {sampler}": measured(kind, sampler, sharded=True)}), flush=True)
    for name in ORDER["then"]:
        print(json.dumps({name: globals()[name](rank)}), flush=True)


def forked(rank: int) -> int:
    """A process that takes part as this rank, and ends without waiting for the others."""
    if child := os.fork():
        return child
    status = 1
    try:
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            file = os.open(f"{ORDER['folder']}/rank-{rank}.{name}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, stream.fileno())
        take_part(rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured("tp", "sgld", sharded=False)  # whatever is imported at first use
    gc.freeze()  # else collections in the ranks copy what they share
    failed = 0
    for order in map(json.loads, sys.argv[1:]):
        ORDER |= order
        for process in [forked(rank) for rank in range(ORDER["size"])]:
            failed += os.waitpid(process, 0)[1] != 0
    sys.exit(failed)
