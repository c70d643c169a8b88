"""A worker: measures what a replay shares out in a run's folder, until nothing is left."""

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import cloudpickle

from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning, in_words
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs import members
from phasewatch.monitor.runs.board import Board, Chooser, digest
from phasewatch.monitor.runs.executor import InProcess, Order
from phasewatch.monitor.runs.fan_out import run_of
from phasewatch.monitor.runs.members import Member
from phasewatch.monitor.runs.processes import packed
from phasewatch.monitor.snapshots.snapshot import Snapshots

IDLE_SECONDS = 1.0
"""Seconds between two looks for new tasks when none is free."""


def work(run: str | Path, make: Callable[[], tuple[Probe, Snapshots]]) -> int:
    """Measure the tasks of a run's folder until none is left and the replay is over, or gone.

    Args:
        run: the run's folder, in which a replay shares its work out.
        make: returns the probe and the series of that replay.

    Returns:
        How many snapshots this process has measured.

    Raises:
        PhasewatchError: if no replay shares any work out there, or the probe has other settings than its.
    """
    board = _found(run)
    member = Member(board.members, {"settings": board.settings})
    try:
        try:
            probe, snapshots = make()
            if digest(probe.settings) != board.settings:
                raise PhasewatchError(
                    f"The probe has other settings than the replay that shares out the work on run={str(run)!r}, so "
                    "its points can't be compared. Give the same probe, and the same versions of what it uses."
                )
        except Exception as error:
            member.write({"failed": in_words(error)})
            raise
        return _measure(board, member, InProcess(probe, snapshots), probe.together)
    finally:
        member.leave()


def _found(run: str | Path) -> Board:
    """The board of a run, which a file system may show late."""
    board, began = Board(run), time.monotonic()
    while True:
        if board.is_there:
            board.refresh()
            if board.driver:
                return board
        if time.monotonic() - began > members.STALE_SECONDS or not board.run.is_dir():
            raise PhasewatchError(
                f"No replay shares out any work in {run}. Start one on any machine that sees this folder: "
                f"phasewatch replay SERIES --probe FILE.py:NAME --run {run} --on external"
            )
        time.sleep(IDLE_SECONDS)


def _measure(board: Board, member: Member, executor: InProcess, together: int) -> int:
    chooser, driver, count, settings = Chooser(board), None, 0, board.settings
    while not member.is_lost:
        board.refresh()
        if board.has_ended or board.settings != settings:
            break
        tasks = chooser.take(together)
        if not tasks:
            if driver is None or driver.name != board.driver:
                driver = board.driver_peer()
            if driver:
                driver.read()
            if driver is None or driver.is_gone():
                break
            time.sleep(IDLE_SECONDS)
            continue
        member.busy = True
        member.write({"claimed": tasks})
        began = time.monotonic()
        steps = [step for task in tasks if (step := board.tasks[task]) is not None]
        then = [step for task in chooser.likely(together) if (step := board.tasks[task]) is not None]
        for task, (_, result) in zip(tasks, executor.measure(steps, then), strict=True):
            found = {"error": in_words(result)} if isinstance(result, Exception) else {"point": result.as_json()}
            member.write({"task": task, "seconds": round((time.monotonic() - began) / len(tasks), 3), **found})
            count += 1
        member.busy = False
    return count


def packed_work(order: Order) -> bytes:
    """What `work_packed` needs on another machine, as bytes, for a place that nobody else can write to.

    Args:
        order: what the workers are for.

    Raises:
        PhasewatchError: if the probe can't be sent to another process.
    """
    path = [os.path.abspath(entry) for entry in sys.path]
    return cloudpickle.dumps((path, os.getcwd(), str(run_of(order)), packed(order.probe, order.snapshots)))


def work_packed(content: bytes) -> int:
    """`work`, as it was packed elsewhere.

    Args:
        content: what `packed_work` made; it is unpickled, so it must come from there.

    Returns:
        How many snapshots this process has measured.

    Raises:
        PhasewatchError: as `work`.
    """
    path, folder, run, package = cloudpickle.loads(content)
    sys.path += [entry for entry in path if entry not in sys.path]
    try:
        os.chdir(folder)
    except OSError as error:
        raise PhasewatchError(
            f"{folder}, where the replay was started, isn't there for its workers ({error.strerror})."
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PhasewatchWarning)
        return work(run, lambda: cloudpickle.loads(package))
