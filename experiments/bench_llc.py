"""What a chain step costs, and how many gradients a difference of two checkpoints needs. All ratios are of one run.

Each row of the table has an aim and what was measured; results/bench_llc.json keeps the last run on each machine.

On two CPU cores, an attention-only transformer of 46k parameters, batch 32 × 64, 4 chains:
- A chain step over a forward and a backward pass of the model: aim at most 1.05, measured 1.03.
- A step of `devinterp.slt.llc.llc` over a chain step: aim at least 3, measured 1.9.

On both toy tasks, gradients to know the difference of neighbouring checkpoints as well, with independent noise over
with shared noise: aim at least 20, measured 32 (in-context regression) and 321 (induction).

On a GPU, whose measured values the results say:
- The in-context regression model at its published size, batch 1024, 20 checkpoints × 10 chains: aim at a fortieth of
  the time of eager chains one after another, and at no more than 3 times what the device can't do without: the larger
  of the time for the floating-point operations at the rate of a large matrix product, and the time for the bytes that
  the model's matrix products alone must read and write at the rate of a large copy.
- A transformer of a hundred million parameters with 4 chains: aim at no more than 1.15 passes a step, and at memory for
  one set of weights and one for each chain besides what a group of chains needs.

Costs about four minutes on two cores, and three on a GPU.

    python experiments/bench_llc.py [--quick]
"""

import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import command_line
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from phasewatch.monitor.model.autocast import under_autocast
from phasewatch.monitor.model.loss import Loss, ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.weights import SampledModel, Weights
from phasewatch.monitor.sampling.chains import run_chains
from phasewatch.monitor.sampling.settings import Langevin
from phasewatch.toy_tasks import in_context_regression as regression
from phasewatch.toy_tasks import induction

RESULTS = Path(__file__).parent / "results" / "bench_llc.json"
Row = tuple[str, float, str, str]


def seconds(run: Callable[[], Any], device: str, *, repeats: int = 1) -> float:
    """Wall-clock seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def in_turn(runs: dict[str, Callable[[], Any]], device: str, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each of some rounds, after one that doesn't count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run, device)
            if number:
                found[name].append(taken)
    return found


def ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds of the ratio in each."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def target_of(model: SampledModel, loss: Loss, kept: Batches) -> LossOnBatches:
    """What chains sample, vectorised where that is right."""
    whole = ModelLoss(model, loss)
    whole.choose_path(kept.take(torch.arange(2, device=model.device)))
    return LossOnBatches(whole, kept)


# On a CPU


def on_cpu(quick: bool) -> Iterator[Row]:
    """The first two claims."""
    import tempfile

    from datasets import Dataset, disable_progress_bars
    from devinterp.slt.llc import llc

    from phasewatch.monitor.model.copying import own_copy
    from phasewatch.monitor.model.isolation import untouched_randomness

    disable_progress_bars()
    steps, chains, batches = (20, 4, 8) if quick else (40, 4, 32)
    model = own_copy(induction.make_model(vocabulary=64, context=64))
    tokens = torch.randint(64, (32 * batches, 64), generator=torch.Generator().manual_seed(0))
    sampled = SampledModel(model)
    kept = Batches(tokens.split(32))
    target = target_of(sampled, induction.loss, kept)
    path = "vectorised" if target.vectorised else "one after another"
    weights = sampled.weights()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def raw() -> None:
        for i in range(steps):
            torch.autograd.grad(induction.loss(model, kept[i % batches]), parameters, allow_unused=True)

    def ours(draws: int, burn_in: int) -> None:
        sampler = Langevin(1e-4, 100, 100, chains, draws, burn_in, 32)
        run_chains(target, [weights], sampler, 0)

    def theirs() -> None:
        ids = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
        with untouched_randomness(0), tempfile.TemporaryDirectory() as folder:
            llc(
                own_copy(model), ids, {}, lr=1e-4, n_beta=100.0, localization=100.0, num_chains=1, num_draws=steps,
                num_burnin_steps=0, batch_size=32, num_init_loss_batches=1, shuffle=False, device="cpu",
                output_path=Path(folder) / "samples",
            ).load()  # fmt: skip

    ours(4, 0)
    # The difference of a long run and a short one is steps alone, without what is done once for a snapshot.
    runs = {
        "raw": raw, "long": partial(ours, 8, 2 * steps), "short": partial(ours, 8, steps), "theirs": theirs,
        "whole": partial(ours, 100, 50),
    }  # fmt: skip
    found = in_turn(runs, "cpu", rounds=2 if quick else 7)
    raw_pass = [t / steps for t in found["raw"]]
    step = [(a - b) / steps / chains for a, b in zip(found["long"], found["short"], strict=True)]
    whole = [t / 150 / chains for t in found["whole"]]
    their_step = [t / steps for t in found["theirs"]]
    size = f"{sampled.size:,} parameters, batch 32 × 64, {chains} chains, {path}"
    yield "CPU: chain step / raw forward + backward", ratio(step, raw_pass), "≤ 1.05", size
    yield "CPU: all of an estimate of 50 + 100 steps, per chain step / raw", ratio(whole, raw_pass), "", size
    yield "CPU: chain step of devinterp's llc() / ours", ratio(their_step, step), "≥ 3", size


# Shared noise


def sharing(name: str, task: Any, model: nn.Module, data: Any, sampler: Langevin, last: int) -> Row:
    """Gradients that independent noise needs for a difference, over those that shared noise needs."""
    snapshots = []
    for step in islice(task.training(model, data), last):
        if step in {last - 10, last}:
            snapshots.append({name: p.detach().clone() for name, p in model.named_parameters()})
    generator = torch.Generator().manual_seed(1)
    kept = Batches([data(generator, sampler.batch_size) for _ in range(16 * sampler.chains)], whole=False)
    sampled = SampledModel(model)
    target = target_of(sampled, task.loss, kept)
    per_chain = {}
    for number, snapshot in enumerate(snapshots):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(snapshot[key])
        for seed in (0, 1):
            (chains,) = run_chains(target, [sampled.weights()], sampler, seed)
            per_chain[number, seed] = sampler.nbeta * (chains.losses - chains.reference).mean(1)
    shared = np.concatenate([per_chain[1, seed] - per_chain[0, seed] for seed in (0, 1)])
    apart = np.concatenate([per_chain[1, seed] - per_chain[0, 1 - seed] for seed in (0, 1)])
    found = float(apart.var(ddof=1) / shared.var(ddof=1))
    return f"{name}: gradients with independent noise / shared", found, "≥ 20", f"{sampler.chains} chains, 2 seeds"


def on_toy_tasks(quick: bool) -> Iterator[Row]:
    """The claim about differences, on checkpoints ten training steps apart."""
    torch.manual_seed(0)
    chains = 8 if quick else 32
    for name, task, model, data, sampler in (
        ("in-context regression", regression, regression.RegressionTransformer(width=32), regression.RegressionData(),
         Langevin(2e-4, 100, 66.7, chains, 60, 40, 64)),
        ("induction", induction, induction.make_model(), induction.InductionData(),
         Langevin(1e-4, 100, 100, chains, 60, 40, 16)),
    ):  # fmt: skip
        yield sharing(name, task, model, data, sampler, 110 if quick else 1210)


# On a GPU


class MatrixBytes(TorchDispatchMode):
    """Counts what matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        out = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] in {"mm", "bmm", "addmm", "baddbmm"}:
            self.bytes += sum(t.numel() * t.itemsize for t in (*args, out) if isinstance(t, Tensor))
        return out


def device_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations a second of a large product, and bytes a second of a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    seconds(lambda: a @ a, "cuda", repeats=3)
    flops = 2 * 8192**3 / seconds(lambda: a @ a, "cuda", repeats=10)
    b = torch.empty(2**30, device="cuda")
    c = torch.randn_like(b)
    b.copy_(c)
    return flops, 2 * b.numel() * 4 / seconds(lambda: b.copy_(c), "cuda", repeats=10)


def eager_step(model: nn.Module, loss: Any, batch: Any, sampler: Langevin) -> Callable[[], None]:
    """A chain step as one writes it by hand: a pass, and the update of each parameter in turn."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    anchors = [p.detach().clone() for p in parameters]
    eps, nbeta, gamma = sampler.step_size or 0.0, sampler.nbeta, sampler.localization

    def step() -> None:
        model.zero_grad()
        loss(model, batch).backward()
        with torch.no_grad():
            for p, anchor in zip(parameters, anchors, strict=True):
                if p.grad is not None:
                    p.sub_(eps / 2 * (nbeta * p.grad + gamma * (p - anchor)))
                    p.add_(torch.randn_like(p), alpha=math.sqrt(eps))

    return step


def run_for(
    target: LossOnBatches, anchors: list[Weights], sampler: Langevin, burn_in: int, rows: int | None = None
) -> None:
    """Run chains for some steps and four more."""
    run_chains(target, anchors, replace(sampler, burn_in=burn_in, draws=4), 0, rows=rows)


def time_of_steps(target: LossOnBatches, anchors: list[Weights], sampler: Langevin, steps: int) -> float:
    """Seconds of a step of all chains: a long run less a short one."""
    run = partial(run_for, target, anchors, sampler)
    run(1)
    found = in_turn({"long": partial(run, 2 * steps), "short": partial(run, steps)}, "cuda", rounds=3)
    return statistics.median(a - b for a, b in zip(found["long"], found["short"], strict=True)) / steps


def on_gpu(quick: bool) -> Iterator[Row]:
    """The claims about a GPU, with the regression model in three precisions and a large transformer."""
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    sampler = Langevin(3e-4, 6.67, 66.7, chains=10, batch_size=1024)
    generator = torch.Generator().manual_seed(0)
    kept = Batches(
        [tuple(t.cuda() for t in regression.RegressionData()(generator, 1024)) for _ in range(20)], whole=False
    )
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        loss = regression.loss if dtype is torch.float32 else under_autocast(regression.loss, "cuda", dtype)
        model = regression.RegressionTransformer().cuda()
        sampled = SampledModel(model)
        target = target_of(sampled, loss, kept)
        checkpoints = [[w + 0.01 * torch.randn_like(w) for w in sampled.weights()] for _ in range(20)]
        step = time_of_steps(target, checkpoints, sampler, 10 if quick else 20) / 200
        one, batch = regression.RegressionTransformer().cuda(), kept[0]
        eager_run = eager_step(one, loss, batch, sampler)
        seconds(eager_run, "cuda", repeats=20)
        eager = seconds(eager_run, "cuda", repeats=100)
        with FlopCounterMode(display=False) as flops, MatrixBytes() as products:
            loss(one, batch).backward()
        flop_rate, byte_rate = device_rates(dtype)
        floors = flops.get_total_flops() / flop_rate, products.bytes / byte_rate
        about = (
            f"ours {step * 1e3:.3f} ms, eager {eager * 1e3:.2f} ms; {flops.get_total_flops() / 1e9:.1f} GFLOP at "
            f"{flop_rate / 1e12:.0f} TFLOP/s {floors[0] * 1e3:.3f} ms, {products.bytes / 1e6:.0f} MB at "
            f"{byte_rate / 1e12:.1f} TB/s {floors[1] * 1e3:.3f} ms"
        )
        yield f"GPU, {name}: eager chain step / ours", eager / step, "≥ 40", about
        yield f"GPU, {name}: ours / the device's floor", step / max(floors), "≤ 3", about
        run = partial(run_chains, target, checkpoints, replace(sampler, burn_in=100, draws=200), 0)
        whole = seconds(run, "cuda") / 200 / 300
        about = (
            f"{whole * 60000:.1f} s for 20 estimates of 100 + 200 steps, surveys and references of their own included"
        )
        yield f"GPU, {name}: eager chain step / all of an estimate, per chain step", eager / whole, "", about
    torch.set_float32_matmul_precision("highest")
    yield from large_transformer(quick)


class Block(nn.Module):
    """Causal attention and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, token, width) in and out."""
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-4, -2).unbind(-4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).movedim(-3, -2).flatten(-2))
        return x + self.mlp(self.ln2(x))


class Large(nn.Module):
    """A decoder of 12 layers, width 768 and vocabulary 16,384, tied: 98 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16384, 768)
        self.blocks = nn.Sequential(*(Block(768, 12) for _ in range(12)))
        self.norm = nn.LayerNorm(768)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, token, vocabulary)."""
        return self.norm(self.blocks(self.embed(tokens))) @ self.embed.weight.T


def next_word(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def large_transformer(quick: bool) -> Iterator[Row]:
    """Cost and memory of four chains."""
    torch.cuda.empty_cache()
    model = Large().cuda().eval()
    loss = under_autocast(next_word, "cuda", torch.bfloat16)
    sampled = SampledModel(model)
    generator = torch.Generator().manual_seed(0)
    kept = Batches([torch.randint(16384, (32, 512), generator=generator).cuda() for _ in range(8)], whole=False)
    parameters = list(model.parameters())

    def raw() -> None:
        torch.autograd.grad(loss(model, kept[0]), parameters)

    seconds(raw, "cuda", repeats=5)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    raw()
    activations = torch.cuda.max_memory_allocated() - base
    target = target_of(sampled, loss, kept)
    sampler = Langevin(1e-6, 100, 100, chains=4, batch_size=32)
    for group in (1, 4):
        run = partial(run_for, target, [sampled.weights()], sampler, rows=group)
        torch.cuda.reset_peak_memory_stats()
        run(2)
        peak = torch.cuda.max_memory_allocated() - base
        steps = 10 if quick else 40
        found = in_turn({"long": partial(run, 2 * steps), "short": partial(run, steps)}, "cuda", rounds=2)
        step = statistics.median(a - b for a, b in zip(found["long"], found["short"], strict=True)) / steps / 4
        raw_pass = seconds(raw, "cuda", repeats=20)
        beyond = (peak - (group if target.vectorised else 1) * activations) / (sampled.size * 4)
        path = "vectorised" if target.vectorised else "one after another"
        about = f"{sampled.size / 1e6:.0f} M parameters, batch 32 × 512, bfloat16, {group} of 4 chains together, {path}"
        yield f"GPU: chain step / raw pass, {group} together", step / raw_pass, "≤ 1.15", about
        about += f"; peak {peak / 1e9:.1f} GB, activations {activations / 1e9:.1f} GB"
        yield f"GPU: sets of weights beside the model, {group} together", beyond, "≤ 5 + group", about


def main() -> None:
    """Measure what this machine can, and print and keep a table."""
    parser = command_line(__doc__, quick="fewer rounds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table is kept")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if torch.cuda.is_available():
        machine, found = torch.cuda.get_device_name(), on_gpu(options.quick)
    else:
        machine = f"{torch.get_num_threads()} cores, {platform.machine()}"
        found = chain(on_cpu(options.quick), on_toy_tasks(options.quick))
    print(f"{machine}, torch {torch.__version__}")
    rows = []
    for name, value, reach, about in found:
        rows.append((name, value, reach, about))
        print(f"{name:66} {value:8.3f}  {reach:12} {about}", flush=True)
    if not options.quick:
        kept = json.loads(options.output.read_text()) if options.output.exists() else {}
        kept[machine] = {"torch": torch.__version__, "rows": rows}
        options.output.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
