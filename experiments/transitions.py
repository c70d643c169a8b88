"""How well transitions are found where they are known, beside the obvious alternatives; false alarms, doubt and speed.

Simulated trajectories come from tests/scenarios.py: one to five stages of random lengths, signs and sizes, plateaus,
slow-downs, correlated noise that differs along the curve, outliers. A stage counts as found when a transition of its
sign shares more than half of the shorter one's length in log steps with it, each with one at most. The alternatives
have two free numbers each, tuned for the best F1 on other trajectories of the same kind; `find_transitions` has its
defaults. Nothing was chosen on the seeds that are reported.

Jumps are all of a rise or fall of λ̂ over a few gaps between points, beside plateaus or slow drifts. Where a drift is
sure, it is found as a transition of its own; it counts among the others.

Scores on a grid are whole numbers, as of right answers to a few questions, with noise before they are rounded.

A false alarm is a trajectory with a transition that isn't there: any on a flat one; on a monotone one, any of the
wrong sign, or more than one.

experiments/results/transitions.md has the tables.

    python experiments/transitions.py [--quick] [--first-seed 50000]
"""

import itertools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ruptures
from command_line import command_line
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from stages import Stage, as_stages, log, matched, simulated

from phasewatch import Point, Trajectory, Transition, find_transitions
from phasewatch.monitor.estimates.estimate import Estimate, Health

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
import scenarios  # noqa: E402  # pyright: ignore[reportMissingImports] - the tests' folder is no package
from scenarios import Scenario  # noqa: E402  # pyright: ignore[reportMissingImports]

TUNING = 10_000
"""The first seed of the trajectories that the alternatives are tuned on."""

FRESH = 50_000
"""The first seed of the trajectories that all are judged on, which nothing was tuned on."""


Method = Callable[[Scenario], list[Stage]]


def points(scenario: Scenario) -> Trajectory:
    """A scenario as a trajectory."""
    chains = scenario.chains if scenario.chains is not None else [()] * len(scenario.steps)
    columns = zip(scenario.steps, scenario.loss, scenario.llc, chains, strict=True)
    return Trajectory(
        Point(int(s), float(y), Estimate(float(v), 1.0, tuple(map(float, c)), 1.0, 1.0, 100.0, Health.OK))
        for s, y, v, c in columns
    )


def ours(scenario: Scenario) -> list[Stage]:
    """`find_transitions` with its defaults."""
    return as_stages(find_transitions(points(scenario)))


def pelt(scenario: Scenario, penalty: float, least: float) -> list[Stage]:
    """Continuous straight pieces by PELT, on an even grid of log steps; pieces that change little are plateaus."""
    x, n = np.log(scenario.steps), len(scenario.steps)
    even = np.linspace(x[0], x[-1], n)
    y = np.interp(even, x, scenario.llc)
    noise = np.median(np.abs(np.diff(y, 2))) / 0.6745 / np.sqrt(6) + 1e-9
    cuts = ruptures.Pelt(model="clinear", min_size=3, jump=1).fit(y).predict(pen=penalty * noise**2 * np.log(n))
    marks = [0, *(c - 1 for c in cuts)]
    pieces = [(even[a], even[b], y[b] - y[a]) for a, b in itertools.pairwise(marks)]
    return [Stage(np.exp(a), np.exp(b), np.sign(c)) for a, b, c in pieces if abs(c) > least * noise]


def gaussian_process(scenario: Scenario, flat: float, least: float) -> list[Stage]:
    """Constant × RBF on log(step + 1); stages are where the derivative of the mean is not nearly zero."""
    x, y = np.log(scenario.steps + 1), scenario.llc
    kernel = ConstantKernel() * RBF(1.0, (0.05, 20)) + WhiteKernel(1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = GaussianProcessRegressor(kernel, normalize_y=True).fit(x[:, None], y)
    even = np.linspace(x[0], x[-1], 400)
    mean = np.asarray(fit.predict(even[:, None]))
    slope = np.gradient(mean, even) / float(np.ptp(mean))
    state = np.where(np.abs(slope) > flat, np.sign(slope), 0)
    return _runs(even, mean, state, least * float(np.ptp(mean)))


def moving_average(scenario: Scenario, width: float, least: float) -> list[Stage]:
    """Changes of the sign of a moving average's differences."""
    x, y, n = np.log(scenario.steps), scenario.llc, len(scenario.steps)
    half = max(int(width * n / 2), 1)
    mean = np.array([y[max(i - half, 0) : i + half + 1].mean() for i in range(n)])
    return _runs(x, mean, np.sign(np.gradient(mean)), least * float(np.ptp(mean)))


def _runs(x: np.ndarray, mean: np.ndarray, state: np.ndarray, least: float) -> list[Stage]:
    found, i = [], 0
    for sign, run in itertools.groupby(state):
        j = i + len(list(run)) - 1
        if sign and abs(mean[j] - mean[i]) > least:
            found.append(Stage(np.exp(x[i]), np.exp(x[j]), sign))
        i = j + 1
    return found


GRIDS = {
    "PELT, straight pieces": (pelt, (20, 60, 200, 600, 2000), (3, 6, 12, 24)),
    "Gaussian process, derivative": (gaussian_process, (0.03, 0.1, 0.2), (0.02, 0.05, 0.1)),
    "moving average, sign": (moving_average, (0.05, 0.1, 0.2), (0.05, 0.1, 0.2, 0.4)),
}


class Score(NamedTuple):
    """How well stages were found."""

    recall: float
    precision: float
    median_error: float
    late_error: float

    @property
    def f1(self) -> float:
        """Harmonic mean of recall and precision."""
        return 2 * self.recall * self.precision / max(self.recall + self.precision, 1e-9)


def score(method: Method, trials: Sequence[Scenario]) -> Score:
    """Recall, precision and the boundaries' errors in log steps: the median, and the 90 % quantile."""
    reported = right = there = 0
    errors: list[float] = []
    for scenario in trials:
        found = method(scenario)
        pairs = matched(found, simulated(scenario.stages))
        reported, right, there = reported + len(found), right + len(pairs), there + len(scenario.stages)
        for i, j in pairs:
            errors.append(abs(log(found[i].start) - log(scenario.stages[j].start)))
            errors.append(abs(log(found[i].end) - log(scenario.stages[j].end)))
    middle, late = np.quantile(errors, [0.5, 0.9]) if errors else (np.nan, np.nan)
    return Score(right / there, right / max(reported, 1), float(middle), float(late))


def tuned(name: str, trials: Sequence[Scenario]) -> tuple[Method, str]:
    """An alternative with the two numbers that did best on these trajectories."""
    method, *grid = GRIDS[name]
    best = max(itertools.product(*grid), key=lambda numbers: score(lambda s: method(s, *numbers), trials).f1)
    return (lambda s: method(s, *best)), f"{name} ({best[0]:g}, {best[1]:g})"


def table(trials: Sequence[Scenario], tuning: Sequence[Scenario]) -> None:
    """Recall and precision beside the alternatives."""
    print(f"\n## {len(trials)} simulated trajectories, {sum(len(s.stages) for s in trials)} stages\n")
    print("| method | recall | precision | F1 | boundary error, median | 90 % |\n|---|---|---|---|---|---|")
    methods = [(ours, "find_transitions"), *(tuned(name, tuning) for name in GRIDS)]
    for method, name in methods:
        s = score(method, trials)
        print(f"| {name} | {s.recall:.2f} | {s.precision:.2f} | {s.f1:.2f} | {s.median_error:.2f} | "
              f"{s.late_error:.2f} |", flush=True)  # fmt: skip


def doubt(trials: Sequence[Scenario], name: str) -> None:
    """Whether confidence, error and intervals mean what they say."""
    signs: list[tuple[float, bool]] = []
    changes, boundaries = [], []
    for scenario in trials:
        truth = dict(zip(scenario.steps.astype(int), scenario.truth, strict=True))
        transitions = find_transitions(points(scenario))
        for t in transitions:
            true_change = truth[t.end] - truth[t.start]
            signs.append((t.confidence, bool(np.sign(true_change) == np.sign(t.llc_change))))
            changes.append(abs(t.llc_change - true_change) <= 2 * t.changes["llc"].error)
        for i, j in matched(as_stages(transitions), simulated(scenario.stages)):
            stage, t = scenario.stages[j], transitions[i]
            for interval, at in [(t.start_interval, stage.start), (t.end_interval, stage.end)]:
                if interval is not None:
                    boundaries.append(interval[0] - 1 <= at <= interval[1] + 1)
    print(f"\n## Doubt, {len(trials)} trajectories, {name}\n")
    for low, high in [(0.95, 0.99), (0.99, 0.999), (0.999, 1.01)]:
        right = [ok for confidence, ok in signs if low <= confidence < high]
        if right:
            print(f"- confidence {low:g} to {min(high, 1):g}: {np.mean(right):.1%} of {len(right)} have the right sign")
    print(f"- all: {np.mean([ok for _, ok in signs]):.1%} of {len(signs)} have the right sign")
    print(f"- llc_change ± 2 · llc_error holds the true change between its own steps in {np.mean(changes):.1%}")
    print(f"- start and end intervals hold the simulated boundary in {np.mean(boundaries):.1%} of {len(boundaries)}")


def abrupt(first: int, each: int) -> None:
    """Whether intervals hold where a jump begins and ends, and whether its kind is right and nothing else is found."""
    print(f"\n## Jumps of λ̂, {each} of each number of points a row, half of them with 6 chains\n")
    print("| over gaps | of so many σ | start held | end held | interval, points | kind right | others a run |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    total: list[list[float]] = []
    for gaps, size in itertools.product((1, 2, 3, 5), (10, 30, 100)):
        rows = []
        for points_, seed in itertools.product((40, 60, 120, 200), range(first, first + each)):
            scenario = scenarios.jumping(seed, points_, size, gaps, chains=6 * (seed % 2))
            rows.append(_of_jump(scenario, find_transitions(points(scenario)), gaps))
        total += rows
        print(f"| {gaps} | {size} | {_shares(rows)}", flush=True)
    print(f"| all | | {_shares(total)}")


def _of_jump(scenario: Scenario, found: Sequence[Transition], gaps: int) -> list[float]:
    """Whether start and end are held, the points of both intervals, whether the kind is right, and how many others."""
    (stage,) = scenario.stages
    t = max(found, key=lambda t: abs(t.llc_change), default=None)
    if t is None:
        return [0.0, 0.0, np.nan, 0.0, 0.0]
    # A change at once may have happened anywhere in its gap
    starts, ends = [(stage.start, stage.end)] * 2 if gaps == 1 else [(side, side) for side in (stage.start, stage.end)]
    within = [
        low <= at[0] and at[1] <= high for (low, high), at in [(t.start_interval, starts), (t.end_interval, ends)]
    ]
    inside = [int(((scenario.steps >= low) & (scenario.steps <= high)).sum()) for low, high in
              (t.start_interval, t.end_interval)]  # fmt: skip
    return [*within, float(np.mean(inside)), t.kind.label == ("A" if stage.change > 0 else "B"), len(found) - 1.0]


def _shares(rows: Sequence[Sequence[float]]) -> str:
    start, end, _, kind, others = np.mean(rows, axis=0)
    width = np.nanmedian([row[2] for row in rows])
    return f"{start:.1%} | {end:.1%} | {width:.1f} | {kind:.1%} | {others:.2f} |"


def is_false_alarm(found: Sequence[Stage], scenario: Scenario) -> bool:
    """Whether more is found than is there, or something of another sign."""
    signs = [stage.sign for stage in simulated(scenario.stages)]
    return len(found) > len(signs) or any(stage.sign not in signs for stage in found)


def false_alarms(first: int, each: int) -> None:
    """Flat and monotone trajectories with a transition that isn't there."""
    print(f"\n## False alarms, {each} trajectories a cell\n")
    correlations = (0.0, 0.5, 0.8)
    for chains in (0, 6):
        print(f"\n{chains or 'no'} chains\n\n| | points |", " | ".join(f"correlation {c:g}" for c in correlations), "|")
        print("|---|---|---|---|---|")
        total = []
        for make, n in itertools.product((scenarios.flat, scenarios.monotone), (15, 40, 200)):
            cells = []
            for correlation in correlations:
                bad = []
                for seed in range(first, first + each):
                    scenario = make(seed, n, correlation, chains)
                    bad.append(is_false_alarm(ours(scenario), scenario))
                cells.append(f"{np.mean(bad):.1%}")
                total.extend(bad)
            print(f"| {make.__name__} | {n} |", " | ".join(cells), "|", flush=True)
        print(f"\nall: {np.mean(total):.1%} of {len(total)}")


def on_a_grid(first: int, each: int) -> None:
    """Scores of few values: false alarms in flat runs, and what is found of a rise over five values."""
    print(f"\n## Scores on a grid, {each} of 60 and of 200 points a row\n")
    print("| noise, in distances of the grid | flat, with a transition | rise by 5: found | others a run |\n"
          "|---|---|---|---|")  # fmt: skip
    for noise in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0):
        alarms, hits, others = [], [], []
        for n, seed in itertools.product((60, 200), range(first, first + each)):
            rng = np.random.default_rng(seed)
            steps = np.unique(np.geomspace(10, 100_000, n).round())
            shift, scatter = rng.uniform(-0.5, 0.5), rng.normal(size=len(steps))
            rise = 5 / (1 + (1000 / steps) ** 3)
            flat, rising = ((100 + shift + mean + noise * scatter).round() for mean in (0 * rise, rise))
            level = 10 + 0.3 * rng.normal(size=len(steps))
            alarms.append(bool(_of_score(steps, flat, level)))
            found = _of_score(steps, rising, level)
            hit = [t for t in found if t.start < 1000 < t.end and t.changes["score"].value > 0]
            hits.append(bool(hit))
            others.append(len(found) - len(hit))
        print(f"| {noise:g} | {np.mean(alarms):.1%} | {np.mean(hits):.1%} | {np.mean(others):.2f} |", flush=True)


def _of_score(steps: np.ndarray, score: np.ndarray, llc: np.ndarray) -> list[Transition]:
    trajectory = Trajectory.from_values(steps, loss=np.ones(len(steps)), llc=llc, metrics={"score": score})
    return find_transitions(trajectory, signal="score")


def speed() -> None:
    """Milliseconds a call."""
    print("\n## Speed\n")
    for n in (15, 40, 200, 1000):
        trajectory = points(scenarios.staged(3, n, chains=8))
        seconds = []
        for _ in range(7):
            began = time.perf_counter()
            find_transitions(trajectory)
            seconds.append(time.perf_counter() - began)
        print(
            f"- {n} points, 8 chains: {1e3 * min(seconds):.0f} ms at best, {1e3 * np.median(seconds):.0f} in the middle"
        )


def main() -> None:
    """Print the tables."""
    parser = command_line(__doc__, quick="few trajectories, to see that it runs")
    parser.add_argument("--first-seed", type=int, default=FRESH, help="the seeds of all trajectories go on from here")
    options = parser.parse_args()
    quick, first = options.quick, options.first_seed
    trials = [scenarios.staged(first + seed) for seed in range(12 if quick else 300)]
    speed()
    doubt(trials, "no chains")
    doubt([scenarios.staged(first + seed, chains=6) for seed in range(len(trials))], "6 chains")
    abrupt(first + 10_000, 1 if quick else 16)  # the search was looked at on the others' seeds
    on_a_grid(first, 2 if quick else 50)
    false_alarms(first, 4 if quick else 112)
    table(trials[:100], [scenarios.staged(TUNING + seed) for seed in range(6 if quick else 25)])


if __name__ == "__main__":
    main()
