import dataclasses
import io
import math
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from phasewatch.callbacks.sinks.terminal import TerminalSink, point_line, print_transitions
from phasewatch.monitor.emergence.watching import red_flags
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.formatting import integer
from phasewatch.monitor.trajectories.changes import Change, Transition
from phasewatch.monitor.trajectories.kinds import Kind
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory


def a_point(step, llc=142.5, *, loss=1.945, error=0.8, health=Health.OK):
    return Point(step, loss, Estimate(llc, error, (llc, llc), 20.0, 1.0, 100.0, health))


UP = Transition(
    Kind.A, "llc", 0, 40404, (0, 9), (38181, 41414), 0.99999, False,
    {"loss": Change(4.26, 1.89, 0.1, "down"), "llc": Change(12.6, 169.7, 0.9, "up")},
)  # fmt: skip
DOWN = Transition(
    Kind.B, "llc", 40404, 318181, (39000, 41000), (315000, 320000), 0.981, True,
    {"loss": Change(1.89, 1.78, 0.1, "down"), "llc": Change(169.7, 112.8, 1.1, "down")},
)  # fmt: skip
HUGE = Transition(
    Kind.OTHER, "llc", 123456789, 987654321, (123456000, 123457000), (987654000, 987655000), 0.97, True,
    {"loss": Change(1.0, 1.1, 0.1, "up"), "llc": Change(1.0, 123456.7, 1234.5, "up")}, 14, 12,
)  # fmt: skip


ONE = (a_point(1),)


def printed(transitions, points=ONE, *, signal="llc", remarks="", **options):
    file = io.StringIO()
    console = Console(file=file, **options)
    print_transitions(Trajectory(points), transitions, console, signal=signal, remarks=remarks)
    return file.getvalue()


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_row_says_kind_steps_changes_confidence_and_whether_it_may_still_move():
    lines = printed([UP, DOWN], width=80).splitlines()
    (up,) = (i for i, line in enumerate(lines) if line.startswith("A "))
    (down,) = (i for i, line in enumerate(lines) if line.startswith("B "))
    assert cells(lines[up]) == ["A", "0 → 40 404", "-2.370", "+157.1 ± 0.9", "> 99.9 %"]
    assert cells(lines[up + 1]) == ["0–9 → 38 181–41 414"]
    assert cells(lines[down]) == ["B", "40 404 → 318 181", "-0.110", "-56.9 ± 1.1", "98.1 %"]
    assert cells(lines[down + 1]) == ["39 000–41 000 → 315 000–320 000", "provisional"]
    assert max(map(len, lines)) <= 80


def test_a_row_says_how_many_points_are_doubtful():
    row = printed([HUGE], width=120).splitlines()[2:5]
    assert [cells(line)[-1] for line in row] == ["97.0 %", "provisional", "12 of 14 points doubtful"]


def test_a_metric_has_a_column_of_its_own_and_loss_needs_none():
    changes = {**UP.changes, "[b]x": Change(0.25, 0.75, 0.01, "up")}
    own = dataclasses.replace(UP, signal="[b]x", changes=changes)
    points = [dataclasses.replace(a_point(1), metrics={"[b]x": 0.5})]
    header, _, row, *_ = printed([own], points, width=80, signal="[b]x").splitlines()
    assert cells(header) == ["kind", "steps, 95 % intervals", "[b]x", "loss", "llc", "confidence"]
    assert cells(row)[2:4] == ["+0.50 ± 0.01", "-2.370"]
    assert cells(printed([UP], width=80, signal="loss").splitlines()[0])[2:] == ["loss", "llc", "confidence"]


def test_remarks_follow_the_sentences():
    text = printed([UP], width=80, remarks="One of 1 000.\nAnother.")
    assert text.endswith(".\n\nOne of 1 000.\nAnother.\n\n1 point.\n")


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_no_number_is_broken_in_any_width(width):
    text = printed([UP, DOWN, HUGE], width=width)
    for whole in ("40 404 → 318 181", "123 456 789 → 987 654 321", "+123 455.7 ± 1 234.5", "-56.9 ± 1.1"):
        assert sum(whole in line for line in text.splitlines()) >= 1


def test_a_number_in_a_sentence_stays_on_its_line(monkeypatch):
    sentence = "From step 40 404 to 318 181 complexity fell by 56.9 ± 1.1 (98.1 % sure)."
    monkeypatch.setattr(Transition, "sentence", lambda self: sentence, raising=False)
    for width in range(14, 80):
        lines = printed([DOWN], width=width).split("\n\n")[1].splitlines()
        assert " ".join(lines) == sentence
        for whole in ("40 404", "318 181", "56.9 ± 1.1", "(98.1 %"):
            assert any(whole in line for line in lines)


def test_every_transition_s_sentence_follows_the_table():
    text = printed([UP, DOWN], width=400)
    at = [text.index(transition.sentence()) for transition in (UP, DOWN)]
    assert text.index("confidence") < at[0] < at[1]


def test_colours_only_where_there_is_a_terminal():
    assert "\x1b" not in printed([UP], width=80)
    assert "\x1b[1;34mA" in printed([UP], width=80, force_terminal=True, color_system="standard", no_color=False)


def test_without_transitions_it_says_so():
    assert printed([]) == "No transition so far.\n1 point.\n"
    assert printed([], points=()) == "No transition so far.\n0 points.\n"


def test_doubtful_and_left_out_points_are_counted_apart():
    points = [
        *(a_point(step) for step in range(1, 1001)),
        a_point(2000, health=Health.UNMIXED),
        a_point(2001, health=Health.NEGATIVE),
        a_point(2002, math.nan, health=Health.DIVERGED),
    ]
    assert printed([], points, width=200).splitlines()[-1] == (
        "1 003 points, 1 left out without λ̂ or loss, 2 doubtful."
    )


def test_points_without_the_metric_are_counted():
    points = [a_point(1), dataclasses.replace(a_point(2, health=Health.UNMIXED), metrics={"score": 0.5})]
    assert printed([], points, signal="score").splitlines()[-1] == "2 points, 1 left out without score."
    assert printed([], points, signal="loss").splitlines()[-1] == "2 points."


def test_markup_in_a_sentence_is_printed_as_it_is(monkeypatch):
    monkeypatch.setattr(Transition, "sentence", lambda self: "[bold]not markup[/bold]", raising=False)
    assert "[bold]not markup[/bold]" in printed([UP], width=80)


def test_a_point_is_one_line():
    assert " ".join(point_line(a_point(1234)).split()) == "step 1 234 loss 1.945 llc 142.5 ± 0.8 ok"
    failed = a_point(5, math.nan, error=math.nan, loss=math.nan, health=Health.DIVERGED)
    assert " ".join(point_line(failed).split()) == "step 5 loss – llc – diverged"


def test_the_lines_of_a_log_are_aligned():
    points = [
        a_point(0, -4.3),
        a_point(1234567, 12345.6, error=88.8),
        a_point(20, math.nan, error=math.nan, health=Health.DIVERGED),
        dataclasses.replace(a_point(7), loss=1.2e-7),
        a_point(3, error=math.nan, health=Health.UNMIXED),
    ]
    lines = [point_line(point) for point in points]
    for word in ("loss", "llc"):
        assert len({line.index(word) for line in lines}) == 1
    assert len({len(line) - len(p.llc.health.name) for line, p in zip(lines, points, strict=True)}) == 1
    assert max(map(len, lines)) < 80


def test_no_torch_behind_it():
    code = "import phasewatch.callbacks.sinks.terminal, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def a_watched_run():
    """A greeting whose log-likelihood rises for 25 points and then falls, and another behaviour that goes on rising."""
    index = np.arange(40)
    up = -4 + np.log(index + 1) / 2 + 0.02 * np.random.default_rng(0).normal(size=40)
    metrics = {"watch_greeting": up - 0.03 * np.maximum(index - 25, 0), "watch_count": up}
    return Trajectory.from_values((index + 1) * 1000, loss=np.ones(40), llc=np.ones(40), metrics=metrics)


def test_a_watched_log_likelihood_that_has_turned_is_flagged_in_red():
    text = printed([], a_watched_run(), width=300, force_terminal=True, color_system="standard")
    assert "\x1b[1;31mRED FLAG: watch_greeting has turned." in text
    assert "watch_count" not in text


def test_the_live_log_flags_it_once_when_the_alarm_is_sure(capsys):
    run, sink = a_watched_run(), TerminalSink()
    seen = []
    sink.attach(lambda: Trajectory(seen))
    for point in run:
        seen.append(point)
        sink.write(point)
    lines = capsys.readouterr().out.splitlines()
    [at] = [i for i, line in enumerate(lines) if "RED FLAG" in line]
    assert lines[at].startswith("RED FLAG: watch_greeting has turned.")
    first = next(points for points in range(1, 41) if red_flags(run[:points]))
    assert lines[at - 1].startswith(f"step {integer(int(run.steps[first - 1])):>9}")
    assert len(lines) == 41


def test_without_a_trajectory_the_live_log_has_the_points_alone(capsys):
    sink = TerminalSink()
    for point in a_watched_run():
        sink.write(point)
    assert "RED FLAG" not in capsys.readouterr().out
