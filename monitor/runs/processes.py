"""Measuring in another process: it rebuilds the probe, reads snapshots from disk, and sends points back.

The process is started anew rather than forked, and never runs the caller's main module, so a script needs no
`if __name__ == "__main__"` and a notebook works. It ends by itself when its parent is killed.
"""

import io
import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from typing import IO, Any

import cloudpickle

from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning, in_words
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.snapshots.snapshot import Snapshots
from phasewatch.monitor.trajectories.trajectory import Point

_START = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[1]); "
    "from phasewatch.monitor.runs.processes import serve; serve(int(sys.argv[2]))"
)


class WorkerDied(RuntimeError):
    """The process ended without an answer: killed for memory, or crashed."""


def packed(probe: Probe, series: Snapshots) -> bytes:
    """What a worker needs, as bytes.

    Args:
        probe: made with a function that builds its model.
        series: where the snapshots lie.

    Returns:
        For `Worker`.

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


class Worker:
    """A process that measures one snapshot at a time.

    Args:
        package: what `packed` made.
        nice: how far the process steps back behind others on the same processor, 0 to 19.
    """

    def __init__(self, package: bytes, *, nice: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([os.path.abspath(p) for p in sys.path]), str(nice)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        self._send(package)

    def measure(self, step: int) -> Point:
        """Measure the snapshot of a step.

        Args:
            step: one of the series' steps.

        Returns:
            The point.

        Raises:
            PhasewatchError: if the snapshot can't be measured.
            WorkerDied: if the process ends first.
        """
        self._send(json.dumps(step).encode())
        try:
            frame = _read_frame(self._out)
        except (EOFError, ValueError):  # ValueError: stopped by another thread, which closed the pipe
            raise WorkerDied(f"the measuring process ended with status {self._process.wait()}") from None
        answer = json.loads(frame)
        if "error" in answer:
            raise PhasewatchError(answer["error"])
        return Point.from_json(answer["point"])

    def kill(self) -> None:
        """End the process at once, whatever it is doing; a `measure` in another thread raises `WorkerDied`."""
        self._process.kill()

    def stop(self) -> None:
        """End the process at once, and let go of it."""
        self.kill()
        self._process.wait()
        for pipe in (self._in, self._out):
            try:
                pipe.close()
            except BrokenPipeError:
                pass

    def _send(self, frame: bytes) -> None:
        try:
            self._in.write(len(frame).to_bytes(8) + frame)
            self._in.flush()
        except (BrokenPipeError, ValueError):  # `measure` finds out how it ended
            pass


def serve(nice: int) -> None:
    """The worker's own side: answer steps with points until the parent is gone."""
    os.nice(nice) if hasattr(os, "nice") else None
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, frames), daemon=True).start()
    package = frames.get()
    probe, series, failure = None, None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PhasewatchWarning)
        try:
            probe, series = cloudpickle.loads(package)
        except Exception as error:
            failure = f"The probe can't be rebuilt in another process: {in_words(error)}"
    while True:
        step = json.loads(frames.get())
        answer: dict[str, Any]
        try:
            if probe is None or series is None:
                raise PhasewatchError(failure)
            answer = {"point": probe(series.load(step)).as_json()}
        except Exception as error:
            answer = {"error": in_words(error)}
        frame = json.dumps(answer).encode()
        out.write(len(frame).to_bytes(8) + frame)
        out.flush()


def _receive(stream: IO[bytes], frames: "queue.SimpleQueue[bytes]") -> None:
    """Pass frames on, and end the process when there is nobody left to send any."""
    try:
        while True:
            frames.put(_read_frame(stream))
    except EOFError:
        os._exit(1)


def _read_frame(stream: IO[bytes]) -> bytes:
    return _read_exactly(stream, int.from_bytes(_read_exactly(stream, 8)))


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    buffer = io.BytesIO()
    while size > 0:
        piece = stream.read(size)
        if not piece:
            raise EOFError
        buffer.write(piece)
        size -= len(piece)
    return buffer.getvalue()
