"""Run as a script: imports everything once, then forks a child for each line of JSON that comes, and kills it.

A line is `{"work": "run" | "replay" | "report" | "calibrate", "folder": ..., "delay": seconds | null,
"operation": number | null, ...}`: the child dies after so many seconds, or just before so many changes of files. With
`"loaders": true` it forks the workers of a data loader in the middle of its work, which nobody ends.
The answer is `{"killed": bool, "status": wait status, "seconds": until the end, "session": of the child}`.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from functools import partial

import torch
from tiny_run import ToldToFile, die_at_operation, make_probe, train
from tqdm import tqdm

from phasewatch.callbacks.sinks.report import write_report
from phasewatch.callbacks.trainers import session
from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
from phasewatch.monitor.probing.calibrate import calibrate
from phasewatch.monitor.runs.replay import replay
from phasewatch.monitor.snapshots.folder import SnapshotFolder


def end_unless_child_of(parent, _):
    """For a loader's worker whose parent was killed as it began: PyTorch takes whoever adopted it for its parent."""
    if os.getppid() != parent:
        os._exit(1)


class Loading:
    """The schedule `every(2)`, which forks a data loader at the fourth step: the measuring process is older."""

    def __init__(self):
        self.alive = None

    def __call__(self, step):
        if step == 4 and self.alive is None:
            end_with_this = partial(end_unless_child_of, os.getpid())
            self.alive = iter(torch.utils.data.DataLoader(range(10**6), num_workers=2, worker_init_fn=end_with_this))
            next(self.alive)
        return step % 2 == 0


def work(order):
    if order["operation"] is not None:
        die_at_operation(order["folder"], order["operation"])
        session.write_report = lambda run: None  # half a second, and nothing hangs on it
    sinks = [ToldToFile(order["told"])]
    if order["work"] == "run":
        options = {"measure": order["measure"], "average": order["average"]}
        options |= {"at": Loading()} if order["loaders"] else {}
        train(order["folder"], steps=order["steps"], sinks=sinks, **options)
    elif order["work"] == "report":
        write_report(order["folder"])
    elif order["work"] == "calibrate":
        Loading()(4) if order["loaders"] else None
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(PhasewatchError):  # no setting suits so little
            calibrate(list(SnapshotFolder(f"{order['folder']}/snapshots"))[:2], make_probe(), budget=2000)
    else:
        loading = Loading()
        for _ in replay(order["series"], make_probe(), run=order["folder"], sinks=sinks, workers=order["workers"]):
            loading(4) if order["loaders"] else None


def forked(order):
    began = time.monotonic()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            work(order)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if order["delay"] is not None:
        time.sleep(order["delay"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"killed": killed, "status": status, "seconds": time.monotonic() - began, "session": child}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error", PhasewatchWarning)
    # Its own lock is a semaphore that all children share, and a killed one may hold; so may its thread at a fork.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    with tempfile.TemporaryDirectory() as folder:
        train(folder, steps=4)  # whatever is imported or built at first use
    gc.freeze()  # else collections in the children copy what they share
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), flush=True)
