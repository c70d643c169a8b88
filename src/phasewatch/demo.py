"""The demonstration: watch a transformer learn in-context linear regression, live."""

import os
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from phasewatch.callbacks.sinks.terminal import TerminalSink, print_transitions
from phasewatch.callbacks.sinks.wandb import WandbSink
from phasewatch.callbacks.trainers.loop import PhaseMonitor
from phasewatch.callbacks.trainers.schedule import log_spaced
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.sink import Sink
from phasewatch.monitor.sampling.settings import SGLD
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions
from phasewatch.toy_tasks.in_context_regression import (
    RegressionData,
    RegressionTransformer,
    loss,
    published_metrics,
    training,
)

STEPS = 7000
WIDTH = 32


def make_probe(seed: int = 0) -> Probe:
    """The demonstration's probe, for `phasewatch replay RUN --probe FILE.py:NAME` as well.

    Args:
        seed: of the minibatches and the noise.

    Returns:
        A probe on the published loss and scores.
    """
    data = RegressionData()
    return Probe(
        partial(RegressionTransformer, width=WIDTH),
        loss,
        data,
        sampler=SGLD(step_size=2e-4, localization=100, nbeta=66.7, chains=4, draws=60, burn_in=40, batch_size=64),
        metrics=published_metrics(data),
        seed=seed,
        threads=1,
    )


def run_demo(run: Path, *, seed: int = 0, steps: int = STEPS, wandb: bool = True) -> Trajectory:
    """Train the model with the monitor attached, measuring in the background.

    Args:
        run: a folder that doesn't exist yet.
        seed: of the model, its data and the probe.
        steps: of training.
        wandb: write an offline W&B run as well.

    Returns:
        What was measured.
    """
    os.environ.setdefault("WANDB_QUIET", "true")
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the other core measures
    data = RegressionData()
    model = RegressionTransformer(width=WIDTH)
    steps_taken = islice(training(model, data, seed=seed), steps)
    sinks: list[Sink] = [TerminalSink()]
    if wandb:
        sinks.append(WandbSink(own_run=True, project="phasewatch-demo", name=run.name, mode="offline"))
    at = log_spaced(10, steps, num=26, linear=14)
    with PhaseMonitor(model, make_probe(seed), run=run, at=at, sinks=sinks, measure="background") as monitor:
        for step in tqdm(steps_taken, desc="training", total=steps, disable=not sys.stderr.isatty()):
            monitor(step)
    trajectory = Trajectory.read(run / "points.jsonl")
    print_transitions(trajectory, find_transitions(trajectory))
    return trajectory
