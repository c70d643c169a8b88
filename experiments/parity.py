"""Sparse parity: the loss is flat while the network finds the relevant bits. Does λ̂ move before the loss does?

A perceptron learns the product of 3 of 50 bits (toy_tasks/sparse_parity.py), ten seeds of the weights and of the
batches. Loss and accuracy stay at chance while the share of the weights' movement that is on the relevant bits grows.

Claims: a type A transition of λ̂ goes with the fall of the loss in at least nine of ten seeds. Whether λ̂ starts to rise
before the loss falls, as the hidden progress does, is measured: the rate, and by how many steps.

Measured: ten of ten. Which of λ̂ and loss starts first can't be told in any; λ̂ has done half of its rise 39 steps
before the loss has (in the middle), and 148 after the hidden progress.

Costs about 90 seconds a seed on one CPU core. The settings were fixed on seed 100, by `pw.calibrate` and by
the verdicts, which are OK but for some of the flat stretch, where λ̂ is below 1 and little more than its error.

    python experiments/parity.py [--seeds 10] [--jobs 2] [--quick] [--wandb]
"""

from functools import partial

from campaign import Options, Run, measured, options
from jumps import beside, goes_with_largest, rates, without_small
from tables import keep_table, kinds, markdown, not_ok
from torch import Generator, nn

from phasewatch import Kind, Langevin, Probe, Trajectory, find_transitions, log_spaced
from phasewatch.monitor.trajectories.transitions import Trend
from phasewatch.toy_tasks import sparse_parity

EXPERIMENT = "parity"
DATA = sparse_parity.SparseParityData()
SAMPLER = Langevin(step_size=4.7e-4, localization=110, nbeta=100, chains=6, draws=150, burn_in=50, batch_size=256)
BEHAVIOURS: dict[str, Trend] = {"loss": "down", "accuracy": "up", "relevant_movement": "up"}


def make_probe(model: nn.Module, device: str, *, sampler: Langevin) -> Probe:
    """λ̂ and the hidden progress since the start of training."""
    return Probe(
        sparse_parity.ParityMLP,
        sparse_parity.loss,
        DATA,
        eval_batch=DATA(Generator().manual_seed(1), 4096),
        sampler=sampler,
        metrics=sparse_parity.metrics(DATA, model),
        threads=1,
        device=device,
    )


def runs(given: Options) -> list[Run]:
    """Each seed."""
    return [
        given.run(
            seed,
            make_model=sparse_parity.ParityMLP,
            training=partial(sparse_parity.training, data=DATA),
            make_probe=make_probe,
            sampler=SAMPLER,
            at=log_spaced(50, 6000, num=20, linear=60),
        )
        for seed in given.seeds
    ]


def row(name: str, trajectory: Trajectory) -> dict[str, object]:
    """What a run shows, as a row of the table."""
    found = find_transitions(trajectory)
    shown: dict[str, object] = {"run": name, "kinds": kinds(found), "without small ones": kinds(without_small(found))}
    for metric, trend in BEHAVIOURS.items():
        shown |= beside(trajectory, metric, trend)
    return shown | {"not OK": not_ok(trajectory)}


def has_type_a(trajectory: Trajectory) -> bool:
    """Whether a type A goes with the largest fall of the loss."""
    return goes_with_largest(trajectory, "loss", "down") is Kind.A


def main() -> None:
    """Train and measure what is missing, and print the tables."""
    given = options(__doc__, EXPERIMENT, seeds=10)
    found = measured(EXPERIMENT, runs(given), given)
    trajectories = list(found.values())
    learnt = sum(t[-1].metrics["accuracy"] > 0.95 for t in trajectories)
    lines = [
        f"Accuracy above 95 % in the end: {learnt} of {len(found)} seeds.",
        f"A type A goes with the fall of the loss: {sum(map(has_type_a, trajectories))} of {len(found)} seeds.",
        "",
        *markdown([rates(trajectories, metric, trend) for metric, trend in BEHAVIOURS.items()]),
        "",
        *markdown([row(name, trajectory) for name, trajectory in found.items()]),
    ]
    keep_table(given.results, EXPERIMENT, lines)


if __name__ == "__main__":
    main()
