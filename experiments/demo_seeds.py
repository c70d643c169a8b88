"""How often the demonstration shows a type A and a type B transition, over seeds of model, data and probe.

Claims: A then B in every seed, and nothing else. Costs about two minutes a seed on two cores; a run that is there
already is not trained again.

    python experiments/demo_seeds.py [--seeds 5] [--runs runs/demo-seeds] [--quick]
"""

from pathlib import Path

from command_line import command_line
from jumps import merged
from tables import kinds

from phasewatch import Kind, Trajectory, find_transitions
from phasewatch.demo import STEPS, run_demo


def main() -> None:
    """Train the seeds that are missing, and print each one's transitions and the rates."""
    parser = command_line(__doc__, quick="one seed of 200 steps, to see that it runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-seeds"))
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
    in_order = sum(kinds(merged(transitions)) == "A B" for transitions in found.values())
    print(f"A then B, equal neighbours merged and nothing else, in {in_order} of {seeds} seeds")


if __name__ == "__main__":
    main()
