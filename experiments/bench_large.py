"""What an estimate costs on language models of Pythia's shapes: time and memory beside a raw forward and backward pass.

    python experiments/bench_large.py --models 160M 410M 1.4B        # on a GPU; minutes

Weights are random and tokens too, which is all the same to the cost. For each model one process measures, in ratios of
one run: a raw pass (bfloat16 autocast, batch 8 x 512, attention as Hugging Face has it), a plain loop with devinterp's
optimizer, and all that phasewatch does for an estimate of 4 chains x 150 steps, divided by those 600 steps. A GPU gets
slower while it is hot, so raw passes heat it first, and one counts as the mean of before and after. Memory is the most
that was allocated, in sets of float32 weights beyond the raw pass. With --compiled and --sharded the same is measured
of a probe that compiles the loss, and of the model in FSDP2 on one rank. Kernels are made before, by an estimate of 25
steps a chain.
"""

import argparse
import gc
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import phasewatch as pw
from phasewatch.monitor.probing.probe import measure_whole

SHAPES = {  # layers, width, heads of Pythia (Biderman et al. 2023)
    "70M": (6, 512, 8),
    "160M": (12, 768, 12),
    "410M": (24, 1024, 16),
    "1.4B": (24, 2048, 16),
    "2.8B": (32, 2560, 32),
    "6.9B": (32, 4096, 32),
    "12B": (36, 5120, 40),
}
VOCABULARY, LENGTH, BATCH = 50_304, 512, 8
CHAINS, STEPS = 4, 150
WARM_UP = 25
"""Steps of each chain in the estimate before."""
TIMED = 20
"""Raw passes, and steps of the plain loop, that are timed."""
HEATED = 20.0
"""Seconds of raw passes before the first are timed."""
HELD: list[int] = []
"""Bytes of the GPU that are held to have less of it."""
TINY = "PHASEWATCH_TINY_MODELS"
"""Environment variable that makes all shapes tiny, here and in the processes that this one starts."""


def make_tiny() -> None:
    """Make tiny models of all shapes, here and in the processes that this one starts."""
    global VOCABULARY, LENGTH
    os.environ[TINY] = "1"
    VOCABULARY, LENGTH = 99, 16
    SHAPES.update(dict.fromkeys(SHAPES, (1, 32, 2)))


if TINY in os.environ:
    make_tiny()


def make_model(name: str, device: str) -> nn.Module:
    """A GPT-NeoX of Pythia's shape with random weights, made where it is used."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    layers, width, heads = SHAPES[name]
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        use_cache=False,
    )
    with torch.device(device):
        return GPTNeoXForCausalLM(config).eval()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The language model's own."""
    return model(batch, labels=batch).loss


def tokens(generator: torch.Generator, batch_size: int) -> Tensor:
    """Random ones."""
    return torch.randint(VOCABULARY, (batch_size, LENGTH), generator=generator)


class Peak:
    """Seconds and the most bytes allocated inside."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> "Peak":
        gc.collect()
        self._cuda = self.device == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began
        self.bytes = torch.cuda.max_memory_allocated() - sum(HELD) if self._cuda else 0
        self.reserved = torch.cuda.max_memory_reserved() - sum(HELD) if self._cuda else 0


def raw_pass(model: nn.Module, batch: Tensor, device: str, *, autocast: bool = True) -> None:
    """Forward and backward."""
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        value = loss(model, batch)
    value.backward()
    model.zero_grad(set_to_none=True)


def repeated(action: Callable[[], object], times: int) -> None:
    """Several times in a row."""
    for _ in range(times):
        action()


def plain_loop(model: nn.Module, batch: Tensor, device: str) -> Callable[[], None]:
    """A step of a loop with devinterp's optimizer, as its users write it."""
    from devinterp.optim import SGMCMC

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = SGMCMC.sgld(model.parameters(), lr=1e-6, nbeta=30.0, localization=300.0)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            value = loss(model, batch)
        value.backward()
        optimizer.step()

    return step


def time_raw(model: nn.Module, batch: Tensor, device: str, *, autocast: bool = True) -> Peak:
    """Of `TIMED` raw passes."""
    action = partial(raw_pass, model, batch, device, autocast=autocast)
    repeated(action, 3)
    with Peak(device) as raw:
        repeated(action, TIMED)
    return raw


def shard(model: nn.Module) -> nn.Module:
    """The model in FSDP2 over all processes, with passes in bfloat16 and float32 weights."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.gpt_neox.layers:  # pyright: ignore
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def make_sharded(name: str, device: str) -> nn.Module:
    """A model of Pythia's shape in FSDP2."""
    return shard(make_model(name, device))


def measure(name: str, device: str, *, compare: bool, chains: int, steps: int, also: Sequence[str]) -> None:
    """Print a model's row."""
    batch = tokens(torch.Generator().manual_seed(0), BATCH).to(device)
    model = make_model(name, device)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    if device == "cuda":
        until = time.perf_counter() + HEATED
        while time.perf_counter() < until:
            time_raw(model, batch, device)
    raw = time_raw(model, batch, device)
    before = raw.seconds / TIMED
    print(f"{name}: one set of weights {weights / 2**30:.2f} GiB, raw pass {1000 * before:.1f} ms, ", end="")
    print(f"{raw.bytes / 2**30:.1f} GiB", flush=True)
    if compare:
        step = plain_loop(model, batch, device)
        repeated(step, 3)
        with Peak(device) as plain:
            repeated(step, TIMED)
        print(f"  plain loop: {plain.seconds / TIMED / before:.2f} passes a step, {plain.bytes / 2**30:.1f} GiB")
        del step
    snapshot = pw.Snapshot.of(model, 0)
    del model
    gc.collect()
    sampler = pw.Langevin(
        step_size=1e-7, localization=300.0, nbeta=30.0, chains=chains, draws=steps - 50, burn_in=50, batch_size=BATCH
    )
    for how in ["", *also]:
        is_sharded, compiled = how == "on FSDP2", how == "compiled"
        make = partial(make_sharded if is_sharded else make_model, name, device)
        autocast = None if is_sharded else torch.bfloat16
        began = time.perf_counter()
        probe = pw.Probe(make, loss, tokens, eval_batch=batch, sampler=sampler, autocast=autocast, compiled=compiled)
        measure_whole(probe, snapshot, replace(sampler, draws=WARM_UP, burn_in=0))
        warm = time.perf_counter() - began
        with Peak(device) as whole:
            point = probe(snapshot)
        module = probe.subject.model.module
        after = time_raw(module, batch, device, autocast=not is_sharded).seconds / TIMED
        seconds = whole.seconds / (chains * steps)
        print(
            f"  phasewatch {how}: {warm:.0f} s for the probe and {chains * WARM_UP} steps, then "
            f"{1000 * seconds:.1f} ms a step, raw pass {1000 * after:.1f} ms afterwards, "
            f"{2 * seconds / (before + after):.3f} passes a step, "
            f"{whole.bytes / 2**30:.1f} GiB ({whole.reserved / 2**30:.1f} GiB with what torch keeps), "
            f"{(whole.bytes - raw.bytes) / weights:.2f} sets beyond the raw pass; "
            f"{point.llc.health.name} {point.llc.value:.4g}\n  {probe.path}",
            flush=True,
        )
        del probe, module
        gc.collect()


def main() -> None:
    """Measure the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["160M", "410M", "1.4B", "2.8B"])
    parser.add_argument("--chains", type=int, default=CHAINS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--within", type=float, metavar="GB", help="hold the GPU's other memory")
    parser.add_argument("--compiled", action="store_true", help="measure a probe that compiles the loss too")
    parser.add_argument("--sharded", action="store_true", help="measure it in FSDP2 on one rank too")
    parser.add_argument("--no-compare", action="store_true", help="leave devinterp's optimizer out")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.sharded:
        own: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # pyright: ignore
        dist.init_process_group("nccl" if device == "cuda" else "gloo", **own)
    if arguments.within:
        held = torch.empty(int(torch.cuda.mem_get_info()[0] - 1e9 * arguments.within), dtype=torch.uint8, device=device)
        HELD.append(held.nbytes)
    also = ["compiled"] * arguments.compiled + ["on FSDP2"] * arguments.sharded
    for name in arguments.models:
        given = {"compare": not arguments.no_compare, "chains": arguments.chains, "steps": arguments.steps}
        measure(name, device, **given, also=also)


if __name__ == "__main__":
    main()
