import math

import numpy as np
import pytest

from phasewatch.callbacks.trainers.schedule import Budget, every, log_spaced
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


@pytest.mark.parametrize("bad", [0, -3, 2.0, True, "10", None, math.nan, 2**63])
def test_every_refuses_what_is_no_number_of_steps(bad):
    with pytest.raises(PhasewatchError, match=r"every\(n=.*\) must be a whole number from 1 to 9223372036854775807"):
        every(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 0}, r"log_spaced\(first=0\) must be a whole number from 1 to 9223372036854775807"),
        ({"last": 1e5}, r"log_spaced\(last=100000.0\) must be a whole number"),
        ({"num": 0}, r"log_spaced\(num=0\)"),
        ({"num": True}, r"log_spaced\(num=True\)"),
        ({"first": 200}, r"log_spaced\(first=200, last=100\): the last step must not come before the first"),
        ({"linear": -1}, r"log_spaced\(linear=-1\) must be a whole number from 0 to 10000000"),
        ({"last": 2**63}, r"log_spaced\(last=9223372036854775808\) must be a whole number from 1 to"),
        ({"num": 10**8}, r"log_spaced\(num=100000000\) must be a whole number from 1 to 10000000"),
    ],
)
def test_log_spaced_refuses_in_words(arguments, message):
    with pytest.raises(PhasewatchError, match=message):
        log_spaced(**{"first": 1, "last": 100, "num": 10, **arguments})


@pytest.mark.parametrize("fraction", [0, -0.1, math.nan, math.inf, "0.1", None, True])
def test_budget_refuses_what_is_no_share(fraction):
    with pytest.raises(PhasewatchError, match=r"Budget\(fraction=.*\) must be a finite number above 0"):
        Budget(fraction, at=every(1))


def test_budget_refuses_what_is_no_schedule():
    with pytest.raises(PhasewatchError, match=r"Budget\(at=100\) must be a schedule such as log_spaced"):
        Budget(0.1, at=100)


def test_budget_chooses_among_its_schedule():
    budget = Budget(0.1, at=every(10))
    assert [step for step in range(35) if budget(step)] == [0, 10, 20, 30]


def test_no_grid_goes_beyond_the_last_step():
    last = 2**63 - 1
    assert max(log_spaced(1, last, num=30, linear=30).steps) == last
