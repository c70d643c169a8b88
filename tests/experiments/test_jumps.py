"""Jumps of a behaviour beside λ̂, where both are known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from phasewatch import Kind, Trajectory, find_transitions, log_spaced


@pytest.fixture
def jumps(script):
    return script("jumps")


def risen(step, *middles, width=0.2):
    """From 0 to 1 about some steps in equal parts, each a logistic of log step."""
    return sum(1 / (1 + (middle / step) ** (1 / width)) for middle in middles) / len(middles)


def a_run(*, llc=(1000,), score=1000, second=None, width=0.2):
    """λ̂ rises about the steps given and a score about one, as wide as given, and once more by a tenth at the second."""
    steps = np.array(sorted(log_spaced(50, 50_000, num=60).steps))
    noise = 0.002 * np.random.default_rng(5).standard_normal((len(steps), 3)).T
    again = 0.1 * risen(steps, second) if second else 0
    return Trajectory.from_values(
        steps,
        loss=2 - risen(steps, *llc) + noise[2],
        llc=100 + 50 * (risen(steps, *llc) + noise[0]),
        metrics={"a_score": risen(steps, score, width=width) + again + noise[1]},
    )


def test_a_jump_is_found_with_its_middle_and_what_goes_with_it(jumps):
    (jump,) = jumps.jumps(a_run(score=1100), "a_score", "up")
    assert abs(math.log(jump.half / 1100)) < 0.05
    assert jump.pair.first.kind is Kind.A
    assert jump.pair.second == jump.transition
    assert jump.pair.first.start < 1000 < jump.pair.first.end


def test_nothing_goes_with_a_jump_that_is_far_away(jumps):
    (jump,) = jumps.jumps(a_run(llc=(400,), score=20_000), "a_score", "up")
    assert jump.pair is None


def test_only_the_direction_that_is_asked_for_counts(jumps):
    assert jumps.jumps(a_run(), "a_score", "down") == []


def test_small_stages_are_jumps_only_where_they_are_asked_for(jumps):
    run = a_run(second=12_000)
    (large,) = jumps.jumps(run, "a_score", "up")
    found = jumps.jumps(run, "a_score", "up", least=0.05)
    assert len(found) == 2
    assert jumps.largest(found) == large == found[0]
    assert abs(math.log(found[1].half / 12_000)) < 0.15
    assert jumps.largest([]) is None


def test_a_table_says_which_starts_first_and_by_how_much(jumps):
    shown = jumps.beside(a_run(llc=(700,), score=1100), "a_score", "up")
    lag = int(shown["λ̂ starts before a score by"].split()[0])
    start = int(shown["a score, steps"].split()[0])
    assert lag > 0
    assert f"A, {start - lag} to " in shown["λ̂ beside a score"]
    assert jumps.beside(a_run(), "a_score", "down") == {"a score": "no jump"}


def test_a_rise_in_two_stages_goes_with_a_jump_as_one(jumps):
    run = a_run(llc=(500, 4000), score=1400, width=1.5)
    assert [t.kind for t in find_transitions(run)] == [Kind.A, Kind.A]
    (jump,) = jumps.jumps(run, "a_score", "up")
    assert jump.pair.first.kind is Kind.A
    assert jump.pair.first.start < 500 < 4000 < jump.pair.first.end
    assert jump.pair.first.llc_change == pytest.approx(50, abs=2)
    assert jump.pair.first.change.error == pytest.approx(math.hypot(*(t.change.error for t in find_transitions(run))))


def test_stages_with_a_plateau_or_a_turn_between_them_stay_two(jumps):
    apart = a_run(llc=(300, 12_000))
    assert jumps.stretches(apart) == find_transitions(apart)
    assert jumps.stretches(a_run(), "a_score") == find_transitions(a_run(), signal="a_score")


def test_small_transitions_are_left_out(jumps):
    run = a_run(second=12_000)
    found = find_transitions(run, signal="a_score")
    assert jumps.without_small([*found, *found]) == [*found, *found]
    change = found[0].change
    tiny = replace(found[0], changes={"a_score": replace(change, after=change.before + 0.05)})
    assert jumps.without_small([tiny, *found]) == found
    assert jumps.without_small([]) == []


def test_rates_count_every_run(jumps):
    runs = [
        a_run(llc=(700,), score=1100),
        a_run(llc=(1600,), score=1100),
        a_run(llc=(300,), score=20_000),
        a_run(score=1e9),
    ]
    row = jumps.rates(runs, "a_score", "up")
    assert row["seen"] == "3 of 4"
    assert row["a λ̂ transition goes with it"] == "2 of 3"
    assert row["of kind"] == "A 2"
    assert row["λ̂ starts first"] + row["the jump starts first"] + row["unclear"] == 2
    assert row["steps from λ̂'s half to the jump's, median"] == pytest.approx((400 - 500) / 2, abs=60)


@pytest.mark.parametrize("middle", [60, 300, 2500])
@pytest.mark.parametrize("signal", ["llc", "loss", "score"])
def test_half_of_a_logistic_in_log_step_is_done_at_its_middle(jumps, middle, signal):
    steps = np.array(sorted(log_spaced(1, 30_000, num=70, linear=10).steps))
    noisy = risen(steps, middle, width=1 / 3) + 0.003 * np.random.default_rng(11).standard_normal((3, len(steps)))
    trajectory = Trajectory.from_values(
        steps, loss=3 - 2 * noisy[1], llc=100 + 40 * noisy[0], metrics={"score": 0.1 + 0.7 * noisy[2]}
    )
    transition = max(find_transitions(trajectory, signal=signal), key=lambda t: abs(t.change.value))
    assert transition.change.trend == ("down" if signal == "loss" else "up")
    half = jumps.halfway(trajectory, transition)
    assert transition.start < half < transition.end
    assert abs(math.log(half / middle)) < 0.05
