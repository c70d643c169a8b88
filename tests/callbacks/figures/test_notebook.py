"""What a notebook shows of a trajectory, a transition and an estimate."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from phasewatch.monitor import errors
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

PUBLISHED = Trajectory.read(Path(__file__).parents[2] / "data/published/lr_seed1.csv")
ESTIMATE = Estimate(142.5, 0.84, (141.0, 144.0), 20.0, 1.01, 412.3, Health.OK)


def test_a_trajectory_shows_its_picture_and_its_transitions():
    html = PUBLISHED._repr_html_()
    assert "Trajectory of 190 points, steps 0 to 499 999" in html
    assert html.count('<img src="data:image/svg+xml;base64,') == 1
    for transition in find_transitions(PUBLISHED):
        assert transition._repr_html_() in html
    assert "http" not in html


def test_a_transition_tells_its_kind_its_steps_and_its_sentence():
    first, *_, last = find_transitions(PUBLISHED)
    assert ">A</span> <b>69 → 1 124</b><br>Between steps 69 and 1 124 the loss fell" in first._repr_html_()
    assert "<i>provisional</i>" in last._repr_html_()
    hostile = replace(first, signal="<b>x", changes={"<b>x": first.changes["llc"]})
    assert "<b>x" not in hostile._repr_html_()
    assert "&lt;b&gt;x" in hostile._repr_html_()


def test_an_estimate_tells_its_verdict():
    html = ESTIMATE._repr_html_()
    assert "λ̂ = <b>142.5 ± 0.8</b>" in html
    assert "OK</span> The chains agree and have settled." in html
    assert "2 chains, R-hat 1.010, 412 effective draws, nβ 20" in html
    failed = replace(ESTIMATE, value=math.nan, health=Health.DIVERGED)._repr_html_()
    assert "λ̂ = <b>–</b>" in failed
    assert "nan" not in failed


@pytest.mark.parametrize(
    ("points", "shown"),
    [
        ([], "Trajectory of 0 points"),
        ([Point(1, math.nan, replace(ESTIMATE, health=Health.DIVERGED))], "Trajectory of 1 points"),
        ([Point(s, 1.0 / s, replace(ESTIMATE, health=Health.DIVERGED)) for s in range(1, 9)], "steps 1 to 8</p><img"),
    ],
)
def test_a_trajectory_with_little_in_it(points, shown):
    assert shown in Trajectory(points)._repr_html_()


def test_a_long_trajectory_is_drawn_with_some_of_its_points():
    steps = range(1, 3001)
    long = Trajectory.from_values(steps, loss=[1 / s for s in steps], llc=[5.0] * 3000)
    assert len(long._repr_html_()) < 400_000


def test_plot_draws_the_transitions_of_the_signal():
    figure = PUBLISHED.plot()
    letters = [text.get_text() for text in figure.axes[0].texts]
    assert letters == ["A", "A", "B", "B", "A"] or sorted(letters) == ["A", "A", "A", "B", "B"]
    assert figure._repr_html_().startswith('<img src="data:image/svg+xml')
    by_loss = PUBLISHED.plot("loss", width=3.4)
    assert by_loss.get_figwidth() == pytest.approx(3.4)
    assert by_loss.axes[0].get_ylabel() == "loss"
    with pytest.raises(errors.PhasewatchError, match="no point has it; the points have llc, loss"):
        PUBLISHED.plot("accuracy")


WITHOUT = """
import sys, phasewatch as pw
trajectory = pw.Trajectory.read(sys.argv[1])
print(sorted({"torch", "matplotlib", "IPython", "jinja2"} & set(sys.modules)))
pw.find_transitions(trajectory)[0]._repr_html_(), trajectory[0].llc._repr_html_()
print(sorted({"torch", "matplotlib", "IPython", "jinja2"} & set(sys.modules)))
sys.modules["matplotlib"] = None
sys.modules["matplotlib.figure"] = None
html = trajectory._repr_html_()
needs = "The picture of a trajectory needs the package matplotlib"
print("type A transition" in html, needs in html, "[report]" in html)
try:
    trajectory.plot()
except pw.PhasewatchError as error:
    print(error)
print("torch" in sys.modules)
"""


def test_nothing_heavy_is_imported_and_what_is_missing_is_named():
    path = Path(__file__).parents[2] / "data/published/lr_seed1.csv"
    done = subprocess.run([sys.executable, "-c", WITHOUT, path], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["[]", "[]", "True True True"]
    assert lines[3].startswith("trajectory.plot('llc') needs the package matplotlib, which isn't installed. Run: pip")
    assert lines[4] == "False"
