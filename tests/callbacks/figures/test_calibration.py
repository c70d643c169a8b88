import io

import pytest

from phasewatch.callbacks.figures.calibration import draw_calibration
from phasewatch.monitor.estimates.checks import Checks
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.probing.calibration import Calibration, Trial
from phasewatch.monitor.sampling.settings import SGLD
from phasewatch.monitor.trajectories.trajectory import Point


def a_point(step, llc, health=Health.OK, kappa=1.0):
    checks = Checks(step_size=1e-3, kappa=kappa)
    return Point(step, 2.0, Estimate(llc, 0.5, (llc, llc), 100.0, 1.0, 100.0, health, checks=checks))


def a_trial(eps, nbeta, *points):
    return Trial("trial", SGLD(step_size=eps, localization=nbeta / 10, nbeta=nbeta), points, 100)


TRIALS = (
    a_trial(1e-3, 100.0, a_point(10, -300.0, Health.NEGATIVE), a_point(20, 8.0), a_point(30, 12.0)),
    a_trial(2e-3, 100.0, a_point(10, -310.0, Health.NEGATIVE), a_point(20, 8.5, Health.NOISY), a_point(30, 13.0)),
    a_trial(5e-4, 200.0, a_point(30, 12.5)),
)


def a_calibration(sampler=TRIALS[0].sampler, trials=TRIALS):
    return Calibration(sampler, trials, ("because",), {10: 1.0, 20: 2.0, 30: 3.0}, 400, 1000)


def places(panel):
    """Where the markers stand."""
    return {(x, y) for bars in panel.containers for x, y in zip(*bars.lines[0].get_data(), strict=True)}


def test_it_draws_the_levels_against_the_step_size_and_nbeta_and_how_far_from_unstable_they_are():
    figure = draw_calibration(a_calibration())
    by_step, by_nbeta, kappa = figure.axes
    levels = {(1e-3, 8.0), (1e-3, 12.0), (2e-3, 8.5), (2e-3, 13.0)}
    assert {place for place in places(by_step) if place[1] == place[1]} == levels
    assert {place for place in places(by_nbeta) if place[1] == place[1]} == {(100.0, 8.0), (100.0, 12.0), (200.0, 12.5)}
    assert {y for _, y in places(kappa)} == {1.0}
    assert 4 in {line.get_ydata()[0] for line in kappa.lines if len(line.get_ydata()) == 2}
    low, high = by_step.get_ylim()
    assert 0 < low < 8
    assert 13 < high < 20


def test_the_choice_is_marked_and_doubt_is_open():
    by_step = draw_calibration(a_calibration()).axes[0]
    assert [1e-3, 1e-3] in [list(line.get_xdata()) for line in by_step.lines]
    open_ones = {bars.lines[0].get_ydata()[0] for bars in by_step.containers if str(bars.lines[0].get_mfc()) == "white"}
    assert 8.5 in open_ones
    assert not {8.0, 12.0, 13.0} & open_ones


def test_trials_are_joined_that_differ_in_one_thing_alone():
    by_step, by_nbeta, _ = draw_calibration(a_calibration()).axes
    assert [12.0, 13.0] in joined(by_step)
    assert [12.0, 12.5] in joined(by_nbeta)
    assert not any(12.5 in heights for heights in joined(by_step))


def joined(panel):
    return [list(line.get_ydata()) for line in panel.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]


@pytest.mark.parametrize("trials", [(), TRIALS[:1]])
def test_a_failed_calibration_is_drawn_too(trials):
    file = io.BytesIO()
    draw_calibration(a_calibration(None, trials)).savefig(file, format="svg")
    assert b"</svg>" in file.getvalue()
