"""A Ray cluster of one machine for the tests, with an own folder and own ports."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from processes import environment
from slurm_node import free_ports


def missing():
    """Why there is no Ray to test with; None if there is."""
    return None if importlib.util.find_spec("ray") else "needs Ray: pip install 'phasewatch[ray]'"


@contextmanager
def ray_head(folder, *, cpus=2, **changes):
    """The environment of a client, and the address of the head, while it runs."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    port, client, *others = free_ports(8)
    short = tempfile.mkdtemp(prefix="ray-")  # it makes sockets there, whose paths may have 107 characters
    names = ("node-manager", "object-manager", "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent",
             "metrics-export")  # fmt: skip
    env = environment(
        HOME=str(folder),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_DISABLE_IMPORT_WARNING="1",
        RAY_worker_niceness="0",  # else workers starve beside other tests
        GRPC_ENABLE_FORK_SUPPORT="false",  # its handlers kill one in four of the servers that the head forks
        **{"RAY_AUTH_MODE": "disabled", **changes},
    )
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
               f"--ray-client-server-port={client}", f"--num-cpus={cpus}", "--include-dashboard=false",
               f"--temp-dir={short}", "--object-store-memory=100000000",
               *(f"--{name}-port={number}" for name, number in zip(names, others, strict=True))]  # fmt: skip
    with open(folder / "head.out", "wb") as out:
        head = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=folder, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not listens(client):
            if head.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Ray doesn't come up: {(folder / 'head.out').read_text()[-3000:]}")
            time.sleep(0.2)
        yield env, f"ray://127.0.0.1:{client}"
    finally:
        head.terminate()
        try:
            head.wait(15)
        except subprocess.TimeoutExpired:
            pass
        end_group(head.pid)
        head.wait()
        shutil.rmtree(short, ignore_errors=True)


def listens(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def end_group(leader):
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass
