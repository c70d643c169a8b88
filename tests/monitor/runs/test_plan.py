import pytest

from phasewatch.monitor.runs.plan import affords


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
