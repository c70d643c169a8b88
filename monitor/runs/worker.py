"""The inside of a measuring process: it rebuilds the probe, reads snapshots from disk, and sends points back.

A frame is eight bytes of length and that many bytes. The first frame that comes is the probe and its series, pickled;
each later one asks for one thing by its key: `measure`, steps that are each answered by a point or an error, with the
steps that follow `then`; `calibrate`, steps whose snapshots a setting is found on; `together`, how many steps are best
asked for at once.
"""

import io
import json
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import IO, Any

import cloudpickle

from phasewatch.monitor.errors import PhasewatchWarning, in_words
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.executor import InProcess
from phasewatch.monitor.runs.members import BEAT_SECONDS, BEAT_WORK
from phasewatch.monitor.runs.orphans import end


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
    probe, executor, failure = None, None, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PhasewatchWarning)
        try:
            probe, series = cloudpickle.loads(package)
            executor = InProcess(probe, series)
        except Exception as error:
            failure = f"The probe can't be rebuilt in another process: {in_words(error)}"
    while True:
        asked = json.loads(frames.get())
        for answer in _answers(asked, probe, executor, failure):
            out.send(json.dumps(answer).encode())


def _answers(
    asked: dict[str, Any], probe: Probe | None, executor: InProcess | None, failure: str
) -> Iterator[dict[str, Any]]:
    if probe is None or executor is None:
        yield from [{"error": failure}] * len(asked.get("measure", [None]))
    elif "measure" in asked:
        for _, result in executor.measure(asked["measure"], asked["then"]):
            yield {"error": in_words(result)} if isinstance(result, Exception) else {"point": result.as_json()}
    else:
        try:
            if "calibrate" in asked:
                yield {"setting": executor.calibrate(asked["calibrate"], probe.sampler).as_json()}
            else:
                yield {"together": probe.together}
        except Exception as error:
            yield {"error": in_words(error)}


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
