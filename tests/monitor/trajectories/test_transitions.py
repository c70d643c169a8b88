from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from scenarios import flat, jumping, monotone, staged
from scipy.interpolate import PchipInterpolator

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.estimates.uncertainty import standard_error
from phasewatch.monitor.trajectories import evidence, smoothing, transitions
from phasewatch.monitor.trajectories.kinds import Kind
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions, is_same_transition

PUBLISHED = Path(__file__).parents[2] / "data" / "published"
MEASURED = Path(__file__).parents[3] / "experiments" / "results" / "points"


def point(step, loss, llc, per_chain=(), health=Health.OK):
    estimate = Estimate(float(llc), 1.0, tuple(map(float, per_chain)), 66.7, 1.0, 400.0, health)
    return Point(int(step), float(loss), estimate)


def published(seed):
    return Trajectory.read(PUBLISHED / f"lr_seed{seed}.csv")


def kinds(transitions):
    return "".join(t.kind.name[0] for t in transitions)


def merged(transitions):
    return "".join(kind for kind, _ in groupby(kinds(transitions)))


def short_run(seed, shared=0.9):
    """The smaller regression run of 7,000 steps: λ̂ to 142 by step 1k, flat to 2.3k, then down; 4 chains.

    Each point has a standard error of 0.5 to 2, of which the variance is shared between neighbours but for a rest.
    """
    rng = np.random.default_rng(seed)
    steps = np.unique(np.append(0, np.geomspace(1, 7000, rng.integers(30, 46)).round())).astype(int)
    x = np.log(np.maximum(steps, 0.5))
    known = np.log([0.5, 1, 20, 74, 175, 415, 1000, 2300, 3300, 5000, 6700, 7000])
    llc = PchipInterpolator(known, [-4, -4, 10, 50, 107, 133, 142.5, 142.5, 137, 131, 124, 123])(x)
    loss = np.interp(x, known, [4.27, 4.25, 4.04, 3.44, 2.60, 2.21, 2.05, 1.95, 1.94, 1.90, 1.90, 1.90])
    loss += rng.normal(0, 0.008, len(x))
    spread = 2 * rng.uniform(0.5, 2)
    wander = np.linalg.cholesky(np.exp(-np.abs(x[:, None] - x) / 3)) @ rng.normal(size=(len(x), 4))
    fresh = rng.normal(size=(len(x), 4))
    chains = llc[:, None] + spread * (np.sqrt(shared) * wander + np.sqrt(1 - shared) * fresh)
    return [point(s, y, c.mean(), c) for s, y, c in zip(steps, loss, chains, strict=True)]


def noise_only(seed, n, chains):
    rng = np.random.default_rng([seed, n])
    steps = np.unique(np.geomspace(1, 1e5, 4 * n).round())[-n:] if seed % 2 else np.arange(n) * 100
    llc = 50 + rng.normal(size=(n, max(chains, 1)))
    loss = 2 + 0.01 * rng.normal(size=n)
    return [point(s, y, c.mean(), c if chains else ()) for s, y, c in zip(steps, loss, llc, strict=True)]


def run(steps, loss, llc):
    return [point(*values) for values in zip(steps, loss, llc, strict=True)]


def rise_and_fall(loss_rise=-1.0, loss_fall=0.0, n=60):
    """λ̂ from 10 to 90 around step 30, and to 60 around step 3,000."""
    steps = np.geomspace(1, 1e5, n).round().astype(int) + np.arange(n)
    x = np.log(steps)
    up, down = 1 / (1 + np.exp(-3 * (x - np.log(30)))), 1 / (1 + np.exp(-3 * (x - np.log(3000))))
    rng = np.random.default_rng(0)
    llc = 10 + 80 * up - 30 * down + rng.normal(0, 0.3, n)
    loss = 3 + loss_rise * up + loss_fall * down + rng.normal(0, 0.01, n)
    return run(steps, loss, llc)


def test_the_published_stages_of_seed_1():
    transitions = find_transitions(published(1))
    assert kinds(transitions) == "AABBA"
    first, main, collapse, deeper, last = transitions
    for boundary, at in [(first.end, 1_000), (main.start, 1_000), (collapse.end, 126_000), (deeper.end, 320_000)]:
        assert at / 1.4 < boundary < at * 1.4
    assert 25_000 < main.end <= collapse.start <= 60_000
    for t, llc in zip(transitions[:4], [21.4, 149, -12.3, -44.1], strict=True):
        assert t.llc_change == pytest.approx(llc, rel=0.1)
    assert abs(last.llc_change - 3.56) < 2 * last.change.error < 3
    assert collapse.loss_change < 0
    assert all(t.confidence > 0.99 for t in transitions)
    assert [t.provisional for t in transitions] == [False] * 4 + [True]
    assert last.end <= 499_999


def test_the_published_stages_of_seed_0():
    transitions = find_transitions(published(0))
    assert merged(transitions) == "ABA"
    (slow,) = [t.end for t in transitions if t.kind is Kind.A and t.end < 10_000]
    assert 1_000 / 1.6 < slow < 1_600
    top = next(i for i, t in enumerate(transitions) if t.kind is Kind.B)
    assert 20_000 < transitions[top - 1].end <= transitions[top].start < 65_000
    assert 330_000 < transitions[-1].start < 385_000


@pytest.mark.parametrize("seed", range(4))
def test_the_published_stages_in_a_run_of_our_own(seed):
    transitions = find_transitions(Trajectory.read(MEASURED / "regression_stages" / f"seed-{seed}.jsonl"))
    assert kinds(transitions) == "AABBA"
    slow, main, collapse, deeper, last = transitions
    assert 1_000 / 1.8 < slow.end < 1_000 * 1.8
    assert 25_000 < main.end <= collapse.start <= 60_000
    assert 126_000 / 1.4 < collapse.end < 126_000 * 1.4
    assert 338_000 / 1.1 < last.start < 374_000 * 1.1
    assert 7 / 1.2 < slow.llc_change < 20 * 1.2
    assert main.llc_change == pytest.approx(149, rel=0.1)
    assert collapse.llc_change == pytest.approx(-12, rel=0.2)
    assert -45 * 1.2 < deeper.llc_change < -35 / 2


def test_the_published_fall_on_average_over_runs_of_our_own():
    falls = []
    for seed in range(4):
        found = find_transitions(Trajectory.read(MEASURED / "regression_stages" / f"seed-{seed}.jsonl"))
        falls.append(sum(t.llc_change for t in found if t.kind is Kind.B))
    assert np.mean(falls) == pytest.approx(-50, rel=0.2)


@pytest.mark.parametrize("seed", range(10))
def test_a_large_type_a_comes_with_induction_heads_alone(seed):
    two, one = (Trajectory.read(MEASURED / "induction_bump" / f"{n}-layers-seed-{seed}.jsonl") for n in (2, 1))
    formed = two.steps[np.argmax(two.signal("prefix_matching") > 0.3)]
    (bump,) = [t for t in find_transitions(two) if t.start < formed < t.end]
    assert bump.kind is Kind.A
    assert 70 < bump.llc_change < 110
    assert all(t.start < 200 or t.llc_change < 20 for t in find_transitions(one))


@pytest.mark.parametrize("seed", [0, 1])
def test_most_chains_have_the_published_kinds_alone(seed):
    trajectory = published(seed)
    alone = [
        merged(find_transitions([point(p.step, p.loss, p.llc.per_chain[c]) for p in trajectory])) for c in range(10)
    ]
    assert alone.count("ABA") >= 6
    assert set(alone) <= {"ABA", "AB"}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_kinds_from_25_of_the_published_points(seed):
    trajectory = published(seed)
    kept = np.linspace(0, len(trajectory) - 1, 25).round().astype(int)
    assert merged(find_transitions([trajectory[int(i)] for i in kept])) == "ABA"
    for offset in range(8):  # where the last rise, of 4, has two or three points it may go
        assert merged(find_transitions(trajectory[offset::8])) in {"ABA", "AB"}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_kinds_without_a_fifth_of_the_points(seed):
    trajectory, found = published(seed), []
    for trial in range(10):
        kept = np.random.default_rng(trial).random(len(trajectory)) < 0.8
        found.append(merged(find_transitions(Trajectory(p for p, keep in zip(trajectory, kept, strict=True) if keep))))
    assert found.count("ABA") >= 9
    assert set(found) <= {"ABA", "AB"}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_kinds_with_more_noise(seed):
    trajectory = published(seed)
    found = []
    for trial in range(20):
        noise = np.random.default_rng(trial).normal(0, 0.8, len(trajectory))
        noisy = [
            point(p.step, p.loss, p.llc.value + e, np.add(p.llc.per_chain, e))
            for p, e in zip(trajectory, noise, strict=True)
        ]
        found.append(merged(find_transitions(noisy)))
    assert found.count("ABA") >= 19


@pytest.mark.parametrize("shared", [0.8, 0.95])
def test_short_runs_have_one_rise_and_one_fall(shared):
    good = 0
    for seed in range(100):
        transitions = find_transitions(short_run(seed, shared))
        if kinds(transitions) == "AB":
            a, b = transitions
            good += 500 <= a.end <= 2_500 and 900 <= b.start <= 3_400 and b.end > 5_000
    assert good >= 95


@pytest.mark.parametrize("n", [15, 40, 200])
@pytest.mark.parametrize("chains", [0, 4])
def test_noise_alone_seldom_has_transitions(n, chains):
    trials = 200 if n < 200 else 60
    assert sum(bool(find_transitions(noise_only(seed, n, chains))) for seed in range(trials)) <= trials // 20


def of_score(score):
    steps = np.unique(np.geomspace(10, 100_000, len(score)).round())
    level = 10 + 0.3 * np.random.default_rng(0).normal(size=len(steps))
    trajectory = Trajectory.from_values(steps, loss=np.ones(len(steps)), llc=level, metrics={"score": score})
    return find_transitions(trajectory, signal="score")


@pytest.mark.parametrize("noise", [0.1, 0.2, 0.3])
def test_a_flat_score_of_few_values_seldom_has_transitions(noise):
    """While its noise was judged by quiet stretches alone, up to a third of such runs had one."""
    drawn = [np.random.default_rng(seed) for seed in range(20)]
    scores = [(rng.uniform(7, 8) + noise * rng.normal(size=60)).round() / 20 for rng in drawn]
    assert sum(bool(of_score(score)) for score in scores) <= 1


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_a_rise_of_a_score_of_few_values_is_one(noise):
    rise = 5 / (1 + np.geomspace(100, 0.01, 60) ** 3)
    for seed in range(5):
        (found,) = of_score((7.3 + rise + noise * np.random.default_rng(seed).normal(size=60)).round() / 20)
        assert found.start < 1000 < found.end
        assert found.changes["score"].value == pytest.approx(0.25, abs=0.06)


def test_a_score_that_changes_at_once_does_so_between_two_points():
    (found,) = of_score(np.repeat([0.0, 1.0], 30))
    steps = np.geomspace(10, 100_000, 60).round()
    assert (found.start, found.end) == (steps[29], steps[30])


def test_stairs_of_a_count_are_a_transition_each():
    found = of_score(np.repeat([0.0, 1.0, 2.0], 20))
    steps = np.geomspace(10, 100_000, 60).round()
    assert [(t.start, t.end) for t in found] == [(steps[19], steps[20]), (steps[39], steps[40])]


def test_a_score_that_hesitates_changes_all_the_same():
    (found,) = of_score(np.array([0.0] * 30 + [1, 0, 1] + [1] * 30))
    assert found.changes["score"].value == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("level", [0.0, 7.1, -1e9 / 3])
def test_a_constant_has_none(level):
    assert find_transitions(run(range(30), np.full(30, 2.1), np.full(30, level))) == []


def test_fewer_than_five_usable_points_have_none():
    points = run([1, 10, 100, 1000, 10_000], [5, 4, 3, 2, 1], [0, 10, 20, 30, 40])
    assert kinds(find_transitions(points)) == "A"
    assert find_transitions(points[:4]) == []
    assert find_transitions([]) == []
    for bad in (
        replace(points[2], llc=replace(points[2].llc, health=Health.DIVERGED)),
        replace(points[2], llc=replace(points[2].llc, value=np.nan)),
        replace(points[2], loss=np.inf),
    ):
        assert find_transitions([*points[:2], bad, *points[3:]]) == []


def test_failed_points_are_left_out():
    points = rise_and_fall()
    broken = [point(p.step + 1, 9.0, 1e9, health=Health.DIVERGED) for p in points[5::7]]
    assert find_transitions([*points, *broken]) == find_transitions(points)


@pytest.mark.parametrize(
    ("loss_rise", "loss_fall", "expected", "trends"),
    [
        (-1.0, 0.0, "AB", ["down", "flat"]),
        (-1.0, -0.8, "AB", ["down", "down"]),
        (-1.0, 0.5, "AO", ["down", "up"]),
        (0.0, -0.5, "OB", ["flat", "down"]),
        (0.5, -0.5, "OB", ["up", "down"]),
    ],
)
def test_kinds_follow_from_the_signs(loss_rise, loss_fall, expected, trends):
    transitions = find_transitions(rise_and_fall(loss_rise, loss_fall))
    assert kinds(transitions) == expected
    assert [t.changes["loss"].trend for t in transitions] == trends
    assert [t.changes["llc"].trend for t in transitions] == ["up", "down"]


def test_the_plateau_belongs_to_neither():
    rise, fall = find_transitions(rise_and_fall())
    assert rise.start < 20 < 45 < rise.end < 350
    assert 300 < fall.start < 2_000
    assert 4_500 < fall.end < 40_000
    assert 0.95 * 80 - 2 < rise.llc_change < 82  # the first stage starts when up to 5 % of it are done
    assert fall.llc_change == pytest.approx(-30, abs=2)


@pytest.mark.parametrize(("least", "expected"), [(0.45, "A"), (0.0, "AB")])
def test_changes_below_the_least_effect_are_dropped(monkeypatch, least, expected):
    monkeypatch.setattr(transitions, "MIN_EFFECT", least)
    monkeypatch.setattr(transitions, "_LOOKS", {})
    assert kinds(find_transitions(rise_and_fall())) == expected


def test_units_change_nothing():
    trajectory = published(1)
    expected = find_transitions(trajectory)
    for loss, llc, steps in [(1e3, 1, 1), (1, 1e-6, 1), (1, 1, 512), (1e-4, 30, 7)]:
        scaled = [
            point(p.step * steps, p.loss * loss, p.llc.value * llc, np.multiply(p.llc.per_chain, llc))
            for p in trajectory
        ]
        found = find_transitions(scaled)
        assert kinds(found) == kinds(expected)
        for a, b in zip(found, expected, strict=True):
            assert (a.start, a.end, a.provisional) == (b.start * steps, b.end * steps, b.provisional)
            for name, unit in (("loss", loss), ("llc", llc)):
                change, expected_change = a.changes[name], b.changes[name]
                assert change.after == pytest.approx(expected_change.after * unit)
                assert change.value == pytest.approx(expected_change.value * unit)
                assert change.error == pytest.approx(expected_change.error * unit)
                assert change.trend == expected_change.trend
            assert a.confidence == pytest.approx(b.confidence)


def test_order_does_not_matter_and_the_input_is_left_alone():
    points = short_run(3)
    before = repr(points)
    assert find_transitions(points[::-1]) == find_transitions(Trajectory(points)) == find_transitions(iter(points))
    assert repr(points) == before


def test_the_error_is_that_of_the_curve_and_that_of_paired_differences_together():
    """Chains that lie 20 apart, but move together to within 1, know their difference to within 1."""
    rng = np.random.default_rng(0)
    apart, moved = rng.normal(0, 20, 8), rng.normal(0, 1, 8)
    plain = [p.llc.value for p in rise_and_fall()]
    risen = (np.array(plain) - plain[0]) / (plain[30] - plain[0])
    errors = []
    for of_chains in (0 * moved, moved):
        points = [
            replace(p, llc=replace(p.llc, per_chain=tuple(p.llc.value + apart + of_chains * r)))
            for p, r in zip(rise_and_fall(), risen, strict=True)
        ]
        errors.append(find_transitions(points)[0].change.error)
    of_the_curve, both = errors
    assert 0.2 < of_the_curve < 0.6  # two ends with a noise of 0.3, of which neighbours share an unknown part
    assert both == pytest.approx(np.hypot(of_the_curve, standard_error(moved)), rel=0.05)


def test_the_cautious_curve_has_a_say_in_what_is_sure(monkeypatch):
    assert kinds(find_transitions(rise_and_fall())) == "AB"
    all_noise = smoothing.ALONE._replace(signs=smoothing.Slack(np.inf, np.inf))  # a straight line, which rises
    monkeypatch.setattr(evidence, "ALONE", all_noise)
    assert "B" not in kinds(find_transitions(rise_and_fall()[:-1]))


def test_chains_that_disagree_about_a_change_veto_it():
    points = rise_and_fall()
    scatter = np.array([-1.0, 1.0, -0.5, 0.5])
    torn = [
        replace(p, llc=replace(p.llc, per_chain=tuple(p.llc.value + 200 * i * scatter))) for i, p in enumerate(points)
    ]
    assert find_transitions(torn) == []


@pytest.mark.slow
def test_what_is_confirmed_stays_whatever_follows():
    confirmed = 0
    trajectories = [published(0), published(1), published(1)[::8], *(Trajectory(short_run(seed)) for seed in range(5))]
    for points in [*trajectories, *(Trajectory(of(staged(seed, 60))) for seed in range(16))]:
        standing = []
        for n in range(5, len(points) + 1, 1 if len(points) < 100 else 4):
            found = find_transitions(points[:n])
            for old in standing:
                assert any(
                    t.change.trend == old.change.trend and t.start < old.end and old.start < t.end for t in found
                ), old
                again = [
                    t for t in found if t.change.trend == old.change.trend and t.start < old.end and old.start < t.end
                ]
                assert not all(t.provisional for t in again)
            standing += [t for t in found if not t.provisional]
        confirmed += bool(standing)
    assert confirmed > 15


def test_what_was_asked_before_changes_no_answer():
    points = published(1)
    before = find_transitions(points)
    for n in range(20, 190, 7):
        find_transitions(points[:n])
        find_transitions(points[:n], signal="loss")
    assert find_transitions(points) == before
    transitions._LOOKS.clear()
    assert find_transitions(points) == before


def test_a_transition_in_progress_is_provisional():
    points = rise_and_fall()
    middle = [p.step for p in points].index(next(p.step for p in points if p.step > 40))
    (growing,) = find_transitions(points[:middle])
    assert growing.provisional
    assert not find_transitions(points)[0].provisional


def test_asking_after_every_point_costs_one_fit_of_each_curve(monkeypatch):
    rng = np.random.default_rng(0)
    steps = np.unique(np.geomspace(1, 1e6, 1400).round())[-1000:]
    llc = 60 * np.sin(np.log(steps) / 2)
    points = Trajectory(
        point(s, 4 - np.log(s) / 5 + 0.01 * rng.normal(), c, c + rng.normal(size=8))
        for s, c in zip(steps, llc + rng.normal(size=1000), strict=True)
    )
    fits, fitted = [], smoothing._fitted
    monkeypatch.setattr(smoothing, "_fitted", lambda *given: fits.append(given) or fitted(*given))
    find_transitions(points[:985])
    for n in (990, 1000):
        fits.clear()
        assert len(find_transitions(points[:n])) >= 2
        assert len(fits) == 2  # λ̂ and the loss, of which neither look at fewer points is taken again


def test_doubtful_points_are_counted_between_start_and_end():
    points = rise_and_fall()
    rise, fall = find_transitions(points)
    inside = [i for i, p in enumerate(points) if rise.start <= p.step <= rise.end]
    assert (rise.points, rise.doubtful) == (len(inside), 0)
    doubtful = [*inside[:2], inside[-1]]
    marked = [
        replace(p, llc=replace(p.llc, health=Health.CREEPING)) if i in doubtful or i == len(points) - 1 else p
        for i, p in enumerate(points)
    ]
    again, after = find_transitions(marked)
    assert (again.points, again.doubtful) == (len(inside), 3)
    assert str(again) == f"{rise} 3 of {len(inside)} points doubtful"
    assert f"doubtful estimates, which are at 3 of the {len(inside)} points in between." in again.sentence()
    assert replace(after, points=fall.points, doubtful=0) == fall


def test_points_without_an_estimate_are_not_counted_as_doubtful():
    points = [
        replace(p, llc=replace(p.llc, value=np.nan, health=Health.DIVERGED), metrics={"score": p.llc.value})
        for p in rise_and_fall()
    ]
    for transition in find_transitions(points, signal="score"):
        assert (transition.points, transition.doubtful) == (0, 0)
        assert list(transition.changes) == ["score", "loss"]
        assert np.isnan(transition.llc_change)
        assert transition.kind is Kind.OTHER


@pytest.mark.parametrize(
    ("start", "end", "kind", "signal", "same"),
    [
        (100, 200, Kind.A, "llc", True),
        (149, 1000, Kind.A, "llc", True),
        (150, 1000, Kind.A, "llc", False),  # exactly half of the shorter one
        (110, 120, Kind.A, "llc", True),
        (100, 200, Kind.B, "llc", False),
        (100, 200, Kind.A, "loss", False),
        (300, 400, Kind.A, "llc", False),
    ],
)
def test_the_same_transition_has_its_kind_and_most_of_its_steps(start, end, kind, signal, same):
    known = replace(find_transitions(rise_and_fall())[0], start=100, end=200)
    other = replace(known, start=start, end=end, kind=kind, signal=signal)
    assert is_same_transition(known, other) is same
    assert is_same_transition(other, known) is same


def test_the_stages_of_a_metric_are_those_of_its_own_values():
    points = rise_and_fall()
    scored = [replace(p, metrics={"score": -p.llc.value}) for p in points]
    found, mirrored = find_transitions(points), find_transitions(scored, signal="score")
    assert [(t.start, t.end, t.kind) for t in mirrored] == [(t.start, t.end, t.kind) for t in found]
    assert [t.change.trend for t in mirrored] == ["down", "up"]
    assert [t.changes["llc"].trend for t in mirrored] == ["up", "down"]
    assert [t.signal for t in mirrored] == ["score", "score"]
    for t, u in zip(found, mirrored, strict=True):
        assert u.change.value == pytest.approx(-t.change.value)
        assert u.start_interval[0] <= u.start <= u.start_interval[1]
        assert u.end_interval[0] <= u.end <= u.end_interval[1]


def of(scenario):
    chains = scenario.chains if scenario.chains is not None else [()] * len(scenario.steps)
    return [point(*values) for values in zip(scenario.steps, scenario.loss, scenario.llc, chains, strict=True)]


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("n", [15, 40])
@pytest.mark.parametrize("make", [flat, monotone])
def test_false_alarms_are_few(make, n, correlation):
    wrong = 0
    for seed in range(60):
        scenario = make(seed, n, correlation)
        ups, found = [s.change > 0 for s in scenario.stages], find_transitions(of(scenario))
        wrong += len(found) > len(ups) or any((t.llc_change > 0) not in ups for t in found)
    assert wrong <= 3


def test_signs_are_right_as_often_as_they_are_sure():
    right = []
    for seed in range(40):
        scenario = staged(seed)
        truth = dict(zip(scenario.steps.astype(int), scenario.truth, strict=True))
        right += [(truth[t.end] - truth[t.start]) * t.llc_change > 0 for t in find_transitions(of(scenario))]
    assert len(right) > 60
    assert np.mean(right) >= 0.95


@pytest.mark.parametrize("seed", [0, 1])
def test_a_stray_chain_neither_invents_nor_hides_a_stage(seed):
    trajectory = published(seed)
    for jump in (60, -60):
        for first, last in [(40, 70), (100, 130), (90, 190)]:
            strayed = []
            for i, p in enumerate(trajectory):
                chains = np.array(p.llc.per_chain)
                chains[3] += jump if first <= i < last else 0
                strayed.append(point(p.step, p.loss, chains.mean(), chains))
            assert merged(find_transitions(strayed)) == "ABA"


@pytest.mark.parametrize("seed", [0, 1])
def test_outliers_seldom_invent_or_hide_a_stage(seed):
    trajectory, found = published(seed), []
    for trial in range(12):
        rng = np.random.default_rng(trial)
        off = np.zeros(len(trajectory))
        off[rng.choice(len(trajectory), 6, replace=False)] = rng.choice([-15, 15], 6)
        points = [
            point(p.step, p.loss, p.llc.value + o, np.add(p.llc.per_chain, o))
            for p, o in zip(trajectory, off, strict=True)
        ]
        found.append(merged(find_transitions(points)))
    assert found.count("ABA") >= 10
    assert set(found) <= {"ABA", "AB"}


def test_a_point_measured_again_changes_nothing():
    points = rise_and_fall()
    assert find_transitions([*points, *points[10:20]]) == find_transitions(points)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_table_of_step_loss_and_llc_is_enough(seed):
    assert merged(find_transitions([point(p.step, p.loss, p.llc.value) for p in published(seed)])) == "ABA"


def test_the_stages_of_a_metric():
    steps = np.unique(np.geomspace(1, 1e5, 60).round())
    x, rng = np.log(steps), np.random.default_rng(0)
    up, down = 1 / (1 + np.exp(-3 * (x - 5))), 1 / (1 + np.exp(-3 * (x - 9)))
    points = [
        replace(point(s, y, v), metrics={"score": m})
        for s, y, v, m in zip(steps, 3 - up, 50 * up - 20 * down, 0.8 * down + rng.normal(0, 0.02, len(x)), strict=True)
    ]
    points[20] = replace(points[20], metrics={})
    points[40] = replace(points[40], metrics={"score": np.nan})
    (rise,) = find_transitions(points, signal="score")
    assert (rise.signal, rise.change.trend, rise.changes["llc"].trend, rise.kind) == ("score", "up", "down", Kind.B)
    assert rise.start < np.exp(9) < rise.end
    assert rise.change.value == pytest.approx(0.8, abs=0.05)
    assert abs(rise.change.value - 0.8) < 2 * rise.change.error < 0.1
    assert "score 0.0" in str(rise)
    assert "score's change" in rise.sentence()
    (fall,) = find_transitions(points, signal="loss")
    assert (fall.signal, fall.change.trend, fall.kind) == ("loss", "down", Kind.A)
    assert fall.loss_change == fall.change.value < 0
    with pytest.raises(PhasewatchError, match=r"\('acc'\): no point has it; the points have llc, loss, score"):
        find_transitions(points, signal="acc")


def test_intervals_hold_the_boundaries():
    inside = []
    for seed in range(30):
        scenario = monotone(seed, 60)
        (stage,) = scenario.stages
        for t in find_transitions(of(scenario)):
            assert t.start_interval[0] <= t.start <= t.start_interval[1]
            assert t.end_interval[0] <= t.end <= t.end_interval[1]
            inside += [t.start_interval[0] <= stage.start <= t.start_interval[1]]
            inside += [t.end_interval[0] <= stage.end <= t.end_interval[1]]
    assert np.mean(inside) > 0.75


@pytest.mark.parametrize("gaps", [1, 2, 3, 5])
def test_intervals_hold_where_a_jump_begins_and_ends(gaps):
    starts, ends, right, more = [], [], [], 0
    for seed in range(24):
        scenario = jumping(seed, (40, 60, 120)[seed % 3], (10, 30, 100)[seed // 3 % 3], gaps, chains=4 * (seed % 2))
        (stage,) = scenario.stages
        found = find_transitions(of(scenario))
        t = max(found, key=lambda t: abs(t.llc_change), default=None)
        right.append(t is not None and kinds([t]) == ("A" if stage.change > 0 else "B"))
        # All of the gap: a change at once may have happened anywhere in it.
        between = (stage.start, stage.end) if gaps == 1 else None
        for sides, interval, at in (
            (starts, t.start_interval if t else (0, 0), between or (stage.start, stage.start)),
            (ends, t.end_interval if t else (0, 0), between or (stage.end, stage.end)),
        ):
            sides.append(interval[0] <= at[0] and at[1] <= interval[1])
        more += sum(abs(u.llc_change) > 5 for u in found if u is not t)  # a drift is at most 3
    assert np.mean(starts) >= 0.9
    assert np.mean(ends) >= 0.9
    assert np.mean(right) >= 0.95
    assert more == 0


@pytest.mark.parametrize("gaps", [1, 3])
@pytest.mark.parametrize("larger", [30, 100, 300])
def test_a_jump_is_found_beside_a_larger_one(larger, gaps):
    rng, i = np.random.default_rng(1), np.arange(60)
    llc = 50 + rng.normal(size=60) + larger * np.clip((i - 19) / gaps, 0, 1) + 12 * np.clip((i - 39) / gaps, 0, 1)
    steps = 100 * np.arange(1, 61)
    found = find_transitions(run(steps, 3 + 0.01 * rng.normal(size=60), llc))
    assert [round(t.llc_change / size) for t, size in zip(found, (larger, 12), strict=True)] == [1, 1]
    for t, first in zip(found, (19, 39), strict=True):
        assert t.start_interval[0] <= steps[first] <= t.start_interval[1] <= steps[first + 3]
        assert steps[first + gaps - 3] <= t.end_interval[0] <= steps[first + gaps] <= t.end_interval[1]


def test_a_jump_between_falls_is_a_stage_however_short():
    rng = np.random.default_rng(0)
    steps = np.geomspace(10, 1e5, 60).round()
    x = np.arange(60)
    llc = 80 - 0.5 * x + 20 * (x >= 31) + rng.normal(0, 0.3, 60)
    found = find_transitions(run(steps, 3 - 0.5 * (x >= 31) + rng.normal(0, 0.01, 60), llc))
    assert [t.change.trend for t in found] == ["down", "up", "down"]
    assert (found[1].start, found[1].end) == (steps[30], steps[31])
    assert found[1].llc_change == pytest.approx(20, abs=1)
