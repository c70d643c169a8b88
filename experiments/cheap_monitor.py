"""The published run watched for a tenth of its training's own compute: does the monitor see the same stages?

The snapshots are those of experiments/regression_stages.py, whose chains take many times the training's gradients, as
the published ones do (12 times). Here every fourth of them is measured, by 4 chains of 120 + 100 steps on minibatches
as large as training's, with a stronger localization, so that short chains settle.

Claims: gradients for all points, everything included, are below 10 % of training's; the stages found have the same
kinds in the same order as those of the full measurement, with boundaries within a factor 1.4.

Measured on seed 0: 9.4 % of training's gradients. The kinds are A A B A, the full measurement's with its two stages of
type B as one, and four of five stages go together. The top of λ̂ comes at step 23,711, not 46,003: with the stronger
localization λ̂ counts the collapse far more, falling from 160 to 37 and not from 174 to 129, and from its first signs.
So the kinds hold once neighbours are merged; the boundaries, up to a factor 1.94 apart, don't.

Costs a minute a seed on a GPU, and about an hour on a CPU core, given the snapshots.

    python experiments/cheap_monitor.py --device cuda [--seeds 2] [--quick]
"""

import math
from dataclasses import replace
from functools import partial

from campaign import Options, Run, keep_table, markdown, measured, options
from regression_stages import EXPERIMENT as FULL
from regression_stages import QUICK, STEPS, make_probe
from regression_stages import runs as full_runs

from phasewatch import SGLD, Trajectory, coincide, find_transitions
from phasewatch.callbacks.schedule import Steps
from phasewatch.monitor.chains import cost_of_a_point

EXPERIMENT = "cheap_monitor"
SAMPLER = SGLD(step_size=3e-4, localization=100, nbeta=66.7, chains=4, draws=100, burn_in=120, batch_size=256)
TRAINING_BATCH = 256


def runs(given: Options) -> list[Run]:
    """Every fourth snapshot of the published run, each seed."""
    sampler = QUICK if given.quick else SAMPLER
    return [
        replace(
            run,
            at=Steps(frozenset(sorted(run.at.steps)[:: 1 if given.quick else 4])),
            make_probe=partial(make_probe, sampler=sampler),
            trained_by=FULL,
        )
        for run in full_runs(given)
    ]


def share_of_training(run: Run) -> float:
    """Samples that go forward and backward for a run's points, over those of its training.

    A forward pass alone counts as a third.
    """
    probe = run.make_probe(run.initial_model(), "cpu")
    batch = probe.sampler.batch_size or 0
    a_point = cost_of_a_point(probe.sampler, probe.minibatches) * batch + len(probe.eval_batch[0]) / 3
    return len(run.at.steps) * a_point / (STEPS * TRAINING_BATCH)


def row(run: Run, cheap: Trajectory, full: Trajectory) -> dict[str, object]:
    """The stages that both find."""
    found, expected = find_transitions(cheap), find_transitions(full)
    kinds, wanted = (" ".join(t.kind.label for t in transitions) for transitions in (found, expected))
    both = coincide(expected, found)
    apart = [
        math.exp(abs(math.log(max(a, 1) / max(b, 1))))
        for pair in both.pairs
        for a, b in ((pair.first.end, pair.second.end), (pair.first.start, pair.second.start))
    ]
    return {
        "run": run.name,
        "points": len(cheap),
        "gradients / training's": share_of_training(run),
        "kinds, full": wanted,
        "kinds, cheap": kinds,
        "stages that go together": f"{len(both.pairs)} of {len(expected)}",
        "boundaries apart at most, factor": max(apart, default=math.nan),
        "steps, cheap": ", ".join(f"{t.start} to {t.end}" for t in found),
    }


def main() -> None:
    """Measure what is missing, and print the table."""
    given = options(__doc__, EXPERIMENT, seeds=2)
    wanted = runs(given)
    found = measured(EXPERIMENT, wanted, given)
    full = measured(FULL, full_runs(given), replace(given, runs=given.folder(FULL)))
    rows = [row(run, found[run.name], full[run.name]) for run in wanted]
    keep_table(given, EXPERIMENT, markdown(rows))


if __name__ == "__main__":
    main()
