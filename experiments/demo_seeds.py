"""How often the demonstration shows a type A and a type B transition, over seeds of model, data and probe.

Claims: A then B in every seed, and nothing else. Costs about two minutes a seed on two cores; a run that is there
already is not trained again.

    python experiments/demo_seeds.py [--seeds 5] [--runs runs/demo-seeds] [--quick]
"""

import argparse
from pathlib import Path

from phasewatch import Kind, Trajectory, find_transitions
from phasewatch.demo import STEPS, run_demo


def main() -> None:
    """Train the seeds that are missing, and print each one's transitions and the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--quick", action="store_true", help="one seed of 200 steps, to see that it runs")
    arguments = parser.parse_args()
    seeds, steps = (1, 200) if arguments.quick else (arguments.seeds, STEPS)
    found = {}
    for seed in range(seeds):
        run = arguments.runs / f"seed-{seed}-{steps}"
        if not (run / "report.html").exists():
            run_demo(run, seed=seed, steps=steps, wandb=False)
        found[seed] = find_transitions(Trajectory.read(run / "points.jsonl"))
    for seed, transitions in found.items():
        print(f"seed {seed}:", *transitions, sep="\n  ")
    for kind in (Kind.A, Kind.B):
        rate = sum(any(transition.kind is kind for transition in transitions) for transitions in found.values())
        print(f"type {kind.name} in {rate} of {seeds} seeds")
    in_order = sum([t.kind for t in merged(transitions)] == [Kind.A, Kind.B] for transitions in found.values())
    print(f"A then B, equal neighbours merged and nothing else, in {in_order} of {seeds} seeds")


def merged(transitions: list) -> list:
    """The transitions without those whose kind repeats the one before."""
    return [t for i, t in enumerate(transitions) if i == 0 or t.kind is not transitions[i - 1].kind]


if __name__ == "__main__":
    main()
