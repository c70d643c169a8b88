import pytest

from phasewatch.monitor.runs import plan
from phasewatch.monitor.runs.plan import Plan, affords


@pytest.mark.parametrize(
    ("training", "measuring", "measured", "fits"),
    [
        (0.0, 0.0, 0, True),  # the first is made at once, to learn what one costs
        (79.9, 4.0, 1, False),  # 4 spent and 4 more is a tenth of 80
        (80.0, 4.0, 1, True),
        (119.9, 8.0, 2, False),
        (120.0, 8.0, 2, True),
    ],
)
def test_one_more_measurement_must_fit_into_the_share(training, measuring, measured, fits):
    assert affords(0.1, training=training, measuring=measuring, measured=measured) is fits


@pytest.mark.parametrize("waits", [True, False])
def test_after_the_time_that_it_names_a_plan_affords_one_more(monkeypatch, waits):
    now = [100.0]
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now[0])
    share = Plan(0.1, waits=waits)
    assert share.seconds_to_next() is None
    with share.account():
        now[0] += 3.0
    seconds = share.seconds_to_next()
    assert seconds == pytest.approx(60.0 if waits else 57.0)
    now[0] += seconds - 0.01
    assert share.choose([1, 2], [3]) is None
    now[0] += 0.02
    assert share.choose([1, 2], [3]) == 1
    assert share.seconds_to_next() == 0
    assert Plan(None, waits=waits).seconds_to_next() is None
