"""The runs of language_stages.py: each trained under a monitor, then measured again in the ways that are asked for."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from campaign import without_traces
from language_training import Left, synchronize, train
from torch import Generator

from phasewatch import (
    SGLD,
    Budget,
    ItemScores,
    Langevin,
    PhaseMonitor,
    Point,
    Probe,
    Question,
    Snapshot,
    SnapshotFolder,
    Trajectory,
    Transition,
    heads,
    log_spaced,
    replay,
)
from phasewatch.callbacks.trainers.schedule import Steps
from phasewatch.monitor.probing.probe import measure_whole
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.averaging import RunningAverage
from phasewatch.toy_tasks import language
from phasewatch.toy_tasks.english import EnglishData
from phasewatch.toy_tasks.language import LanguageModel, Shape
from phasewatch.toy_tasks.language_scores import LanguageScores

EXPERIMENT = "language_stages"

SAMPLER = Langevin(
    step_size=1e-4, localization=300, nbeta=21.7, momentum=0.8, chains=4, draws=24, burn_in=16, batch_size=16
)
"""The published γ and nβ, with steps that the largest curvatures allow: nβ·h + γ comes to 16,000 to 38,000, and the
published ε of 3e-3 is stable up to 670. Momentum settles the directions that γ holds nine times as fast. Of the runs
that are kept, seed 5 was watched with this, and the others with `PUBLISHED_STEPS`; seeds 0 to 3 were measured again."""

PUBLISHED_STEPS = replace(SAMPLER, step_size=3e-3, momentum=None, chains=3, draws=16, burn_in=8)
"""The published ε too, by the short chains that most kept runs were watched with."""

PUBLISHED = SGLD(step_size=3e-3, localization=300, nbeta=21.7, chains=4, draws=200, burn_in=0, batch_size=100)
"""The published setting but for the chains: 4 and not 20, since one estimate by 20 takes 20 % of a training of 20,000
steps."""

SHARE = 0.19
"""Share of training's time that the monitor takes."""

AVERAGED = 0.02
"""Share of the steps so far that averaged weights are the mean of."""

REPLAY = "replay"
BUDGET = 0.5
"""Share of a run's snapshots that its replay by coarse to fine measures."""

SAMPLERS: dict[str, tuple[Sampler, int | None]] = {
    "everywhere": (SAMPLER, None),
    "published-steps": (PUBLISHED_STEPS, None),
    "small-steps": (replace(SAMPLER, momentum=None, chains=2, draws=60, burn_in=100), 24),
    "nbeta-10": (replace(SAMPLER, nbeta=10.0), 16),
    "nbeta-30": (replace(SAMPLER, nbeta=30.0), 16),
    "nbeta-60": (replace(SAMPLER, nbeta=60.0), 16),
    "longer": (replace(SAMPLER, draws=100, burn_in=100), None),
    "averaged": (SAMPLER, 24),
    "heads": (SAMPLER, 5),
    "published": (PUBLISHED, 8),
}
"""What else snapshots can be measured with, and at how many steps from a tenth of the run on. None is all steps."""

EXTRAS = (*SAMPLERS, REPLAY)


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        shape: of the model, with two layers.
        data: the text.
        steps: of training.
        batch_size: sequences in a batch of training.
        at: the steps whose snapshots are kept.
        held_out: sequences that the loss of a point and the in-context score are taken on.
        scored: of them, those that the other scores are taken on.
        share: of training's time that the monitor may take; None measures at every step of `at`.
        quick: chains and repeated measurements of the smallest size.
    """

    shape: Shape
    data: EnglishData
    steps: int
    batch_size: int
    at: Steps
    held_out: int
    scored: int
    share: float | None = None
    quick: bool = False

    def sampler(self, full: Sampler) -> Sampler:
        """A sampler, of the smallest size where that is asked for."""
        return replace(full, chains=2, draws=4, burn_in=2, batch_size=2) if self.quick else full


def published_size(corpus: Path, steps: int) -> Size:
    """The published size."""
    at = Steps(log_spaced(1, steps, num=26, linear=32).steps | {0})
    data, batch_size = EnglishData(corpus), language.PUBLISHED_BATCH
    return Size(Shape(), data, steps, batch_size, at, held_out=128, scored=16, share=SHARE)


def smallest_size(corpus: Path, steps: int) -> Size:
    """A size that runs on a CPU in a minute, to see that it runs."""
    shape = Shape(heads=2, width=32, vocabulary=5_000, context=64)
    data = EnglishData(corpus, context=shape.context)
    at = Steps(log_spaced(1, steps, num=6, linear=4).steps | {0})
    return Size(shape, data, steps, 8, at, held_out=8, scored=8, quick=True)


class Calls:
    """A sink that remembers when transitions were confirmed, and how late that was.

    Attributes:
        called: kind, start, end and the newest step that was measured then, of each.
    """

    def __init__(self) -> None:
        self.called: list[dict[str, Any]] = []
        self._newest = 0

    def write(self, item: Point | Transition) -> None:
        """Take one item."""
        if isinstance(item, Point):
            self._newest = item.step
        elif not item.provisional:
            self.called.append(
                {"kind": item.kind.label, "start": item.start, "end": item.end, "confirmed at": self._newest}
            )

    def close(self) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class Kit:
    """What measures the models of one shape: made once, since it is compiled.

    Attributes:
        probe: measures.
        scores: of it.
        items: of it: the two chains of scores.
        model: what is trained; the runs of a shape share it.
    """

    probe: Probe
    scores: LanguageScores
    items: Sequence[ItemScores]
    model: LanguageModel


@cache
def kit(layers: int, size: Size, device: str) -> Kit:
    """What measures the models of so many layers."""
    shape, data = replace(size.shape, layers=layers), size.data
    held_out = data.held_out(size.held_out)
    scores = LanguageScores(data, held_out, size.scored)
    items = [ItemScores(text_questions(data), name="text"), ItemScores(repeat_questions(data), name="repeat")]
    metrics: dict[str, Any] = dict(scores.metrics)
    for each in items:
        metrics |= each.metrics
    probe = Probe(
        partial(LanguageModel, shape),
        language.loss,
        data,
        eval_batch=held_out,
        sampler=size.sampler(SAMPLER),
        metrics=metrics,
        threads=1,
        device=device,
        autocast=torch.bfloat16 if device.startswith("cuda") else None,
        compiled=device.startswith("cuda"),
    )
    return Kit(probe, scores, items, LanguageModel(shape).to(device))


def text_questions(data: EnglishData, count: int = 32) -> list[Question]:
    """How a held-out text goes on: four tokens after 48, or those of three other texts."""
    length = min(52, data.context)
    rows = data.held_out(4 * count, seed=1)[:, :length].tolist()
    return [
        Question(row[:-4], [row[-4:], *(other[-4:] for other in rows[4 * i + 1 : 4 * i + 4])])
        for i in range(count)
        for row in [rows[4 * i]]
    ]


def repeat_questions(data: EnglishData, count: int = 32) -> list[Question]:
    """How random tokens go on that came before: which of four of them is next."""
    rows = torch.rand(count, data.vocabulary, generator=Generator().manual_seed(2)).argsort(-1)[:, :32].tolist()
    return [Question(row + row[:16], [[row[16]], [row[20]], [row[24]], [row[28]]]) for row in rows]


def run_of(layers: int, seed: int) -> str:
    """The name of a run."""
    return f"{layers}-layers-seed-{seed}"


def train_run(
    layers: int,
    seed: int,
    size: Size,
    *,
    runs: Path,
    results: Path,
    states: Path,
    device: str,
    deadline: float,
) -> bool:
    """Train a run under a monitor, from where it was left, and keep its points.

    Args:
        layers: of the model.
        seed: of the model and its batches.
        size: how large everything is.
        runs: the folder of run folders.
        results: the folder of points.
        states: the folder of the states that runs are left in.
        device: where everything happens.
        deadline: of `time.monotonic`, at which it is left.

    Returns:
        Whether it is at its end.
    """
    name = run_of(layers, seed)
    given = kit(layers, size, device)
    model, folder = given.model, runs / name
    model.load_state_dict(LanguageModel(model.shape, seed=seed).state_dict())
    given.scores.by_head.clear()
    for each in given.items:
        each.keep = folder
    average, calls = RunningAverage(AVERAGED), Calls()
    averages, costs = SnapshotFolder(folder / "averaged"), list[float]()
    at = Budget(size.share, at=size.at) if size.share else size.at
    monitor = PhaseMonitor(model, given.probe, run=folder, at=at, sinks=[calls])

    def measure(step: int) -> None:
        begun = time.monotonic()
        monitor(step)
        synchronize(torch.device(device))
        costs.append(time.monotonic() - begun)
        if step:
            averages.save(average.snapshot(model, step))

    left = train(
        model,
        size.data,
        seed=seed,
        steps=size.steps,
        batch_size=size.batch_size,
        state=states / name,
        after_each=partial(average.update, model),
        at=size.at,
        on_due=measure,
        deadline=deadline,
    )
    begun = time.monotonic()
    monitor.close()
    costs.append(time.monotonic() - begun)
    keep_points(monitor.trajectory, results, EXPERIMENT, name)
    beside_points = {"calls": calls.called, "by_head": given.scores.by_head, "parameters": given.probe.settings}
    add_beside(results, name, left, monitor.trajectory, costs, **beside_points)
    print(
        f"{name}: {left.step} of {size.steps} steps in {left.seconds:.1f} s ({left.step / left.seconds:.1f} a second), "
        f"{sum(costs):.1f} s of measuring {len(costs)} times, {given.probe.path}",
        flush=True,
    )
    return left.step >= size.steps


def add_beside(
    results: Path,
    name: str,
    left: Left,
    points: Trajectory,
    costs: Sequence[float],
    *,
    calls: Sequence[Mapping[str, Any]],
    by_head: Mapping[int, Any],
    parameters: Mapping[str, Any],
) -> None:
    """Keep what isn't a point of a run: its costs, its transitions as they were called, and the scores by head."""
    file, held = beside_file(results, name), beside(results, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    rounded = {
        str(step): {score: np.round(values, 4).tolist() for score, values in scores.items()}
        for step, scores in by_head.items()
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    held |= {
        "steps": left.step,
        "points": len(points),
        "training seconds": round(left.seconds, 1),
        "monitoring seconds": [*held.get("monitoring seconds", []), *np.round(costs, 3).tolist()],
        "device": f"{device}, torch {torch.__version__}",
        "settings": parameters,
        "called": [*held.get("called", []), *calls],
        "by head": held.get("by head", {}) | rounded,
    }
    file.write_text(json.dumps(held) + "\n", "utf-8")


def beside(results: Path, name: str) -> dict[str, Any]:
    """What is kept of a run beside its points, so far."""
    file = beside_file(results, name)
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def beside_file(results: Path, name: str) -> Path:
    """Where that is."""
    return results / "points" / f"{EXPERIMENT}_beside" / f"{name}.json"


def keep_points(points: Trajectory, results: Path, experiment: str, name: str) -> None:
    """Keep points without the traces of doubtful chains."""
    kept = results / "points" / experiment / f"{name}.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(".unfinished.jsonl")
    Trajectory(without_traces(point) for point in points).write(unfinished)
    os.replace(unfinished, kept)


def late_steps(steps: Sequence[int], most: int) -> list[int]:
    """So many of the steps from a tenth of a run on."""
    late = [step for step in steps if step >= steps[-1] / 10]
    return sorted({late[i] for i in np.linspace(0, len(late) - 1, most).round().astype(int)})


def measure_again(name: str, extra: str, size: Size, *, runs: Path, results: Path, device: str) -> None:
    """Measure a run's snapshots in another way, if they are there and it hasn't been done."""
    kept = results / "points" / f"{EXPERIMENT}_{extra}" / f"{name}.jsonl"
    points = results / "points" / EXPERIMENT / f"{name}.jsonl"
    folder = SnapshotFolder(runs / name / ("averaged" if extra == "averaged" else "snapshots"))
    if kept.exists() or not points.exists():
        return
    begun, layers = time.monotonic(), int(name.split("-")[0])
    if extra == REPLAY:
        budget = max(4, round(BUDGET * len(folder.steps)))
        again = replay(folder, kit(layers, size, device).probe, run=runs / f"{name}-{REPLAY}", budget=budget)
        measured = Trajectory(sorted(again, key=lambda point: point.step))
    else:
        sampler, most = SAMPLERS[extra]
        sampler = size.sampler(sampler)
        if extra == "heads" or sampler.batch_size != size.sampler(SAMPLER).batch_size:
            measure: Callable[[Snapshot], Point] = plain_probe(layers, size, device, sampler, extra == "heads")
        else:
            measure = partial(measure_whole, kit(layers, size, device).probe, sampler=sampler)
        steps = late_steps(folder.steps, most) if most else folder.steps
        measured = Trajectory(measure(folder.load(step)) for step in steps)
    keep_points(measured, results, f"{EXPERIMENT}_{extra}", name)
    print(f"{name}, {extra}: {len(measured)} points in {time.monotonic() - begun:.1f} s", flush=True)


@cache
def plain_probe(layers: int, size: Size, device: str, sampler: Sampler, of_heads: bool) -> Probe:
    """What measures λ̂ alone, of the whole model or of each head too."""
    shape = replace(size.shape, layers=layers)
    return Probe(
        partial(LanguageModel, shape),
        language.loss,
        size.data,
        eval_batch=size.data.held_out(size.held_out),
        sampler=sampler,
        parts=heads(LanguageModel(shape)) if of_heads else None,
        threads=1,
        device=device,
        autocast=torch.bfloat16 if device.startswith("cuda") else None,
        compiled=device.startswith("cuda"),
    )
