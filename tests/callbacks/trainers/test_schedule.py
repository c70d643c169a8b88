import math

import numpy as np
import pytest

from phasewatch.callbacks.trainers.schedule import Budget, every, log_spaced, most_useful
from phasewatch.monitor.errors import PhasewatchError


@pytest.mark.parametrize("n", [1, 7, np.int64(7)])
def test_every_is_due_at_multiples(n):
    due = every(n)
    assert [step for step in range(30) if due(step)] == list(range(0, 30, int(n)))


@pytest.mark.parametrize(("first", "last", "num"), [(1, 50_000, 80), (10, 1000, 3), (3, 3, 5), (5, 6, 40)])
def test_log_spaced_holds_both_ends_and_even_ratios(first, last, num):
    steps = sorted(log_spaced(first, last, num).steps)
    assert (steps[0], steps[-1]) == (first, last)
    assert len(steps) <= num
    wanted = np.geomspace(first, last, num)
    assert {round(step) for step in wanted} == set(steps)


def test_log_spaced_of_one_step_is_the_first():
    assert log_spaced(5, 100, 1).steps == {5}


def test_a_linear_grid_is_added_to_the_logarithmic_one():
    both = log_spaced(1, 1000, 4, linear=10).steps
    assert both == log_spaced(1, 1000, 4).steps | {round(1 + 99.9 * i) for i in range(1, 11)}
    assert {1, 10, 100, 1000} < both


def test_steps_of_other_integer_types_are_due_too():
    due = log_spaced(1, 100, 3)
    assert due(np.int64(10))
    assert not due(11)


@pytest.mark.parametrize("bad", [0, -3, 2.0, True, "10", None, math.nan])
def test_every_refuses_what_is_no_number_of_steps(bad):
    with pytest.raises(PhasewatchError, match=r"every\(n=.*\) must be a whole number of at least 1"):
        every(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 0}, r"log_spaced\(first=0\) must be a whole number of at least 1"),
        ({"last": 1e5}, r"log_spaced\(last=100000.0\) must be a whole number"),
        ({"num": 0}, r"log_spaced\(num=0\)"),
        ({"num": True}, r"log_spaced\(num=True\)"),
        ({"first": 200}, r"log_spaced\(first=200, last=100\): the last step must not come before the first"),
        ({"linear": -1}, r"log_spaced\(linear=-1\) must be a whole number of at least 0"),
    ],
)
def test_log_spaced_refuses_in_words(arguments, message):
    with pytest.raises(PhasewatchError, match=message):
        log_spaced(**{"first": 1, "last": 100, "num": 10, **arguments})


@pytest.mark.parametrize("fraction", [0, -0.1, math.nan, math.inf, "0.1", None, True])
def test_budget_refuses_what_is_no_share(fraction):
    with pytest.raises(PhasewatchError, match=r"Budget\(fraction=.*\) must be a number above 0"):
        Budget(fraction, at=every(1))


def test_budget_refuses_what_is_no_schedule():
    with pytest.raises(PhasewatchError, match=r"Budget\(at=100\) must be a schedule such as log_spaced"):
        Budget(0.1, at=100)


def test_budget_chooses_among_its_schedule():
    budget = Budget(0.1, at=every(10))
    assert [step for step in range(35) if budget(step)] == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("training", "measuring", "measured", "affords"),
    [
        (0.0, 0.0, 0, True),  # the first is made at once, to learn what one costs
        (79.9, 4.0, 1, False),  # 4 spent and 4 more is a tenth of 80
        (80.0, 4.0, 1, True),
        (119.9, 8.0, 2, False),
        (120.0, 8.0, 2, True),
    ],
)
def test_one_more_measurement_must_fit_into_the_share(training, measuring, measured, affords):
    budget = Budget(0.1, at=every(1))
    assert budget.affords(training=training, measuring=measuring, measured=measured) is affords


def test_the_most_useful_step_has_the_widest_gap_in_log_step():
    assert most_useful([5, 3, 9], []) == 3
    assert most_useful([2, 10, 90], [1, 100]) == 10


@pytest.mark.parametrize("seed", range(5))
def test_most_useful_against_the_obvious_search(seed):
    rng = np.random.default_rng(seed)
    steps = rng.permutation(1000)[:40].tolist()
    candidates, measured = steps[:25], steps[25:]
    gaps = np.abs(np.log1p(candidates)[:, None] - np.log1p(measured)).min(axis=1)
    assert most_useful(candidates, measured) == candidates[int(gaps.argmax())]
