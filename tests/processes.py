"""Processes that tests start, and whether they still run, by /proc."""

import os
import signal
import time
from pathlib import Path

import pytest

reads_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


TESTS = Path(__file__).parent


def environment(**changes):
    """For a process that imports modules of the tests, and whatever else this one was told to find."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def interruptible():
    """Let SIGINT interrupt this process: a shell has it ignored in what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status != "Z"


def of_session(session):
    """The processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def gone(pids, seconds):
    """Whether all have ended, at the latest after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(alive, pids)):
        time.sleep(0.05)
    return not any(map(alive, pids))
