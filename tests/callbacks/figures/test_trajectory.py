import io
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from phasewatch.callbacks.figures.stage_marks import INTERVAL
from phasewatch.callbacks.figures.style import KIND_STYLES
from phasewatch.callbacks.figures.trajectory import draw_trajectory
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.trajectories.changes import Change, Transition
from phasewatch.monitor.trajectories.kinds import Kind
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

PUBLISHED = Path(__file__).parents[2] / "data" / "published"


def a_point(step, llc=10.0, *, loss=2.0, error=0.5, health=Health.OK, metrics=None):
    return Point(step, loss, Estimate(llc, error, (llc, llc), 20.0, 1.0, 100.0, health), metrics or {})


def a_transition(kind=Kind.A, start=10, end=100, *, provisional=False, starts=None, ends=None):
    changes = {"loss": Change(3.0, 2.0, 0.1, "down"), "llc": Change(5.0, 10.0, 0.5, "up")}
    return Transition(kind, "llc", start, end, starts or (start, start), ends or (end, end), 0.99, provisional, changes)


def a_curve(steps=(0, 1, 3, 10, 30, 100, 300, 1000)):
    return Trajectory([a_point(step, llc=5.0 + 3 * i, loss=4.0 - 0.2 * i) for i, step in enumerate(steps)])


def shades(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def drawn(figure):
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return file.getvalue().decode()


def marker_steps(axes, marker):
    return [float(x) for line in axes.lines if line.get_marker() == marker for x in line.get_xdata()]


def legend_labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_complexity_above_and_loss_below_hold_the_trajectory_s_own_numbers():
    trajectory = a_curve()
    above, below = draw_trajectory(trajectory).axes
    np.testing.assert_array_equal(above.lines[0].get_xydata(), np.c_[trajectory.steps, trajectory.llc])
    np.testing.assert_array_equal(below.lines[0].get_xydata(), np.c_[trajectory.steps, trajectory.loss])


def test_the_band_is_two_standard_errors_wide_on_each_side():
    trajectory = Trajectory([a_point(step, llc=10.0, error=0.7) for step in (1, 10, 100)])
    band = draw_trajectory(trajectory).axes[0].collections[0].get_paths()[0].get_extents()
    assert band.ymin == pytest.approx(10 - 1.4)
    assert band.ymax == pytest.approx(10 + 1.4)


def test_every_transition_is_one_shade_of_its_kind_in_every_panel():
    transitions = [a_transition(Kind.A, 1, 10), a_transition(Kind.B, 10, 100), a_transition(Kind.OTHER, 300, 1000)]
    figure = draw_trajectory(a_curve(), transitions)
    for axes in figure.axes:
        spans = [(shade.get_x(), shade.get_x() + shade.get_width()) for shade in shades(axes)]
        np.testing.assert_allclose(spans, [(1, 10), (10, 100), (300, 1000)])
    labels = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert labels == {kind.label: KIND_STYLES[kind].colour for kind in Kind}
    drawn(figure)


def test_only_a_provisional_stage_is_hatched_and_the_legend_says_what_that_means():
    settled, provisional = a_transition(Kind.A, 1, 10), a_transition(Kind.B, 10, 100, provisional=True)
    figure = draw_trajectory(a_curve(), [settled, provisional])
    assert [bool(shade.get_hatch()) for shade in shades(figure.axes[0])] == [False, True]
    assert legend_labels(figure) == ["95 % interval of a boundary", "provisional stage"]
    assert legend_labels(draw_trajectory(a_curve(), [settled])) == ["95 % interval of a boundary"]
    assert legend_labels(draw_trajectory(a_curve())) == []


def above_the_stages(figure, *, intervals=False):
    """Of each bar above the panels, or of the grey behind it, its two steps and its height in points."""
    panel = figure.axes[0]
    to_steps = (panel.transAxes - panel.transData).transform
    found = []
    for line in panel.lines:
        if not line.get_clip_on() and (line.get_gid() == INTERVAL) == intervals and line.get_marker() == "None":
            steps = to_steps(np.c_[line.get_xdata(), [1, 1]])[:, 0]
            height = line.get_transform().transform([0, 1])[1] - panel.transAxes.transform([0, 1])[1]
            found.append((*steps, height / figure.dpi * 72))
    return found


@pytest.mark.parametrize("steps", [(0, 1, 3, 10, 30, 100, 300, 1000), (1, 3, 10, 30, 100, 300, 1000)])
def test_bars_and_intervals_stand_at_the_stages_and_their_intervals(steps):
    stages = [
        a_transition(Kind.A, 3, 30, starts=(1, 5), ends=(20, 40)),
        a_transition(Kind.B, 35, 200, starts=(30, 90), ends=(150, 300)),
        a_transition(Kind.A, 500, 900, starts=(400, 600), ends=(800, 1000)),
    ]
    figure = draw_trajectory(a_curve(steps), stages)
    bars, intervals = above_the_stages(figure), above_the_stages(figure, intervals=True)
    np.testing.assert_allclose([bar[:2] for bar in bars], [(3, 30), (35, 200), (500, 900)])
    np.testing.assert_allclose(
        [interval[:2] for interval in intervals], [(1, 5), (20, 40), (30, 90), (150, 300), (400, 600), (800, 1000)]
    )
    low, high, low_again = (round(bar[2]) for bar in bars)
    assert 0 < low == low_again < high
    assert [round(interval[2]) for interval in intervals] == [low, low, high, high, low, low]


def test_bars_whose_intervals_all_meet_lie_in_three_rows():
    stages = [
        a_transition(Kind.A, 3, 30, starts=(1, 5), ends=(20, 120)),
        a_transition(Kind.A, 35, 200, starts=(20, 90), ends=(150, 600)),
        a_transition(Kind.A, 210, 900, starts=(100, 600), ends=(800, 1000)),
    ]
    bars = above_the_stages(draw_trajectory(a_curve((1, 3, 10, 30, 100, 300, 1000)), stages))
    assert len({round(bar[2]) for bar in bars}) == 3


def test_a_provisional_bar_is_hollow():
    solid, hollow = (draw_trajectory(a_curve(), [a_transition(provisional=p)]) for p in (False, True))
    assert len(above_the_stages(solid)) == 1
    assert len(above_the_stages(hollow)) == 2
    assert [line.get_color() for line in hollow.axes[0].lines if not line.get_clip_on()][3] == "white"


def test_kinds_differ_without_colour():
    figure = draw_trajectory(a_curve(), [a_transition(kind, 10**i, 3 * 10**i) for i, kind in enumerate(Kind)])
    greys = [float(np.dot(shade.get_facecolor()[:3], [0.299, 0.587, 0.114])) for shade in shades(figure.axes[0])]
    assert min(abs(a - b) for i, a in enumerate([*greys, 1.0]) for b in greys[:i]) > 0.02
    assert greys[0] - greys[1] > 0.05


def test_every_kind_is_named_in_a_paper_s_column_and_no_two_names_touch():
    trajectory = Trajectory.read(PUBLISHED / "lr_seed1.csv")
    found = find_transitions(trajectory)
    figure = draw_trajectory(trajectory, found, width=3.4)
    assert figure.get_figwidth() == 3.4
    assert sorted(t.get_text() for t in figure.axes[0].texts) == sorted(t.kind.label for t in found)
    crowd = [a_transition(Kind.OTHER, 100 + 3 * i, 102 + 3 * i) for i in range(60)]
    figure = draw_trajectory(a_curve(), crowd, width=3.4)
    drawn(figure)
    boxes = sorted((box.x0, box.x1) for box in (text.get_window_extent() for text in figure.axes[0].texts))
    assert 1 < len(boxes) < 60
    assert all(right < left for (_, right), (left, _) in pairwise(boxes))


def labels(figure):
    return [axes.get_ylabel() for axes in figure.axes]


def test_the_signal_whose_stages_they_are_comes_first():
    points = [a_point(s, llc=s, metrics={"a": s / 10, "b": 1.0}) for s in (1, 10, 100)]
    figure = draw_trajectory(Trajectory(points), signal="a", metrics=["a", "b"])
    assert [label if len(label) < 9 else "llc" for label in labels(figure)] == ["a", "llc", "loss", "b"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [0.1, 1, 10])
    assert labels(draw_trajectory(Trajectory(points), signal="loss"))[0] == "loss"
    with pytest.raises(PhasewatchError, match=r"metrics=\['c'\]\) names a metric that no point carries"):
        draw_trajectory(Trajectory(points), signal="c")


def test_what_was_never_measured_has_no_panel():
    unmeasured = Estimate(math.nan, math.nan, (), math.nan, math.nan, math.nan, Health.DIVERGED)
    points = [Point(s, math.nan, unmeasured, {"a": s / 10}) for s in (1, 10, 100)]
    figure = draw_trajectory(Trajectory(points), signal="a")
    assert labels(figure) == ["a"]
    drawn(figure)


def test_the_band_is_named_where_there_is_one():
    without = Trajectory([a_point(step, error=math.nan) for step in (1, 10)])
    assert "s.e." not in labels(draw_trajectory(without))[0]
    assert "± 2 s.e." in labels(draw_trajectory(a_curve()))[0]


def test_a_stage_that_reaches_beyond_the_points_ends_at_the_axis():
    figure = draw_trajectory(a_curve((10, 100, 1000)), [a_transition(start=0, end=10**6)])
    left, right = figure.axes[0].get_xlim()
    assert left > 0
    (shade,) = shades(figure.axes[0])
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((left, right))
    drawn(figure)


def test_step_zero_has_its_own_tick_left_of_the_others():
    axes = draw_trajectory(a_curve()).axes[-1]
    ticks = axes.xaxis.get_major_locator()()
    assert [axes.xaxis.get_major_formatter()(tick) for tick in ticks] == ["0", "1", "10", "100", "1k"]
    across = axes.transData.transform(np.c_[[0, 1, 10], [0, 0, 0]])[:, 0]
    assert 0 < across[1] - across[0] < across[2] - across[1]
    assert axes.get_xscale() == "symlog"
    assert draw_trajectory(a_curve((2, 20, 200))).axes[-1].get_xscale() == "log"


@pytest.mark.parametrize("steps", [(0,), (1,), (500,), (300, 400), (7, 8, 9), (0, 5000, 50000), (0, 10**9)])
def test_any_range_of_steps_has_legible_ticks_within_it(steps):
    figure = draw_trajectory(a_curve(steps))
    axes = figure.axes[-1]
    left, right = axes.get_xlim()
    ticks = axes.xaxis.get_major_locator()()
    assert left < min(steps) <= max(steps) < right
    assert 1 <= len(ticks) <= 10
    assert all(left <= tick <= right for tick in ticks)
    drawn(figure)


def test_doubtful_points_are_open_and_failed_ones_crosses_at_the_edge():
    points = [
        a_point(1),
        a_point(10, 11.0, health=Health.UNMIXED),
        a_point(100, math.nan, error=math.nan, health=Health.DIVERGED),
        a_point(1000, 12.0),
    ]
    figure = draw_trajectory(Trajectory(points))
    above = figure.axes[0]
    assert marker_steps(above, "x") == [100]
    assert set(legend_labels(figure)) == {"doubtful estimate", "failed estimate"}
    (open_marks,) = (line for line in above.lines if line.get_markerfacecolor() == "white" and line.get_marker() == "o")
    np.testing.assert_array_equal(open_marks.get_xydata(), [[10, 11.0]])
    drawn(figure)


def test_a_wild_doubtful_point_does_not_flatten_the_curve():
    points = [a_point(1), a_point(10, -824.0, health=Health.NEGATIVE), a_point(100, 12.0), a_point(1000, 14.0)]
    figure = draw_trajectory(Trajectory(points))
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 10 < 14 < high < 20
    assert marker_steps(figure.axes[0], "v") == [10]
    assert legend_labels(figure) == ["doubtful, below"]


def test_a_failed_estimate_is_never_drawn_as_a_value():
    points = [a_point(1), a_point(10, 99.0, health=Health.DIVERGED), a_point(100, 12.0)]
    above = draw_trajectory(Trajectory(points)).axes[0]
    assert math.isnan(above.lines[0].get_ydata()[1])
    assert marker_steps(above, "x") == [10]


def test_nothing_but_failures_still_makes_a_picture():
    points = [a_point(s, math.nan, error=math.nan, health=Health.DIVERGED, loss=math.nan) for s in (0, 10, 100)]
    figure = draw_trajectory(Trajectory(points))
    assert marker_steps(figure.axes[0], "x") == [0, 10, 100]
    drawn(figure)


def test_values_as_far_apart_as_floats_go_make_a_picture():
    points = [
        a_point(i, llc=(-1) ** i * 1e308, loss=(-1) ** i * 1e308, error=1e308, metrics={"m": (-1) ** i * 1e308})
        for i in range(1, 8)
    ]
    drawn(draw_trajectory(Trajectory(points), metrics=["m"]))


def test_no_points_make_a_picture_that_says_so():
    figure = draw_trajectory(Trajectory([]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["no points yet"]
    drawn(figure)


def test_metrics_get_panels_and_their_names_are_not_mathematics():
    points = [a_point(s, metrics={"a$_x$<b>": s / 10} if s != 10 else {}) for s in (1, 10, 100)]
    figure = draw_trajectory(Trajectory(points), metrics=["a$_x$<b>"])
    assert len(figure.axes) == 3
    label = figure.axes[2].yaxis.label
    assert label.get_text() == "a$_x$<b>"
    assert not label.get_parse_math()
    np.testing.assert_array_equal(figure.axes[2].lines[0].get_ydata(), [0.1, math.nan, 10.0])
    drawn(figure)


def test_metrics_that_cannot_be_drawn_are_refused():
    trajectory = Trajectory([a_point(1, metrics=dict.fromkeys("abcde", 1.0))])
    with pytest.raises(PhasewatchError, match=r"metrics=\['accuracy'\]\) names a metric .* carry: a, b, c, d, e"):
        draw_trajectory(trajectory, metrics=["accuracy"])
    with pytest.raises(PhasewatchError, match="got 5 names and has room for 4"):
        draw_trajectory(trajectory, metrics="a b c d e".split())
    with pytest.raises(PhasewatchError, match=r"write metrics=\['a'\]"):
        draw_trajectory(trajectory, metrics="a")


def test_drawing_changes_neither_the_points_nor_matplotlib_s_state():
    code = """
import matplotlib
state = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}  # reading that loads pyplot
before = state()
from phasewatch.callbacks.figures.trajectory import draw_trajectory
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
points = [Point(s, 2.0, Estimate(1.0, 0.1, (1.0,), 20.0, 1.0, 9.0, Health.OK)) for s in (0, 1, 10)]
trajectory = Trajectory(points)
arrays = [a.copy() for a in (trajectory.steps, trajectory.loss, trajectory.llc, trajectory.llc_error)]
draw_trajectory(trajectory)
assert list(trajectory) == points
now = (trajectory.steps, trajectory.loss, trajectory.llc, trajectory.llc_error)
assert all((a == b).all() for a, b in zip(arrays, now))
import sys
assert state() == before
assert not {"torch", "matplotlib.pyplot"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
