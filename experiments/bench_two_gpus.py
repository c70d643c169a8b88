"""Two GPUs of one host: a replay shared out, a model too large for one, and training on both with a monitor.

    python experiments/bench_two_gpus.py                       # all parts; `replay` takes 9 minutes on two H200
    python experiments/bench_two_gpus.py --parts ranks --quick # tiny models on two CPU processes, to see that it runs

Each part prints what was asked for and what it measured:

- `replay`: seconds of a replay of 32 checkpoints of a model of Pythia 160M's shape by one worker over those by two,
  with the time that workers take to start, and the seconds in which each GPU worked. The points must be equal.
- `workers`: six of these checkpoints by two `phasewatch work`, each started with a GPU of its own.
- `ray`: the same six by two actors of a Ray that is started here, which gives each of them its GPU.
- `large`: a model of Pythia 12B's shape in FSDP2 over both GPUs: a step of a chain in place over a raw forward and
  backward pass, and the most memory beside the raw pass, where so much is held that a rank's float32 weights don't
  fit there a second time.
- `ranks`: λ̂ of a small transformer that was trained for a minute, in float32 on one rank and on two.
- `training`: weights and optimizer of each rank with a monitor and without, in DDP and FSDP2; how much longer steps
  take from the first snapshot on, with a monitor that measures in the background on the CPU; and what its calls take.

Weights are random but for `ranks`: it is about cost and rounding.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import bench_large
import torch
import torch.distributed as dist
from bench_large import BATCH, make_model, shard, time_raw, tokens
from command_line import command_line
from safetensors.torch import save_file
from sharded import WORDS, Transformer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import phasewatch as pw

PARTS = "replay", "workers", "ray", "large", "ranks", "training"
CHECKPOINTS = 32
SETTING = {"step_size": 1e-7, "localization": 300.0, "nbeta": 30.0, "chains": 4, "draws": 70, "burn_in": 20}
ROOM = 0.8
"""Memory that the chains of `large` may take beside a raw pass, in sets of a rank's float32 weights."""
LEFT = 0.9
"""What they find free there, beside what torch takes for a raw pass, which is more than is ever allocated."""


def probe_of(name: str, device: str) -> pw.Probe:
    """The probe of a model of Pythia's shape with short chains."""
    batch = tokens(torch.Generator().manual_seed(0), BATCH)
    sampler = pw.Langevin(**SETTING, batch_size=BATCH)
    make = partial(make_model, name, device)
    return pw.Probe(make, bench_large.loss, tokens, eval_batch=batch, sampler=sampler, autocast=torch.bfloat16)


def save_checkpoints(name: str, folder: Path, count: int) -> None:
    """Write checkpoints of other weights each."""
    folder.mkdir()
    model = make_model(name, "cuda" if torch.cuda.is_available() else "cpu")
    for step in range(1, count + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
        save_file(
            {key: tensor.detach().cpu() for key, tensor in model.named_parameters()},
            folder / f"step-{step}.safetensors",
        )


def run_replay(folder: str, run: str, name: str, workers: str) -> None:
    """Replay in this process and its workers; prints the seconds, with all that starting workers takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    series, probe = pw.open_series(folder), probe_of(name, device)
    began = time.perf_counter()
    for _ in pw.replay(series, probe, run=run, workers=int(workers)):
        pass
    print(json.dumps({"seconds": time.perf_counter() - began, "path": probe.path}))


def bench_replay(folder: Path, name: str, count: int) -> None:
    """`replay` of `PARTS`."""
    save_checkpoints(name, folder, count)
    seconds, points = [], []
    for workers in (1, 2):
        run = folder.parent / f"run-{workers}"
        with busy_seconds() as busy:
            found = called("run_replay", folder, run, name, workers, gpus=workers)
        seconds.append(found["seconds"])
        points.append({point.step: point for point in pw.Trajectory.read(run / "points.jsonl").points})
        print(f"  {workers} workers: {seconds[-1]:.1f} s; GPUs worked for {busy} s. {found['path']}", flush=True)
    equal = sum(points[0][step] == points[1].get(step) for step in points[0])
    print(
        f"replay: {seconds[0] / seconds[1]:.2f} times as fast (at least 1.8), {equal} of {count} points equal",
        flush=True,
    )


def bench_workers(folder: Path, name: str, count: int) -> None:
    """`workers` of `PARTS`."""
    save_checkpoints(name, folder, count)
    run, probe_file = folder.parent / "run-external", folder.parent / "probe.py"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = [str(Path(__file__).parent), *sys.path]
    imports = f"import sys\nsys.path[:] = {here!r}\nimport bench_two_gpus as b\n"
    probe_file.write_text(f"{imports}probe = b.probe_of({name!r}, {device!r})\n")
    command = [sys.executable, "-m", "phasewatch.cli"]
    what = [str(folder), "--probe", f"{probe_file}:probe"]
    driver = [*command, "replay", *what, "--run", str(run), "--on", "external"]
    with busy_seconds() as busy:
        started = [subprocess.Popen(driver, env=environment("0,1"), stdout=subprocess.DEVNULL)]
        while not (run / "work").exists() and started[0].poll() is None:
            time.sleep(0.2)
        work = [*command, "work", str(run), *what]
        started += [subprocess.Popen(work, env=environment(str(gpu)), stdout=subprocess.DEVNULL) for gpu in range(2)]
        codes = [process.wait() for process in started]
    found = pw.Trajectory.read(run / "points.jsonl").points
    print(f"workers: {len(found)} of {count} points, exit codes {codes}; GPUs worked for {busy} s", flush=True)


def run_on_ray(folder: str, run: str, name: str, gpus: str) -> None:
    """Replay by actors, one for each GPU; prints the seconds."""
    import ray  # pyright: ignore[reportMissingImports]

    ray.init(num_gpus=int(gpus), num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    series, probe = pw.open_series(folder), probe_of(name, "cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    for _ in pw.replay(series, probe, run=run, on="ray", workers=2):
        pass
    print(json.dumps({"seconds": time.perf_counter() - began}))


def bench_ray(folder: Path, name: str, count: int) -> None:
    """`ray` of `PARTS`."""
    save_checkpoints(name, folder, count)
    run = folder.parent / "run-ray"
    with busy_seconds() as busy:
        seconds = called("run_on_ray", folder, run, name, torch.cuda.device_count(), gpus=2)["seconds"]
    found = pw.Trajectory.read(run / "points.jsonl").points
    print(f"ray: {len(found)} of {count} points in {seconds:.1f} s; GPUs worked for {busy} s", flush=True)


def bench_large_model(name: str) -> None:
    """`large` of `PARTS`, on a rank."""
    rank, device = joined()
    batch = tokens(torch.Generator().manual_seed(0), BATCH).to(device)
    kind = device.split(":")[0]

    def make_sharded() -> nn.Module:
        return shard(make_model(name, device))

    model = make_sharded()
    sizes = {key: tensor.shape for key, tensor in model.named_parameters()}
    local = 4 * sum(parameter.to_local().numel() for parameter in model.parameters())  # pyright: ignore
    part = batch.chunk(dist.get_world_size())[rank].contiguous()
    raw = time_raw(model, part, kind, autocast=False)
    del model
    noise = torch.randn(max(size.numel() for size in sizes.values()), generator=torch.Generator().manual_seed(0)) / 50
    snapshot = pw.Snapshot(0, {key: noise[: size.numel()].view(size) for key, size in sizes.items()})
    sampler = pw.Langevin(**{**SETTING, "chains": 2, "draws": 4, "burn_in": 1}, batch_size=BATCH)
    probe = pw.Probe(make_sharded, bench_large.loss, tokens, eval_batch=batch, sampler=sampler)
    probe(snapshot)  # kernels are compiled
    if kind == "cuda":
        torch.cuda.empty_cache()
        allowed = raw.reserved + LEFT * local
        here = torch.cuda.memory_reserved() + torch.cuda.mem_get_info()[0]
        bench_large.HELD.append(int(here - allowed))
        held = torch.empty(bench_large.HELD[0], dtype=torch.uint8, device=device)  # noqa: F841
    seconds, peaks = [], []
    for draws in (8, 24):  # as many of both are compared with the snapshot
        with bench_large.Peak(kind) as taken:
            point = probe.with_sampler(pw.Langevin(**{**vars(sampler), "draws": draws}))(snapshot)
        seconds.append(taken.seconds)
        peaks.append(taken.bytes)
    step = (seconds[1] - seconds[0]) / (2 * 16)
    after = time_raw(probe.subject.model.module, part, kind, autocast=False)
    if rank == 0:
        ratio = 2 * step / ((raw.seconds + after.seconds) / bench_large.TIMED)
        print(
            f"large: {sum(size.numel() for size in sizes.values()) / 1e9:.1f}B parameters, {local / 2**30:.1f} GiB of "
            f"weights a rank, raw pass {1000 * raw.seconds / bench_large.TIMED:.0f} ms, {raw.bytes / 2**30:.1f} GiB "
            f"({raw.reserved / 2**30:.1f} GiB with what torch keeps)\n"
            f"  a step takes {ratio:.3f} raw passes (at most 1.2), {(max(peaks) - raw.bytes) / max(1, local):.2f} sets "
            f"of a rank's weights beyond the raw pass (at most {ROOM}); {point.llc}\n  {probe.path}",
            flush=True,
        )


@dataclass(frozen=True)
class Trained:
    """What a training left, and what it took.

    Attributes:
        digest: of the rank's weights and optimizer.
        before: median seconds of a step before the first snapshot is taken.
        after: median seconds of a step after it, without the monitor's calls.
        calls: seconds of each of the monitor's calls that took a snapshot.
    """

    digest: str
    before: float
    after: float
    calls: list[float]


def train(model: nn.Module, shape: "Shape", device: str, steps: int, monitor: pw.PhaseMonitor | None = None) -> Trained:
    """Train on words that follow a rule."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    batches = sequences(generator, shape.batch_size * steps, shape.context).to(device).split(shape.batch_size)
    seconds, calls, first = [], [], steps // SNAPSHOTS
    for step, batch in enumerate(batches, 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        next_word(model, batch).backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if monitor is not None:
            began = time.perf_counter()
            monitor(step)
            if step % first == 0:
                calls.append(time.perf_counter() - began)
    held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    digest = sha256()
    for tensor in [*model.parameters(), *held]:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore
        digest.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    before, after = (statistics.median(some) for some in (seconds[first // 4 : first], seconds[first:]))
    return Trained(digest.hexdigest(), before, after, calls)


def sequences(generator: torch.Generator, count: int, context: int) -> Tensor:
    """Words of which each is a function of the one before, or else a random one."""
    words = torch.randint(WORDS, (count, context), generator=generator)
    follows = torch.rand(count, context, generator=generator) < 0.8
    for place in range(1, context):
        words[:, place] = torch.where(follows[:, place], (7 * words[:, place - 1] + 3) % WORDS, words[:, place])
    return words


def next_word(model: nn.Module, words: Tensor) -> Tensor:
    """The mean cross-entropy of the next word."""
    return F.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


@dataclass(frozen=True)
class Shape:
    """A transformer that is trained.

    Attributes:
        width: of its layers.
        layers: how many.
        context: words of a sequence.
        batch_size: sequences of a training step.
    """

    width: int
    layers: int
    context: int
    batch_size: int

    def make(self) -> nn.Module:
        """The model."""
        return Transformer(self.width, self.layers, self.context)


TINY = bench_large.TINY in os.environ
SMALL = Shape(16, 1, 33, 8) if TINY else Shape(256, 4, 33, 32)
LONG = SMALL if TINY else Shape(256, 4, 257, 192)
"""Of `training`: its steps take as long as a GPU's kernels do, and not as long as their starts."""
SNAPSHOTS = 4
"""Of a training of `training`."""
SAMPLER = pw.Langevin(step_size=3e-5, localization=100.0, nbeta=100.0, chains=2, draws=60, burn_in=20, batch_size=32)


def bench_ranks(snapshot: str, training_steps: str) -> None:
    """`ranks` of `PARTS`, on a rank; prints λ̂."""
    rank, device = joined()
    snapshot_file, steps = Path(snapshot), int(training_steps)
    torch.set_float32_matmul_precision("highest")
    if rank == 0 and not snapshot_file.exists():
        torch.manual_seed(0)
        model = SMALL.make().to(device)
        train(model, SMALL, device, steps)
        torch.save(pw.Snapshot.of(model, steps).tensors, snapshot_file)
    dist.barrier()
    kept = pw.Snapshot(steps, torch.load(snapshot_file, weights_only=True))

    def make_sharded() -> nn.Module:
        model = SMALL.make().to(device)
        for block in model.blocks:  # pyright: ignore
            fully_shard(block)
        fully_shard(model)
        return model

    data = sequences(torch.Generator().manual_seed(1), 2048, SMALL.context)
    point = pw.Probe(make_sharded, next_word, data, sampler=SAMPLER)(kept)
    if rank == 0:
        print(json.dumps({"llc": point.llc.value, "error": point.llc.error, "loss": point.loss}), flush=True)


def bench_training(runs: str, training_steps: str) -> None:
    """`training` of `PARTS`, on a rank."""
    rank, device = joined()
    folder, steps = Path(runs), int(training_steps)
    torch.use_deterministic_algorithms(True)  # else two trainings without a monitor differ too

    def wrapped(kind: str) -> nn.Module:
        torch.manual_seed(0)
        model = LONG.make().to(device)
        if kind == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        for block in model.blocks:  # pyright: ignore
            fully_shard(block)
        fully_shard(model)
        return model

    data = sequences(torch.Generator().manual_seed(1), 256, SMALL.context)
    sampler = pw.Langevin(**{**vars(SAMPLER), "draws": 4, "burn_in": 0, "batch_size": 4})  # it is measured on a CPU
    for kind in ("ddp", "fsdp2"):
        left: dict[str, Trained] = {}
        for measure in ("plain", "inline", "background", "plain again"):
            monitor, model = None, wrapped(kind)
            train(wrapped(kind), LONG, device, SNAPSHOTS)  # kernels are loaded
            if measure == "inline" or measure == "background":
                probe = pw.Probe(LONG.make, next_word, data, sampler=sampler) if rank == 0 else None
                run, at = folder / f"{kind}-{measure}", pw.every(steps // SNAPSHOTS)
                monitor = pw.PhaseMonitor(model, probe, run=run, at=at, measure=measure)
            left[measure] = train(model, LONG, device, steps, monitor)
            if monitor is not None:
                monitor.close()
        others = [name for name, trained in left.items() if trained.digest != left["plain"].digest]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, others)
        if rank == 0:
            points = len(pw.Trajectory.read(folder / f"{kind}-background" / "points.jsonl").points)
            longer = {name: trained.after / trained.before for name, trained in left.items()}
            plain, again = longer["plain"], longer["plain again"]
            calls = ", ".join(f"{1000 * seconds:.0f}" for seconds in left["background"].calls)
            print(
                f"training, {kind}: runs that differ from the plain one by a bit, on each rank: {found}; a step takes "
                f"{1000 * left['plain'].after:.2f} "
                f"ms; after the first snapshot steps take {longer['background'] - 1:+.1%} longer with a background "
                f"monitor that measured {points} points, {plain - 1:+.1%} and {again - 1:+.1%} without (at most 2 % "
                f"longer than those); its calls with a snapshot took {calls} ms",
                flush=True,
            )


def joined() -> tuple[int, str]:
    """This process's rank among those that torchrun started, and its device."""
    rank = int(os.environ["RANK"])
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device != "cpu" else "gloo")
    return rank, device


def environment(gpus: str) -> dict[str, str]:
    """For a process that sees these GPUs."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def called(function: str, *arguments: object, gpus: int, ranks: int = 0) -> dict[str, Any]:
    """The JSON that a function of this file prints, in a process or in ranks of torchrun; the rest is shown."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *start, __file__, "--call", function, *map(str, arguments)]
    on_gpus = torch.cuda.is_available()
    own = environment(",".join(map(str, range(gpus))) if on_gpus else "")
    own["OMP_NUM_THREADS"] = "8" if on_gpus else "1"
    own["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic training asks for it
    own["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # else memory that is nearly full costs time
    found: dict[str, Any] = {}
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("{"):
                found = json.loads(line)
            else:
                print(line, end="", flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return found


@contextmanager
def busy_seconds() -> Iterator[list[int]]:
    """The seconds inside in which each GPU worked, filled at the end."""
    busy = [0, 0]
    if not torch.cuda.is_available():
        yield busy
        return
    asked = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-l", "1"]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as process:

        def count() -> None:
            for line in process.stdout or ():
                index, used = map(int, line.split(","))
                if index < len(busy):
                    busy[index] += used > 0

        thread = threading.Thread(target=count, daemon=True)
        thread.start()
        try:
            yield busy
        finally:
            process.terminate()
            thread.join()


CALLED = {each.__name__: each for each in (run_replay, run_on_ray, bench_large_model, bench_ranks, bench_training)}


def main() -> None:
    """Measure the parts that are asked for."""
    parser = command_line(__doc__, quick="tiny models and two CPU processes")
    parser.add_argument("--call", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments: argparse.Namespace = parser.parse_args()
    if arguments.quick:
        bench_large.make_tiny()
    if arguments.call:
        function, *given = arguments.call
        CALLED[function](*given)
        if dist.is_initialized():
            dist.barrier()
            sys.stdout.flush()
            os._exit(0)  # gloo's threads abort the process now and then when they are ended by Python
        return
    small, large, count, steps = ("70M", "70M", 4, 16) if arguments.quick else ("160M", "12B", CHECKPOINTS, 400)
    for gpu in range(torch.cuda.device_count()):
        print(f"GPU {gpu}: {torch.cuda.get_device_name(gpu)}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in arguments.parts:
            if part == "replay":
                bench_replay(folder / "checkpoints", small, count)
            elif part == "workers":
                bench_workers(folder / "few", small, min(count, 6))
            elif part == "ray":
                bench_ray(folder / "few-for-ray", small, min(count, 6))
            elif part == "large":
                called("bench_large_model", large, gpus=2, ranks=2)
            elif part == "ranks":
                kept = folder / "snapshot.pt"
                one, two = (called("bench_ranks", kept, steps, gpus=n, ranks=n) for n in (1, 2))
                apart = abs(one["llc"] - two["llc"]) / abs(one["llc"])
                print(
                    f"ranks: λ̂ {one['llc']:.7g} on one, {two['llc']:.7g} on two: {apart:.1e} apart (at most 1e-5)",
                    flush=True,
                )
            else:
                called("bench_training", folder, steps // 2, gpus=2, ranks=2)


if __name__ == "__main__":
    main()
