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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any

import cloudpickle

from phasewatch.monitor.errors import PhasewatchError, say
from phasewatch.monitor.probing.automatic import Setting
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.executor import Result
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

HANG_SECONDS = 120.0
"""A measuring process that neither answers nor uses its processor for so many seconds is ended. A measurement may take
days, but none of it waits for two minutes, except for a disk or a network that is gone."""

START_SECONDS = 600.0
"""The same before it is first heard of: Python and torch may come from a slow disk."""

END_SECONDS = 5.0
"""Seconds that a killed process has to end. The system ends it in milliseconds, unless it waits for a dead disk."""


class WorkerDied(RuntimeError):
    """The process ended without an answer: killed for memory, or crashed."""


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
    """An executor with processes that measure one snapshot each at a time.

    A process is started when it is first needed, stays for the next call of `measure`, and is replaced when it dies;
    the snapshot that it died of has a `WorkerDied` for a result.

    Args:
        package: what `packed` made.
        workers: the most processes at a time.
        nice: how far they step back behind others on the same processor, 0 to 19.
    """

    def __init__(self, package: bytes, *, workers: int = 1, nice: int = 0) -> None:
        self._package = package
        self._workers = workers
        self._nice = nice
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._closed = False
        self._lock = threading.Lock()

    def measure(self, steps: Iterable[int]) -> Iterator[Result]:
        """Measure; results come as they are ready."""
        waiting = deque(steps)
        results: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._drive, args=(waiting, results), name="phasewatch-worker", daemon=True)
            for _ in range(min(self._workers, len(waiting)))
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
            waiting.clear()

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

    def _drive(self, waiting: "deque[int]", results: "queue.SimpleQueue[Result | None]") -> None:
        """One thread a process: send it steps, and pass on what it answers."""
        worker = None
        while True:
            try:
                step = waiting.popleft()
            except IndexError:
                break
            try:
                worker = worker or self._hire()
                result = worker.measure(step)
            except Exception as error:
                result = error
            if self._closed:
                break
            if isinstance(result, WorkerDied) and worker:
                self._dismiss(worker)
                worker = None
            results.put((step, result))
        if worker:
            self._dismiss(worker, keep=True)
        results.put(None)

    def _hire(self) -> "Worker":
        with self._lock:
            if self._closed:
                raise WorkerDied("the executor is closed")
            worker = self._idle.pop() if self._idle else Worker(self._package, nice=self._nice)
            self._busy.add(worker)
        return worker

    def _dismiss(self, worker: "Worker", *, keep: bool = False) -> None:
        with self._lock:
            self._busy.discard(worker)
            if keep and not self._closed:
                self._idle.append(worker)
                return
        worker.stop()


class Worker:
    """A process that measures one snapshot at a time.

    It has a process group of its own, so that what its loss or data fork ends with it. Pipes are served by threads, so
    that no caller waits for a process that is stopped.

    Args:
        package: what `packed` made.
        nice: how far the process steps back behind others on the same processor, 0 to 19.
    """

    def __init__(self, package: bytes, *, nice: int = 0) -> None:
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        # -P: the current folder may hold a json.py of its own, among checkpoints that somebody else made.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, path, str(os.getpid()), str(nice)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0 if os.name == "posix" else None,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._has_begun = False
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
        return Point.from_json(self._ask(step)["point"])

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
        return self._ask(list(steps))["setting"]

    def _ask(self, request: int | list[int]) -> dict[str, Any]:
        self._to_send.put(json.dumps(request).encode())
        frame = b""
        while not frame:  # an empty frame says that it is at work
            limit = HANG_SECONDS if self._has_begun else START_SECONDS
            try:
                frame = self._received.get(timeout=limit)
            except queue.Empty:
                self.kill()
                raise WorkerDied(
                    f"the measuring process has done nothing for {limit:g} seconds and was ended: it was stopped, or "
                    "waits for a disk or a network that doesn't answer"
                ) from None
            if frame is None:
                raise WorkerDied(f"the measuring process ended with status {self._ended()}")
            self._has_begun = True
        answer = json.loads(frame)
        if "error" in answer:
            raise PhasewatchError(answer["error"])
        return answer

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
