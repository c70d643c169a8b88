import io

import numpy as np
import pytest

from phasewatch import PhasewatchError, emergence
from phasewatch.callbacks.figures.emergence import draw_emergence
from phasewatch.monitor.emergence.overview import Overview
from phasewatch.monitor.emergence.reversal import Reversal

STEPS = np.geomspace(100, 10_000, 12)
BITS = 3 - 0.5 * np.log10(STEPS)
ACCURACY = np.linspace(0.25, 0.6, 12)


def overview(steps=STEPS, **other):
    later = emergence.forecast(STEPS, ACCURACY, BITS, at=[30_000, 20_000], chance=0.25)
    found = emergence.verdict(STEPS, ACCURACY, BITS, chance=0.25)
    given = {"verdict": found, "forecast": later, "reversal": None, "attribution": None, "remarks": []}
    return Overview(steps, {"bits": BITS, "accuracy": ACCURACY}, "accuracy", "bits", **(given | other))


def test_each_score_goes_from_0_to_1_and_better_is_up():
    above, below = draw_emergence(overview()).axes
    bits, accuracy = (line.get_ydata() for line in above.get_lines())
    assert (bits[0], bits[-1]) == (accuracy[0], accuracy[-1]) == (0, 1)
    np.testing.assert_array_equal(below.get_lines()[0].get_ydata(), ACCURACY)


def test_the_forecast_goes_on_from_the_last_point_in_order():
    made = overview()
    _, below = draw_emergence(made).axes
    line = below.get_lines()[1]
    assert line.get_xdata().tolist() == [10_000, 20_000, 30_000]
    np.testing.assert_allclose(line.get_ydata(), [0.6, made.forecast.mean[1], made.forecast.mean[0]])


def test_an_alarm_is_a_line_and_a_figure_can_be_saved():
    turned = Reversal(peak=3000, fall=0.2, alarm=5000, false_alarm=0.01)
    figure = draw_emergence(overview(reversal=turned, forecast=None, verdict=None), width=3.4)
    assert [line.get_xdata()[0] for line in figure.axes[0].get_lines()][-1] == 5000
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    assert len(file.getvalue()) > 1000


def test_one_step_is_too_few():
    with pytest.raises(PhasewatchError, match="takes at least 2 steps; 1 came"):
        draw_emergence(overview(steps=STEPS[:1]))
