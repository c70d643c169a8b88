"""What the monitor costs a training loop: inline, the probe's own time; in the background, next to nothing.

Trains the same model plainly and with a monitor in turn, several times over in one run, and prints ratios. Claims: in
the background the loop takes under 2 % longer than without a monitor, the copying of the snapshots aside; inline the
extra time is the probe's own. Costs about four minutes on two cores.

    python experiments/bench_overhead.py [--quick]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import phasewatch as pw
from phasewatch.toy_tasks.in_context_regression import RegressionData, RegressionTransformer, loss

MAKE_MODEL = partial(RegressionTransformer, width=64)
SAMPLER = pw.SGLD(step_size=3e-4, localization=100, nbeta=66.7, chains=4, draws=10, burn_in=10, batch_size=64)


def train(steps: int, after_step: Callable[[torch.nn.Module], Callable[[int], object]]) -> float:
    """Train for some steps and return the seconds that the loop took, without what was set up before it."""
    torch.manual_seed(0)
    model = MAKE_MODEL()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    data, generator = RegressionData(), torch.Generator().manual_seed(0)
    call = after_step(model)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model, data(generator, 256)).backward()
        optimizer.step()
        call(step)
    return time.perf_counter() - began


def plain(steps: int) -> float:
    """The loop without a monitor."""
    return train(steps, lambda model: lambda step: None)


def copying(steps: int, every: int) -> float:
    """The seconds that the snapshots of one loop take to copy."""
    model = MAKE_MODEL()
    began = time.perf_counter()
    for step in range(steps // every):
        pw.Snapshot.of(model, step)
    return time.perf_counter() - began


def monitored(steps: int, every: int, measure: Literal["inline", "background"], folder: Path) -> tuple[float, float]:
    """The loop with a monitor: its seconds, and those that the same measurements take by themselves."""
    probe = pw.Probe(MAKE_MODEL, loss, RegressionData(), sampler=SAMPLER, threads=1)
    monitors = []

    def attach(model: torch.nn.Module) -> pw.PhaseMonitor:
        monitors.append(pw.PhaseMonitor(model, probe, run=folder, at=pw.every(every), measure=measure))
        return monitors[0]

    loop = train(steps, attach)
    monitors[0].close()
    began = time.perf_counter()
    if measure == "inline":
        list(pw.replay(folder, probe))
    return loop, time.perf_counter() - began


def main() -> None:
    """Print a line for each pair of loops and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short pair, to see that it runs")
    quick = parser.parse_args().quick
    steps, every, pairs = (60, 30, 1) if quick else (1200, 200, 5)
    torch.set_num_threads(1)
    background, inline = [], []
    copied = copying(steps, every)
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(pairs):
            before = plain(steps)
            loop, _ = monitored(steps, every, "background", Path(scratch) / f"background-{pair}")
            middle = plain(steps)
            inline_loop, probing = monitored(steps, every, "inline", Path(scratch) / f"inline-{pair}")
            after = plain(steps)
            background.append((loop - copied) / ((before + middle) / 2))
            inline.append((inline_loop - (middle + after) / 2) / probing)
            print(
                f"pair {pair + 1}: plain {before:.2f} s, {middle:.2f} s, {after:.2f} s; background {loop:.2f} s; "
                f"inline {inline_loop:.2f} s, of which the probe's own {probing:.2f} s"
            )
    print(f"copying the snapshots: {copied / (steps // every) * 1e3:.2f} ms each")
    print(
        f"background / plain, without the copies: median {statistics.median(background):.3f}, all {_listed(background)}"
    )
    print(f"inline: extra time / the probe's own:   median {statistics.median(inline):.3f}, all {_listed(inline)}")


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in sorted(values))


if __name__ == "__main__":
    main()
