"""What the monitor costs a training loop: inline, the probe's own time; in the background, next to nothing.

One training run in segments, each with one snapshot or none: plain, measured in the background, plain, measured inline,
and so on. A segment begins when nothing is being measured any more, so each is compared with the plain ones on both
sides of it, in the same minute. Claims: in the background the loop takes under 2 % longer than without a monitor, the
copying of the snapshots aside; inline the extra time is the probe's own. Costs about three minutes on two cores.

    python experiments/bench_overhead.py [--quick]
"""

import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from command_line import command_line

import phasewatch as pw
from phasewatch.toy_tasks.in_context_regression import RegressionData, RegressionTransformer, loss

MAKE_MODEL = partial(RegressionTransformer, width=32)
SAMPLER = pw.Langevin(step_size=3e-4, localization=100, nbeta=66.7, chains=4, draws=20, burn_in=10, batch_size=64)


class Training:
    """A plain training loop that goes on for a segment at a time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = MAKE_MODEL()
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self._data, self._generator = RegressionData(), torch.Generator().manual_seed(0)
        self.step = 0

    def segment(self, steps: int, monitor: pw.PhaseMonitor | None = None) -> float:
        """Train for some steps, and return the seconds that they took."""
        began = time.perf_counter()
        for _ in range(steps):
            self._optimizer.zero_grad()
            loss(self.model, self._data(self._generator, 128)).backward()
            self._optimizer.step()
            self.step += 1
            if monitor:
                monitor(self.step)
        return time.perf_counter() - began


def wait_for(monitor: pw.PhaseMonitor, points: int) -> None:
    """Sleep until so many points are measured."""
    while len(monitor.trajectory) < points:
        time.sleep(0.05)


def made() -> tuple[pw.Probe, str]:
    """A probe, and what its making costs: in passes of the loss, and in seconds beside those of a pass."""
    passes = 0

    def counted(model: Any, batch: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return loss(model, batch)

    pw.Probe(MAKE_MODEL, counted, RegressionData(), sampler=SAMPLER, threads=1)
    began = time.perf_counter()
    probe = pw.Probe(MAKE_MODEL, loss, RegressionData(), sampler=SAMPLER, threads=1)
    return probe, f"making the probe: {passes} passes of its loss, {time.perf_counter() - began:.2f} s"


def main() -> None:
    """Print a line for each round and the medians."""
    parser = command_line(__doc__, quick="one short round, to see that it runs")
    quick = parser.parse_args().quick
    steps, rounds = (20, 1) if quick else (300, 12)
    torch.set_num_threads(1)
    training = Training()
    probe, making = made()
    began = time.perf_counter()
    snapshots = [pw.Snapshot.of(training.model, step) for step in range(100)]
    copy = (time.perf_counter() - began) / len(snapshots)
    background, inline, own = [], [], 0.0
    with tempfile.TemporaryDirectory() as scratch:

        def monitor(measure: Literal["inline", "background"]) -> pw.PhaseMonitor:
            first = (1 if measure == "background" else 3) * steps + steps // 4
            due = {first + 4 * steps * round_ for round_ in range(rounds + 1)}
            return pw.PhaseMonitor(
                training.model, probe, run=Path(scratch) / measure, at=due.__contains__, measure=measure
            )

        with monitor("background") as beside, monitor("inline") as within:
            training.segment(steps)
            training.segment(steps, beside)  # starts the process
            wait_for(beside, 1)
            training.segment(2 * steps, within)
            before = training.segment(steps)
            for number in range(1, rounds + 1):
                seconds = training.segment(steps, beside)
                wait_for(beside, number + 1)
                between = training.segment(steps)
                inline_seconds = training.segment(steps, within)
                after = training.segment(steps)
                began = time.perf_counter()
                probe(pw.Snapshot.of(training.model, training.step))
                own = time.perf_counter() - began
                background.append((seconds - copy) / ((before + between) / 2))
                inline.append((inline_seconds - (between + after) / 2) / own)
                print(
                    f"round {number}: plain {before:.2f}, {between:.2f}, {after:.2f} s; background {seconds:.2f} s; "
                    f"inline {inline_seconds:.2f} s, the probe's own {own:.2f} s",
                    flush=True,
                )
                before = after
    print(making)
    print(f"copying a snapshot: {copy * 1e3:.2f} ms; measuring it: {own:.2f} s; a segment: {before:.2f} s")
    print(f"background / plain, without the copy: median {statistics.median(background):.3f}, all {listed(background)}")
    print(f"inline, extra time / the probe's own: median {statistics.median(inline):.3f}, all {listed(inline)}")


def listed(values: Iterable[float]) -> str:
    """The values in order, to three decimals."""
    return " ".join(f"{value:.3f}" for value in sorted(values))


if __name__ == "__main__":
    main()
