"""The inside of a measuring process: it rebuilds the probe, reads snapshots from disk, and sends points back.

A frame is eight bytes of length and that many bytes. The first frame that comes is the probe and its series, pickled;
each later one is a step, answered by a point or an error, or a list of steps, answered by what a calibration on their
snapshots comes to.
"""

import io
import json
import os
import queue
import sys
import threading
import time
import warnings
from typing import IO, Any

import cloudpickle

from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning, in_words
from phasewatch.monitor.probing.automatic import calibrated
from phasewatch.monitor.runs.orphans import end

BEAT_SECONDS = 5.0
"""Seconds between the empty frames by which a process that is at work says so."""

BEAT_WORK = 0.005
"""Processor seconds between two beats from which a process counts as being at work: the beat itself takes a
hundredth."""


def serve(nice: int) -> None:
    """Answer steps with points until the parent is gone, which `orphans.end_with` sees to.

    Args:
        nice: how far to step back behind other processes, 0 to 19.
    """
    os.nice(nice) if hasattr(os, "nice") else None
    out = _Answers(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what the user's loss prints is no answer
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, frames), daemon=True).start()
    threading.Thread(target=_beat, args=(out,), daemon=True).start()
    package = frames.get()
    probe, series, failure = None, None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PhasewatchWarning)
        try:
            probe, series = cloudpickle.loads(package)
        except Exception as error:
            failure = f"The probe can't be rebuilt in another process: {in_words(error)}"
    while True:
        asked = json.loads(frames.get())
        answer: dict[str, Any]
        try:
            if probe is None or series is None:
                raise PhasewatchError(failure)
            if isinstance(asked, list):
                answer = {"setting": calibrated(series, asked, probe).as_json()}
            else:
                answer = {"point": probe(series.load(asked)).as_json()}
        except Exception as error:
            answer = {"error": in_words(error)}
        out.send(json.dumps(answer).encode())


class _Answers:
    """The way back to the parent, for two threads."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, frame: bytes) -> None:
        try:
            with self._lock:
                write_frame(self._stream, frame)
        except OSError:  # nobody is there to read it
            end()


def _beat(out: _Answers) -> None:
    """Send an empty frame now, and then as long as the process uses its processor."""
    used = -1.0
    while True:
        if (now := time.process_time()) - used > BEAT_WORK:
            out.send(b"")
        used = now
        time.sleep(BEAT_SECONDS)


def write_frame(stream: IO[bytes], frame: bytes) -> None:
    """Send one frame."""
    stream.write(len(frame).to_bytes(8) + frame)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes:
    """Receive one frame.

    Raises:
        EOFError: if the stream ends first.
    """
    return _read_exactly(stream, int.from_bytes(_read_exactly(stream, 8)))


def _receive(stream: IO[bytes], frames: "queue.SimpleQueue[bytes]") -> None:
    """Pass frames on, and end the process when there is nobody left to send any."""
    try:
        while True:
            frames.put(read_frame(stream))
    except EOFError:
        end()


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    buffer = io.BytesIO()
    while size > 0:
        piece = stream.read(size)
        if not piece:
            raise EOFError
        buffer.write(piece)
        size -= len(piece)
    return buffer.getvalue()
