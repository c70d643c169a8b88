"""What drawing leaves behind: nothing."""

import gc
import os
import threading
import weakref
from pathlib import Path

import pytest
from matplotlib.mathtext import MathTextParser
from processes import reads_proc

from phasewatch.callbacks.figures.rendering import render
from phasewatch.callbacks.figures.trajectory import draw_trajectory
from phasewatch.monitor.trajectories.trajectory import Trajectory

FIGURE = draw_trajectory(Trajectory.from_values([1, 10, 100], loss=[3.0, 2.0, 1.9], llc=[1.0, 20.0, 21.0]))


class Held:
    """Something that a frame may hold."""


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def draw_holding_something():
    held = Held()
    render(FIGURE, "svg")
    return weakref.ref(held)


def test_drawing_keeps_no_variable_of_its_callers(no_collector):
    MathTextParser._parse_cached.cache_clear()  # pyright: ignore[reportAttributeAccessIssue]; parsing a formula is what leaves cycles
    assert draw_holding_something()() is None


def fonts():
    """Fonts' files that this process holds open, once what is garbage is gone."""
    gc.collect()
    found = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)]
    return [name for name in found if Path(name).suffix in {".ttf", ".otf", ".ttc", ".afm"}]


@reads_proc
def test_no_font_stays_open_for_a_thread_that_drew():
    done, over = threading.Barrier(2), threading.Event()

    def work():
        render(FIGURE, "svg")
        done.wait(60)
        over.wait(60)

    render(FIGURE, "svg")
    before, threads = len(fonts()), [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:  # all alive at once, so that each has an identity of its own
        thread.start()
        done.wait(60)
    over.set()
    for thread in threads:
        thread.join()
    assert len(fonts()) <= before


def test_what_matplotlib_raises_comes_out():
    with pytest.raises(ValueError, match="nonsense"):
        render(FIGURE, "nonsense")


def test_a_process_that_starts_no_thread_any_more_draws_all_the_same(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert b"</svg>" in render(FIGURE, "svg")
