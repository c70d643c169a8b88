"""What drawing leaves behind: nothing."""

import gc
import os
import threading
import weakref
from pathlib import Path

import pytest
from matplotlib.mathtext import MathTextParser
from processes import reads_proc

from phasewatch.callbacks.figures.rendering import cycles_collected, render
from phasewatch.callbacks.figures.trajectory import draw_trajectory
from phasewatch.monitor.trajectories.trajectory import Trajectory

FIGURE = draw_trajectory(Trajectory.from_values([1, 10, 100], loss=[3.0, 2.0, 1.9], llc=[1.0, 20.0, 21.0]))


class Held:
    """Something that a frame may hold, or a cycle."""

    itself: "Held | None" = None


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
    """Fonts' files that this process holds open."""
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


@pytest.mark.parametrize("freezes", [True, False])
def test_cycles_of_the_block_are_collected_unless_the_process_freezes_its_own(no_collector, freezes):
    if not freezes:
        gc.freeze()
    with cycles_collected():
        held = Held()
        held.itself = held
        seen = weakref.ref(held)
        del held
    assert (seen() is None) is freezes
    assert bool(gc.get_freeze_count()) is not freezes
    gc.unfreeze()
