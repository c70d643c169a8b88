"""Measuring by workers on any machine that sees the run's folder; what they do is told by files alone.

The replay posts tasks on the run's `Board`, reads what each worker appends to its own file, and takes the first result
of each step. A scheduler only starts workers: whether a step is measured is never asked of it.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from phasewatch.monitor.errors import PhasewatchError, say
from phasewatch.monitor.runs import members
from phasewatch.monitor.runs.board import Board, digest
from phasewatch.monitor.runs.executor import Executor, Order, Result
from phasewatch.monitor.runs.members import Member, Peer
from phasewatch.monitor.trajectories.trajectory import Point

POLL_SECONDS = 0.5
"""Seconds between two looks at the workers' files."""

TEND_SECONDS = 5.0
"""Seconds between two questions to the scheduler, and between two searches for workers that are gone."""

MOST_DEATHS = 3
"""A step that so many workers, one after another, had begun when they went is left out."""

MOST_STARTS = 3
"""So many times workers are started again without any result in between; then what is left is given up."""

READERS = 16
"""Threads that read the workers' files: each waits for the file system most of the time."""


class Launcher(Protocol):
    """Starts workers somewhere. Each runs `work`, or the command `phasewatch work`, and ends by itself."""

    where: str
    """Where to read what the workers print, for messages, such as "in FOLDER"."""

    def start(self, count: int) -> None:
        """Start so many workers more.

        Raises:
            PhasewatchError: if that can't be asked for.
        """
        ...

    def count(self) -> int | None:
        """How many workers of this run wait to start or run, also those that an earlier replay started.

        Returns:
            Their number; None where it can't be known now.
        """
        ...

    def stop(self) -> None:
        """End all workers of this run."""
        ...


class Elsewhere:
    """Starts nothing: the user starts `phasewatch work RUN` himself, wherever he likes."""

    where = "where they were started"

    def __init__(self, run: Path) -> None:
        self._run = run
        self._said = False

    def start(self, count: int) -> None:
        """Nothing is started."""

    def count(self) -> int | None:
        """Nobody knows; says once how workers are started."""
        if not self._said:
            self._said = True
            say(
                f"workers are started by: phasewatch work {self._run} SERIES --probe FILE.py:NAME, with the series and "
                "the probe of this replay, on any machine that sees that folder"
            )
        return None

    def stop(self) -> None:
        """They end by themselves."""


def executor(order: Order) -> Executor:
    """The executor whose workers the user starts himself.

    Args:
        order: what it is made for.

    Raises:
        PhasewatchError: for options, or without a run's folder.
    """
    run = run_of(order)
    if order.options:
        raise PhasewatchError(f"replay(on='external') takes no options; {', '.join(order.options)} came.")
    return FanOut(order, Elsewhere(run))


def run_of(order: Order) -> Path:
    """The run's folder that workers share.

    Args:
        order: what an executor is made for.

    Raises:
        PhasewatchError: if there is none.
    """
    if order.run is None:
        raise PhasewatchError(
            f"replay(on={order.place!r}) needs run=, a folder that all workers see: they share the work through it."
        )
    return order.run


class FanOut:
    """An executor whose workers share the steps through the run's folder.

    Args:
        order: what it is made for.
        launcher: starts the workers.
    """

    def __init__(self, order: Order, launcher: Launcher) -> None:
        self._run = run_of(order)
        self._workers = order.workers
        self._settings = digest(order.probe.settings)
        self._launcher = launcher
        self._board: Board | None = None
        self._member: Member | None = None
        self._peers: dict[str, Peer] = {}
        self._owners: dict[int, Peer] = {}
        self._first_seen: dict[int, float] = {}
        self._open: dict[int, int] = {}
        self._deaths: dict[int, int] = {}
        self._points: dict[int, Point] = {}
        self._failed: set[int] = set()
        self._failure = ""
        self._fruitless = 0
        self._tended = -TEND_SECONDS
        self.has_more = False
        self._said = False
        self._closed = False
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="phasewatch-read")

    def measure(self, steps: Iterable[int]) -> Iterator[Result]:
        """Have them measured; results come as they are found, those of an earlier replay's workers first."""
        wanted = dict.fromkeys(steps)
        if not wanted or self._closed:
            return
        board = self._board or self._take_over()
        self._sweep(board)
        yield from self._answers(wanted, [(step, self._points[step]) for step in wanted if step in self._points])
        self._share_out(board, wanted)
        self._fruitless = 0
        while wanted and not self._closed:
            yield from self._answers(wanted, [*self._sweep(board), *self._tend(board)])
            if wanted and not self._closed:
                time.sleep(POLL_SECONDS)

    def _answers(self, wanted: dict[int, None], found: list[Result]) -> Iterator[Result]:
        """Pass on what was waited for, and cross it off."""
        found = [(step, result) for step, result in dict(found).items() if step in wanted]
        for step, _ in found:
            del wanted[step]
        self._open = {task: step for task, step in self._open.items() if step in wanted}
        for number, result in enumerate(found, start=1):
            self.has_more = number < len(found)
            yield result

    def close(self) -> None:
        """End the workers, and let another replay go on."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._board and self._member and not self._is_superseded(self._board):
                self._board.post([{"end": True}])
        except PhasewatchError as error:
            say(f"workers may not hear that the replay is over: {error}")
        finally:
            if self._member:
                self._launcher.stop()
                self._member.leave()
            self._readers.shutdown(wait=False)

    def _take_over(self) -> Board:
        """Become the one that shares the tasks out, when no other is.

        Raises:
            PhasewatchError: if another one is.
        """
        board = Board(self._run)
        board.make()
        member = Member(board.members, {"settings": self._settings})
        try:
            self._wait_for_place(board)
            board.post([{"driver": member.name, "settings": self._settings}])
            board.refresh()
        except BaseException:
            member.leave()
            raise
        self._board, self._member = board, member
        return board

    def _wait_for_place(self, board: Board) -> None:
        """Take the place of the last replay, once it is over or gone.

        Raises:
            PhasewatchError: if it gives a sign of life.
        """
        board.refresh()
        session, other, since = -1, None, 0.0
        while True:
            if board.sessions != session:  # also where another replay was faster
                session, other, since = board.sessions, board.driver_peer(), time.monotonic()
                if other:
                    other.read()
            elif other and not board.has_ended and other.read() and not other.has_left:
                raise PhasewatchError(
                    f"Another replay ({other.name}) shares out the work on run={str(self._run)!r}. "
                    "Wait for it, or end it."
                )
            if board.has_ended or other is None or other.is_gone():
                if board.claim(f"driver-{session}"):
                    return
                if time.monotonic() - since > members.STALE_SECONDS:  # whoever took it was killed before saying so
                    board.post([{"driver": ""}])
            elif not self._said:
                self._said = True
                say(f"looking whether an earlier replay of {self._run} lives, for up to {members.STALE_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
            board.refresh()

    def _is_superseded(self, board: Board) -> bool:
        return board.is_claimed(f"driver-{board.sessions}")

    def _share_out(self, board: Board, wanted: Iterable[int]) -> None:
        """Post the steps that aren't posted already; an earlier replay's tasks that nobody answered still count."""
        board.refresh()
        answered = self._failed | {task for task, step in enumerate(board.tasks) if step in self._points}
        waiting = {step: task for task, step in enumerate(board.tasks) if step is not None and task not in answered}
        known = {step: waiting[step] for step in wanted if step in waiting}
        self._open |= {task: step for step, task in known.items()}
        self._post(board, [step for step in wanted if step not in known])

    def _post(self, board: Board, steps: list[int]) -> None:
        if not steps:
            return
        if self._is_superseded(board):
            raise PhasewatchError(
                f"Another replay has taken over run={str(self._run)!r}, since this one gave no sign of life. "
                "What is measured is kept."
            )
        first = len(board.tasks)
        board.post([{"step": step} for step in steps])
        board.refresh()
        mine = [task for task in range(first, len(board.tasks)) if board.tasks[task] is not None]
        self._open |= {task: step for task in mine if (step := board.tasks[task]) is not None}

    def _sweep(self, board: Board) -> list[Result]:
        """Read what is new in the members' files."""
        own = self._member.name if self._member else ""
        for name in os.listdir(board.members):
            stem = name.removesuffix(".jsonl")
            if stem != own and name not in self._peers and name.endswith(".jsonl"):
                self._peers[name] = Peer(board.members / name, self._run)
        results: list[Result] = []
        unread = [peer for peer in self._peers.values() if not peer.has_left]
        for peer, records in zip(unread, self._readers.map(Peer.read, unread), strict=True):
            for record in records:
                results += self._note(board, peer, record)
        if results:
            self._fruitless = 0
        return results

    def _note(self, board: Board, peer: Peer, record: Mapping[str, Any]) -> list[Result]:
        """What a line of a worker's file comes to; lines of another setting, or that make no sense, to nothing."""
        if peer.hello.get("settings") != self._settings:
            return []
        if isinstance(failure := record.get("failed"), str):
            self._failure = failure
        if isinstance(claimed := record.get("claimed"), list):
            self._owners |= {task: peer for task in claimed if isinstance(task, int)}
        task = record.get("task")
        if not isinstance(task, int) or not 0 <= task < len(board.tasks) or (step := board.tasks[task]) is None:
            return []
        if "point" in record:
            try:
                point = Point.from_json(record["point"])
            except (KeyError, TypeError, ValueError, AttributeError):
                return []
            if point.step == step and step not in self._points:
                self._points[step] = point
                return [(step, point)]
        elif isinstance(error := record.get("error"), str):
            self._failed.add(task)
            if task in self._open:
                return [(step, PhasewatchError(error))]
        return []

    def _tend(self, board: Board) -> list[Result]:
        """Share out again what workers had begun that are gone, and start workers where some are missing."""
        if time.monotonic() - self._tended < TEND_SECONDS:
            return []
        self._tended = time.monotonic()
        results = self._orphans(board)
        left = len(set(self._open.values()))
        known = self._launcher.count()
        if known is not None and known < (wanted := min(self._workers, left)):
            if self._fruitless < MOST_STARTS:
                self._fruitless += 1
                self._launcher.start(wanted - known)
            elif known == 0 and not any(self._is_at_work(peer) for peer in self._peers.values()):
                why = PhasewatchError(
                    f"no worker stays: {self._failure or f'what they said is {self._launcher.where}'}"
                )
                results += [(step, why) for step in dict.fromkeys(self._open.values())]
        return results

    def _is_at_work(self, peer: Peer) -> bool:
        return peer.hello.get("settings") == self._settings and not peer.is_gone()

    def _orphans(self, board: Board) -> list[Result]:
        """Share out again what workers had begun that are gone; what was found meanwhile, and steps that are given up.

        A claim whose owner isn't known is one of a worker that was killed before it could say so, or says it late.
        """
        claimed: set[str] = set()
        if any(task not in self._owners for task in self._open):
            claimed = board.claimed()
        gone = {peer: peer.is_gone() for peer in {self._owners[task] for task in self._open if task in self._owners}}
        lost = [
            task
            for task in self._open
            if (gone[self._owners[task]] if task in self._owners else self._is_old(task, str(task) in claimed))
        ]
        if not lost:
            return []
        results = self._sweep(board)  # what they wrote after they were last read
        unanswered = [task for task in lost if self._open[task] not in self._points and task not in self._failed]
        again: list[int] = []
        for step in dict.fromkeys(self._open.pop(task) for task in unanswered):
            self._deaths[step] = self._deaths.get(step, 0) + 1
            if self._deaths[step] < MOST_DEATHS:
                again.append(step)
            else:
                why = f"{MOST_DEATHS} workers ended, one after another, while they measured it"
                results.append((step, PhasewatchError(why)))
        self._post(board, again)
        return results

    def _is_old(self, task: int, is_claimed: bool) -> bool:
        """Whether a task has been claimed for long, and nobody has said by whom."""
        now = time.monotonic()
        return is_claimed and now - self._first_seen.setdefault(task, now) > members.STALE_SECONDS
