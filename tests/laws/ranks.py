"""The ranks of a training that `test_distributed.py` orders, forks of one process; each prints what it left."""

import datetime
import gc
import hashlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import phasewatch as pw
from phasewatch.callbacks.trainers import ranks

ORDER = json.loads(sys.argv[1])
RANK, SIZE = 0, 2
STEPS = 4


class Noisy(nn.Module):
    """A perceptron with dropout and with a buffer that a state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.dropout(self.first(x).tanh() * self.scale, 0.2, self.training))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return x, x[:, :3].argmax(-1)


def make_probe() -> pw.Probe:
    sampler = pw.SGLD(step_size=1e-5, nbeta=10.0, chains=2, draws=4, burn_in=1, batch_size=16)
    return pw.Probe(Noisy, loss, data(), sampler=sampler)


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def wrapped(model: Noisy, kind: str) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (SIZE,))
    if kind.startswith("fsdp1"):
        return FSDP1(model, device_id=torch.device("cpu"), use_orig_params=kind == "fsdp1 with original parameters")
    if kind == "tp":
        return parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_deepspeed(kind: str) -> tuple[nn.Module, Any]:
    """An engine of DeepSpeed and its optimizer; "zero3 loaded" is built in shards."""
    os.environ |= {"RANK": str(RANK), "LOCAL_RANK": str(RANK), "WORLD_SIZE": str(SIZE)}
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 16, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    config["zero_optimization"] = {"stage": int(kind[4])}
    deepspeed.init_distributed("gloo", dist_init_required=False)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=kind == "zero3 loaded"):
        model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def whole(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """The weights as the library itself gathers them."""
    if kind.startswith("zero"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=kind.startswith("zero3")):
            return {name: tensor.detach().clone() for name, tensor in model.module.named_parameters()}
    if kind.startswith("fsdp1"):
        with FSDP1.summon_full_params(model):
            return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    bare = model.module if kind == "ddp" else model
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach() for name, t in bare.named_parameters()}


def train(kind: str, run: str | None, measure: str) -> dict[str, Any]:
    torch.manual_seed(10 + RANK)
    if kind.startswith("zero"):
        model, optimizer = in_deepspeed(kind)
    else:
        model = wrapped(Noisy(), kind)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = None
    if run and (RANK == 0 or ORDER["who"] == "all"):
        probe = make_probe() if RANK == 0 else None
        monitor = pw.PhaseMonitor(model, probe, run=run, at=pw.every(2), measure=measure)
    x, y = data()
    torch.manual_seed(20 + (0 if kind == "tp" else RANK))
    for step in range(1, STEPS + 1):
        rows = torch.randperm(64)[:16]
        value = loss(model, (x[rows], y[rows]))
        if kind.startswith("zero"):
            model.backward(value)
            model.step()
        else:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if ORDER.get("dies") == [RANK, step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if monitor:
            monitor(step)
    if monitor:
        monitor.close()
    held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    gathered = whole(model, kind)
    if monitor and RANK == 0:
        kept = load_file(Path(run, "snapshots", f"step-{STEPS:08d}.safetensors"))
        assert kept.keys() == {*gathered, "scale"}, kept.keys()
        assert all(torch.equal(kept[name], tensor) for name, tensor in gathered.items())
    return {
        "parameters": digest(list(model.parameters())),
        "gradients": digest([p.grad for p in model.parameters() if p.grad is not None]),
        "optimizer": digest(held),
        "stream": digest([torch.get_rng_state()]),
    }


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    timeout = datetime.timedelta(seconds=ORDER.get("timeout", 60))
    dist.init_process_group("gloo", init_method=f"file://{ORDER['store']}", rank=RANK, world_size=SIZE, timeout=timeout)
    if seconds := ORDER.get("measuring takes"):
        original = pw.Probe.measure
        pw.Probe.measure = lambda self, snapshots: (time.sleep(seconds), original(self, snapshots))[1]
    ranks.DEAD_SECONDS = ORDER.get("dead", 20)
    left = {}
    try:
        for kind, measure in ORDER["trainings"]:
            name = f"{kind}-{measure}"
            run = None if measure is None else str(Path(ORDER["folder"], ORDER.get("runs", [name] * 2)[RANK]))
            left[name] = train(kind, run, measure)
    except pw.PhasewatchError as error:
        left["said"] = str(error)
    except RuntimeError as error:
        left["died"] = str(error)
    print(json.dumps(left), flush=True)


def forked(rank: int) -> int:
    """A process that is this rank."""
    global RANK
    if child := os.fork():
        return child
    RANK, status = rank, 1
    try:
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            file = os.open(f"{ORDER['folder']}/rank-{rank}.{name}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, stream.fileno())
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # a group whose other rank has died can't be taken down


torch.set_num_threads(1)
make_probe()(pw.Snapshot.of(Noisy(), 0))  # whatever is imported at first use
gc.freeze()  # else collections in the ranks copy what they share
for process in [forked(rank) for rank in range(SIZE)]:
    os.waitpid(process, 0)
