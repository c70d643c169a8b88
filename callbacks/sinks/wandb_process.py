"""A W&B run of a sink's own in a process of its own, so that training pays for nothing but sending lines of JSON.

Importing W&B and opening a run takes a second of a processor, and a thread of the training process would hold up
training for as long. The process also ends when it is told to, whatever W&B waits for.

A line asks for one thing by its key, and is answered by a line with `warnings` and, if it `failed`, why: `open`, the
sink's arguments; `settings`; `points`, those that are there already; `point` or `transition` to write; `close`.
"""

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from phasewatch.callbacks.sinks.wandb_run import end_service
from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning, in_words, warn
from phasewatch.monitor.runs.exiting import call_at_exit, call_no_more
from phasewatch.monitor.runs.orphans import end_with
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
from phasewatch.monitor.trajectories.transitions import Transition

_START = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[1]); "
    "from phasewatch.callbacks.sinks.wandb_process import serve; serve(int(sys.argv[2]))"
)

END_SECONDS = 2.0
"""Seconds that the process has to end W&B's service and itself before it is killed."""


class WandbProcess:
    """The process, as seen from the training.

    Args:
        arguments: of the `WandbSink` there.

    Raises:
        OSError: if no process can be started.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        # -P: the current folder may hold a json.py of its own.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, path, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            process_group=0 if os.name == "posix" else None,
        )
        self._parent = os.getpid()
        call_at_exit(self.end)
        self.ask(open=arguments)

    def ask(self, **request: Any) -> None:
        """Ask for one thing, and wait until it is done.

        Args:
            request: plain JSON values.

        Raises:
            PhasewatchError: if it fails there, or the process is gone.
        """
        assert self._process.stdin
        assert self._process.stdout
        answer = ""
        with suppress(OSError, ValueError):  # ended, or closed by `end`
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise PhasewatchError("The process that sends to W&B has ended.")
        said = json.loads(answer)
        for warning in said["warnings"]:
            warn(warning)
        if said["failed"]:
            raise PhasewatchError(said["failed"])

    def write(self, item: Point | Transition) -> None:
        """Have a point or a transition written.

        Raises:
            PhasewatchError: as `ask`.
        """
        self.ask(**{"point" if isinstance(item, Point) else "transition": item.as_json()})

    def close(self) -> None:
        """Finish the run, and end the process.

        Raises:
            PhasewatchError: as `ask`.
        """
        try:
            self.ask(close=True)
        finally:
            self.end()
            with self._process:  # closes its pipes
                pass

    def end(self) -> None:
        """End the process at once, whatever it waits for; not from a fork of the one that started it."""
        call_no_more(self.end)
        if os.getpid() != self._parent:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
            return
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)


def serve(parent: int) -> None:
    """Do what is asked for until the parent is gone or ends this process.

    Args:
        parent: process id of the one that started this one.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what W&B prints is no answer
    signal.signal(signal.SIGTERM, lambda *_: _end())
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    end_with(parent, _end)
    threading.Thread(target=_work, args=(requests, answers), daemon=True).start()
    for line in os.fdopen(0, encoding="utf-8"):
        requests.put(json.loads(line))
    _end()


def _work(requests: "queue.SimpleQueue[dict[str, Any]]", answers: TextIO) -> None:
    """Answer one request after another, in a thread of its own: the main thread is there for signals."""
    points: dict[int, Point] = {}
    sink = None
    while True:
        asked, failed = requests.get(), None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PhasewatchWarning)
            try:
                sink = _do(asked, sink, points)
            except BaseException as error:  # SystemExit too, by which W&B may end a thread
                failed = in_words(error) if isinstance(error, Exception) else repr(error)
        said = [str(warning.message) for warning in caught if issubclass(warning.category, PhasewatchWarning)]
        answers.write(json.dumps({"warnings": said, "failed": failed}) + "\n")
        answers.flush()


def _do(asked: Mapping[str, Any], sink: Any, points: dict[int, Point]) -> Any:
    """Do one thing with the sink, and return it."""
    if "open" in asked:
        importlib.import_module("wandb")  # a sink that finds it there writes in its own process
        with suppress(ImportError):  # now rather than at the end, which the user waits for
            importlib.import_module("phasewatch.callbacks.figures.trajectory")
        from phasewatch.callbacks.sinks.wandb import WandbSink

        return WandbSink(**asked["open"])
    if "settings" in asked:
        sink.describe(asked["settings"])
    elif "points" in asked:
        points.update((point.step, point) for point in map(Point.from_json, asked["points"]))
        sink.attach(lambda: Trajectory(points.values()))
    elif "point" in asked:
        point = Point.from_json(asked["point"])
        points[point.step] = point
        sink.write(point)
    elif "transition" in asked:
        sink.write(Transition.from_json(asked["transition"]))
    else:
        sink.close()
        end_service()
    return sink


def _end() -> None:
    end_service(at_once=True)
    os._exit(0)
