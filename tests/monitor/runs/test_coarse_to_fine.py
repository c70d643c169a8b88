import math

import numpy as np
import pytest
from tiny_run import a_snapshot, make_probe

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.runs.coarse_to_fine import ELSEWHERE, Aim, first_steps, is_enough, next_step
from phasewatch.monitor.runs.replay import replay
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.trajectories.changes import Change, Transition
from phasewatch.monitor.trajectories.kinds import Kind
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions


def transition(start_interval, end_interval, trend="up"):
    start, end = (round(math.sqrt(max(low, 1) * high)) for low, high in (start_interval, end_interval))
    changes = {"llc": Change(10.0, 50.0, 1.0, "up") if trend == "up" else Change(50.0, 30.0, 1.0, "down")}
    return Transition(
        Kind.of(loss="down", llc=trend), "llc", start, end, start_interval, end_interval, 0.999, False, changes
    )


def test_the_first_are_even_by_rank_and_hold_both_ends():
    steps = [*range(100), 10**6]
    first = first_steps(steps)
    assert len(first) == 18
    assert (first[0], first[-1]) == (0, 10**6)
    ranks = np.diff([steps.index(step) for step in first])
    assert ranks.max() - ranks.min() <= 1
    assert first_steps(range(7)) == list(range(7))
    assert first_steps(range(100), most=2) == [0, 99]


def test_without_transitions_the_middle_of_the_widest_gap_comes_next():
    assert next_step(range(1, 10), [], []) == 1
    assert next_step(range(10), [0], []) == 9
    assert next_step(range(10), [9], []) == 0
    assert next_step([2, 3, 4, 20, 30, 10**6, 10**7, 10**8], [1, 10, 10**9], []) == 10**6  # counted in snapshots
    assert next_step([5], [5], []) is None


@pytest.mark.parametrize("seed", range(5))
def test_gaps_are_halved_by_their_worth(seed):
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(100_000, 200, replace=False)).tolist()
    measured = set(rng.choice(steps, 40, replace=False).tolist())
    low, high = sorted(rng.choice(steps[20:-20], 2, replace=False).tolist())
    found = [transition((low, high), (high, high))]
    chosen = next_step(steps, measured, found)
    ranks = [steps.index(step) for step in sorted(measured)]

    def worth(rank):
        below, above = (
            max((r for r in ranks if r < rank), default=None),
            min((r for r in ranks if r > rank), default=None),
        )
        distance = min(abs(rank - r) for r in (below, above) if r is not None)
        first, last = steps[0 if below is None else below], steps[-1 if above is None else above]
        inside = low > min(measured) and high < max(measured) and low < last and high > first
        return distance * (1 if inside or last > found[-1].end else ELSEWHERE)

    worths = {step: worth(rank) for rank, step in enumerate(steps) if step not in measured}
    assert worths[chosen] == max(worths.values())


def test_a_boundary_stops_when_it_is_narrow_or_holds_no_snapshot():
    found = [transition((300, 500), (600, 700)), transition((700, 700), (790, 800), "down")]
    measured = [0, 100, 300, 500, 600, 700, 800]
    waiting = [50, 400, 620, 640, 660, 680]
    assert next_step(waiting, measured, found) in {640, 660}
    assert next_step(waiting, measured, found, Aim(within=1.2)) == 400
    assert next_step([50, 620, 640, 660, 680], measured, found) in {640, 660}
    assert next_step([50, 640], measured, found) == 640
    assert next_step([50, 640], measured, found, Aim(within=1.2)) == 640  # of two gaps alike, the later


def test_where_the_direction_changes_comes_before_where_it_slows_down():
    measured, waiting = [0, 100, 300, 500, 700, 800], [350, 400, 450, 550, 600, 650]
    inner = transition((300, 500), (500, 700))
    between = [transition((1, 50), (300, 500)), inner, transition((500, 700), (790, 800), "down")]
    assert next_step(waiting, measured, between) == 600
    between = [transition((1, 50), (300, 500), "down"), inner, transition((500, 700), (790, 800))]
    assert next_step(waiting, measured, between) == 400


def test_measuring_ends_when_nothing_is_left_to_find():
    steps = list(range(0, 1000, 10))
    found = [transition((300, 350), (700, 800))]
    every_third = steps[::3]
    assert not is_enough(steps, every_third, found, Aim(within=1.05))
    assert is_enough(steps, every_third, found, Aim(within=1.2))
    assert not is_enough(steps, steps[::5], found, Aim(within=1.2))  # too wide elsewhere
    assert is_enough(steps, steps, found, Aim())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, r"replay\(budget=1\) must be a whole number of at least 2"),
        ({"budget": 2.5}, r"replay\(budget=2.5\) must be a whole number"),
        ({"within": 1.0}, r"replay\(within=1.0\) must be a finite number above 1, such as 1.2"),
        ({"within": math.nan}, r"replay\(within=nan\) must be a finite number"),
    ],
)
def test_what_is_no_aim_is_refused(options, message):
    with pytest.raises(PhasewatchError, match=message):
        Aim(**options)


class Measured:
    """An executor that knows the points of a curve."""

    def __init__(self, failing=()):
        self.asked = []
        self.failing = failing

    def measure(self, steps):
        self.asked.append(list(steps))
        for step in self.asked[-1]:
            yield step, OSError("unreadable") if step in self.failing else a_curve(step)

    def close(self):
        pass


PLACES = ((1700, 2400), (3800, 4700), (5300, 6200), (7600, 8500))
"""Where `a_curve` starts and ends to rise and to fall."""


def a_curve(step):
    """λ̂ from 10 to 50 around step 3,000, then to 30 around step 7,000."""
    up, down = (1 / (1 + math.exp(-(step - middle) / 200)) for middle in (3000, 7000))
    rng = np.random.default_rng(step)
    chains = 10 + 40 * up - 20 * down + rng.normal(0, 0.1, 4)
    return Point(step, 3 - up, Estimate(chains.mean(), 0.1, tuple(chains), 20.0, 1.0, 100.0, Health.OK))


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = SnapshotFolder(tmp_path_factory.mktemp("series"))
    for step in range(0, 10_050, 50):
        folder.save(a_snapshot(step))
    return folder


def test_a_replay_measures_where_the_boundaries_are(series, capfd):
    executor = Measured()
    points = list(replay(series, make_probe(), on=lambda *_: executor, budget=40))
    assert len(points) == len({point.step for point in points}) == 40
    assert executor.asked[0] == first_steps(series.steps)
    assert [len(steps) for steps in executor.asked[1:]] == [1] * 22
    near = [any(low <= step <= high for low, high in PLACES) for (step,) in executor.asked[1:]]
    assert sum(near) >= 11  # of 22, where 7 would be by chance
    assert [t.kind for t in find_transitions(points)] == [Kind.A, Kind.B]
    told = capfd.readouterr().err
    assert "40 of 201 snapshots are measured." in told
    assert "A ends at step" in told


def test_a_replay_ends_before_its_budget_when_all_is_known(series):
    executor = Measured()
    few = len(list(replay(series, make_probe(), on=lambda *_: executor, budget=200, within=1.5)))
    assert 18 < few < 60
    assert few < len(list(replay(series, make_probe(), on=lambda *_: Measured(), budget=70, within=1.1)))


def test_the_budget_counts_what_is_measured_already_and_what_fails(series, tmp_path):
    run, failing = tmp_path / "run", set(series.steps[::7])
    told = []
    first = list(
        replay(series, make_probe(), on=lambda *_: Measured(failing), budget=20, run=run, on_error=told.append)
    )
    assert len(first) + len(told) == 20
    again = list(replay(series, make_probe(), on=lambda *_: Measured(), budget=30, run=run))
    assert len(again) == 30
    assert again[: len(first)] == sorted(first, key=lambda point: point.step) or set(first) < set(again)
    assert len(list(replay(series, make_probe(), on=lambda *_: Measured(), budget=10, run=run))) == 30


def test_an_interrupted_replay_goes_on_to_the_same_budget(series, tmp_path):
    whole = Trajectory(replay(series, make_probe(), on=lambda *_: Measured(), budget=32))
    run = tmp_path / "run"
    points = replay(series, make_probe(), on=lambda *_: Measured(), budget=32, run=run)
    for _ in range(25):
        next(points)
    points.close()
    resumed = Trajectory(replay(series, make_probe(), on=lambda *_: Measured(), budget=32, run=run))
    assert resumed.steps.tolist() == whole.steps.tolist()
