"""Processes that end while a sink's thread is at work."""

import subprocess
import sys

import pytest
from processes import environment

WOKEN_BY_AN_EXIT_HANDLER = """
import atexit, sys, threading, time
from made_points import a_point
from phasewatch.monitor.runs import sink
from phasewatch.monitor.runs.record import Recorder

sink.CLOSE_SECONDS = 0.1
waits, woken = threading.Event(), threading.Event()
{early}


class Waits:
    def write(self, item):
        if item.step == 1:
            {late}
            waits.set()
            woken.wait()
            {then}
        else:
            print("a second item", flush=True)

    def close(self):
        print("closed", flush=True)


def slowly(value):
    for _ in range(50):
        time.sleep(0.01)
    return value


def call_from_rust():
    from typing import Annotated
    import pydantic
    pydantic.create_model("Model", value=(Annotated[int, pydantic.AfterValidator(slowly)], ...))(value=1)
    print("back from Rust", flush=True)


recorder = Recorder([Waits()])
for step in (1, 2):
    recorder.record(a_point(step))
waits.wait()
recorder.close()
"""


WAKE = "atexit.register(lambda: (woken.set(), time.sleep(0.1)))"  # as W&B wakes who waits for its service


def run(then, *, early="", late=WAKE):
    return subprocess.run(
        [sys.executable, "-c", WOKEN_BY_AN_EXIT_HANDLER.format(then=then, early=early, late=late)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )


def test_a_thread_that_an_exit_handler_wakes_leaves_foreign_code_and_begins_nothing_more():
    pytest.importorskip("pydantic")
    done = run("call_from_rust()")
    assert done.returncode == 0, done.stderr
    assert "has not finished 0.1 seconds after the end and is left behind" in done.stderr
    assert done.stdout == "back from Rust\n"


def test_a_thread_that_is_woken_when_nobody_waits_any_more_goes_on_with_nothing():
    """As where the user opens W&B before the monitor, whose handler is called after ours."""
    pytest.importorskip("pydantic")
    done = run("call_from_rust()", early=f"import pydantic; {WAKE}", late="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_thread_that_imports_is_waited_for_although_it_stands_still(tmp_path):
    (tmp_path / "takes_its_time.py").write_text("import time\ntime.sleep(1)\nprint('imported', flush=True)\n")
    done = run(f"sys.path.append({str(tmp_path)!r}); import takes_its_time")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imported\n"


def test_a_thread_that_never_stands_still_is_waited_for_no_longer_than_is_said():
    pytest.importorskip("pydantic")
    done = run(
        "from phasewatch.monitor.runs import exiting; exiting.SETTLE_SECONDS = 0.5\n            while True: sum([1])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
