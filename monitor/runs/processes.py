"""Measuring in other processes of this machine.

A process is started anew rather than forked, and never runs the caller's main module, so a script needs no
`if __name__ == "__main__"` and a notebook works. It ends by itself when its parent is killed.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

import cloudpickle

from phasewatch.monitor.errors import PhasewatchError, say
from phasewatch.monitor.probing.automatic import Setting
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.executor import Executor, InProcess, Order, Result
from phasewatch.monitor.runs.members import HANG_SECONDS
from phasewatch.monitor.runs.shares import environments
from phasewatch.monitor.runs.worker import read_frame, write_frame
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.snapshot import Snapshots
from phasewatch.monitor.trajectories.trajectory import Point

_START = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[1]); "
    # Before the rest is imported, which takes seconds, or minutes on a slow disk.
    "from phasewatch.monitor.runs.orphans import end_with; end_with(int(sys.argv[2])); "
    "from phasewatch.monitor.runs.worker import serve; serve(int(sys.argv[3]))"
)

START_SECONDS = 600.0
"""The same before it is first heard of: Python and torch may come from a slow disk."""

END_SECONDS = 5.0
"""Seconds that a killed process has to end. The system ends it in milliseconds, unless it waits for a dead disk."""


MOST_DEATHS = 3
"""A snapshot that so many processes died of, one after another, is left out. A process may also die of something else,
such as another program that takes the memory."""


class WorkerDied(RuntimeError):
    """The process ended without an answer: killed for memory, or crashed."""


class WorkerHung(WorkerDied):
    """The process did nothing and was ended."""


def executor(order: Order) -> Executor:
    """Processes of this machine, each with its share of it; this process itself for a single worker.

    Args:
        order: what the executor is made for.

    Raises:
        PhasewatchError: for options, or a probe that can't be sent to another process.
    """
    if order.options:
        raise PhasewatchError(f"replay(on='local') takes no options; {', '.join(order.options)} came.")
    if order.workers == 1:
        return InProcess(order.probe, order.snapshots)
    shares = environments(order.probe, order.workers)
    return Processes(packed(order.probe, order.snapshots), workers=order.workers, environments=shares)


def packed(probe: Probe, series: Snapshots) -> bytes:
    """What a worker needs, as bytes.

    Args:
        probe: made with a function that builds its model.
        series: where the snapshots lie.

    Returns:
        For `Processes` and `Worker`.

    Raises:
        PhasewatchError: if the probe can't be sent to another process.
    """
    try:
        return cloudpickle.dumps((probe, series))
    except PhasewatchError:
        raise
    except Exception as error:
        raise PhasewatchError(
            f"The probe can't be sent to another process ({type(error).__name__}: {error}). "
            "Its model, loss, data and metrics must be functions and values that can be pickled; "
            "open files, loaders and locks can be made inside the function that builds the model or draws the data."
        ) from error


class Processes:
    """An executor with processes that measure as many snapshots at a time as the probe takes best together.

    A process is started when it is first needed, stays for the next call of `measure`, and is replaced when it dies.
    What it had not answered is measured by another; a snapshot that `MOST_DEATHS` died of has a `WorkerDied` for a
    result.

    Args:
        package: what `packed` made.
        workers: the most processes at a time.
        nice: how far they step back behind others on the same processor, 0 to 19.
        environments: of the processes, one for each that may run at a time; this process's own if not given.
    """

    def __init__(
        self,
        package: bytes,
        *,
        workers: int = 1,
        nice: int = 0,
        environments: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        self._package = package
        self._workers = workers
        self._nice = nice
        self._environments = list(environments or [os.environ] * workers)
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._closed = False
        self._lock = threading.Lock()

    def measure(self, steps: Iterable[int]) -> Iterator[Result]:
        """Measure; results come as they are ready."""
        queued = _Queue(steps, self._workers)
        results: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._drive, args=(queued, results), name="phasewatch-worker", daemon=True)
            for _ in range(min(self._workers, len(queued.waiting)))
        ]
        for thread in threads:
            thread.start()
        working = len(threads)
        try:
            while working:
                if (result := results.get()) is None:
                    working -= 1
                else:
                    yield result
        finally:
            queued.waiting.clear()

    def calibrate(self, steps: Sequence[int], like: Sampler) -> Setting | None:
        """Have a process calibrate the probe on the snapshots of some steps.

        Args:
            steps: some of the series' steps.
            like: the probe's sampler.

        Returns:
            The setting; None if this was closed meanwhile.

        Raises:
            WorkerDied: if the process ends first, or hangs.
            PhasewatchError: if the probe can't be rebuilt there.
        """
        worker = None
        try:
            worker = self._hire()
            return Setting.from_json(worker.calibrate(steps), like)
        except WorkerDied:
            if self._closed:
                return None
            raise
        finally:
            if worker:
                self._dismiss(worker)

    def use(self, probe: Probe, series: Snapshots) -> None:
        """Measure with another probe from now on."""
        with self._lock:
            self._package = packed(probe, series)
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.stop()

    def close(self) -> None:
        """End all processes at once."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()
        for worker in idle:
            worker.stop()

    def _drive(self, queued: "_Queue", results: "queue.SimpleQueue[Result | None]") -> None:
        """One thread a process: send it steps, and pass on what it answers."""
        worker = None
        group: list[int] = []
        while group := group or queued.take(1):
            then: list[int] = []
            answered = 0
            try:
                worker = worker or self._hire()
                together = worker.together() if len(queued.waiting) >= self._workers else 1
                group = queued.filled(group, together)
                then = queued.take_ahead(together)
                for step, result in zip(group, worker.measure_all(group, then), strict=True):
                    if self._closed:
                        break
                    results.put((step, result))
                    answered += 1
            except Exception as error:
                if not self._closed:
                    for step in queued.left_after(error, group[answered:]):
                        results.put((step, error))
                if isinstance(error, WorkerDied) and worker:
                    self._dismiss(worker)
                    worker = None
            if self._closed:
                break
            group = then
        if worker:
            self._dismiss(worker, keep=True)
        results.put(None)

    def _hire(self) -> "Worker":
        with self._lock:
            if self._closed:
                raise WorkerDied("the executor is closed")
            worker = self._idle.pop() if self._idle else self._start()
            self._busy.add(worker)
        return worker

    def _start(self) -> "Worker":
        """A new process, in the place of none that runs."""
        taken = {worker.place for worker in self._busy}
        place = next(place for place in range(self._workers) if place not in taken)
        return Worker(self._package, nice=self._nice, environment=self._environments[place], place=place)

    def _dismiss(self, worker: "Worker", *, keep: bool = False) -> None:
        with self._lock:
            self._busy.discard(worker)
            if keep and not self._closed:
                self._idle.append(worker)
                return
        worker.stop()


class _Queue:
    """Steps that wait, for several threads, and how many processes died of each."""

    def __init__(self, steps: Iterable[int], workers: int) -> None:
        self.waiting = deque(steps)
        self._workers = workers
        self._deaths: dict[int, int] = {}
        self._lock = threading.Lock()

    def take(self, most: int) -> list[int]:
        """The next steps; fewer than `most` where another process would have none."""
        with self._lock:
            fair = -(-len(self.waiting) // self._workers)
            return [self.waiting.popleft() for _ in range(min(most, fair))]

    def filled(self, group: list[int], together: int) -> list[int]:
        """A group with more steps to measure at once; a step that a process died with is measured by itself."""
        if any(step in self._deaths for step in group):
            with self._lock:
                self.waiting.extendleft(reversed(group[1:]))
            return group[:1]
        return group + self.take(together - len(group))

    def take_ahead(self, most: int) -> list[int]:
        """Steps to read while others are measured, as long as enough are left for the other processes."""
        with self._lock:
            spare = len(self.waiting) - self._workers * most
            return [self.waiting.popleft() for _ in range(min(most, spare))]

    def left_after(self, error: Exception, steps: list[int]) -> list[int]:
        """Put the steps that have no answer back, except those that are given up, which are returned."""
        if not isinstance(error, WorkerDied) or isinstance(error, WorkerHung):
            return steps
        with self._lock:
            for step in steps:
                self._deaths[step] = self._deaths.get(step, 0) + (len(steps) == 1)
            given_up = [step for step in steps if self._deaths[step] >= MOST_DEATHS]
            self.waiting.extendleft(step for step in reversed(steps) if step not in given_up)
        return given_up


class Worker:
    """A process that measures snapshots for this one.

    It has a process group of its own, so that what its loss or data fork ends with it. Pipes are served by threads, so
    that no caller waits for a process that is stopped.

    Args:
        package: what `packed` made.
        nice: how far the process steps back behind others on the same processor, 0 to 19.
        environment: of the process; this one's own if not given.
        place: which of several workers it is.
    """

    def __init__(
        self, package: bytes, *, nice: int = 0, environment: Mapping[str, str] | None = None, place: int = 0
    ) -> None:
        self.place = place
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        # -P: the current folder may hold a json.py of its own, among checkpoints that somebody else made.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, path, str(os.getpid()), str(nice)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0 if os.name == "posix" else None,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._has_begun = False
        self._together: int | None = None
        self._threads = [
            threading.Thread(target=target, args=(pipe,), name=f"phasewatch-pipe-{self._process.pid}", daemon=True)
            for target, pipe in ((self._send, self._process.stdin), (self._receive, self._process.stdout))
        ]
        for thread in self._threads:
            thread.start()
        self._to_send.put(package)

    def measure(self, step: int) -> Point:
        """Measure the snapshot of a step.

        Args:
            step: one of the series' steps.

        Returns:
            The point.

        Raises:
            PhasewatchError: if the snapshot can't be measured.
            WorkerDied: if the process ends first, or hangs.
        """
        (result,) = self.measure_all([step])
        if isinstance(result, Exception):
            raise result
        return result

    def measure_all(self, steps: Sequence[int], then: Sequence[int] = ()) -> Iterator[Point | PhasewatchError]:
        """Measure the snapshots of some steps, together where the probe does.

        Args:
            steps: some of the series' steps.
            then: what will be asked for next.

        Yields:
            The point of each, or why it can't be measured.

        Raises:
            WorkerDied: if the process ends first, or hangs.
        """
        self._send_request({"measure": list(steps), "then": list(then)})
        for _ in steps:
            answer = self._answer()
            yield PhasewatchError(answer["error"]) if "error" in answer else Point.from_json(answer["point"])

    def together(self) -> int:
        """How many snapshots are best asked for at once.

        Raises:
            WorkerDied: if the process ends first, or hangs.
        """
        if self._together is None:
            self._send_request({"together": True})
            self._together = int(self._answer().get("together", 1))
        return self._together

    def calibrate(self, steps: Sequence[int]) -> dict[str, Any]:
        """Calibrate the probe on the snapshots of some steps.

        Args:
            steps: some of the series' steps.

        Returns:
            A `Setting` as plain JSON values.

        Raises:
            PhasewatchError: if the probe can't be rebuilt.
            WorkerDied: if the process ends first, or hangs.
        """
        self._send_request({"calibrate": list(steps)})
        answer = self._answer()
        if "error" in answer:
            raise PhasewatchError(answer["error"])
        return answer["setting"]

    def _send_request(self, request: dict[str, Any]) -> None:
        self._to_send.put(json.dumps(request).encode())

    def _answer(self) -> dict[str, Any]:
        frame = b""
        while not frame:  # an empty frame says that it is at work
            limit = HANG_SECONDS if self._has_begun else START_SECONDS
            try:
                frame = self._received.get(timeout=limit)
            except queue.Empty:
                self.kill()
                raise WorkerHung(
                    f"the measuring process has done nothing for {limit:g} seconds and was ended: it was stopped, or "
                    "waits for a disk or a network that doesn't answer"
                ) from None
            if frame is None:
                raise WorkerDied(f"the measuring process ended with status {self._ended()}")
            self._has_begun = True
        return json.loads(frame)

    def kill(self) -> None:
        """End the process and what it has forked at once; a `measure` in another thread raises `WorkerDied`."""
        try:
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
        except OSError:
            pass
        self._process.kill()
        self._received.put(None)

    def stop(self) -> None:
        """End the process at once, and let go of it."""
        self.kill()
        self._to_send.put(None)
        if self._ended() is None:
            say(
                f"the measuring process {self._process.pid} was killed and hasn't ended after {END_SECONDS:g} seconds, "
                "since it waits for a disk; it ends when the disk answers"
            )
            return
        for thread in self._threads:
            thread.join(END_SECONDS)

    def _ended(self) -> int | None:
        """The status that the process ended with; None if a killed one can't end."""
        try:
            return self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def _send(self, pipe: IO[bytes]) -> None:
        with suppress(OSError), pipe:  # reading tells how it ended
            while (frame := self._to_send.get()) is not None:
                write_frame(pipe, frame)

    def _receive(self, pipe: IO[bytes]) -> None:
        with suppress(EOFError, OSError), pipe:
            while True:
                self._received.put(read_frame(pipe))
        self._received.put(None)
