"""What a W&B server that hangs, is slow, fails or comes back costs a training, and the end of its process.

Each row trains a small model in a process of its own against a local server: one that answers, one that never does, one
that takes 5 seconds for each request, one that answers 500, one that resets connections, one that hangs for 15 seconds
from the first request on, and one that hangs after them. `sink` is a run of the sink's own, `user` the user's run with
the sink in it, `alone` the user's run without; where the server never answers, W&B itself refuses to begin these two.
`of training` is the processor time of the sink's thread, all of which may hold up training, as a share of the
training's time. A run of the sink's own lies in a process of its own, which takes a second or two of another processor,
most of it once, to import W&B. That isn't in the share.

    python experiments/wandb_away.py [--quick]
"""

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from command_line import command_line

SLOW_SECONDS = 5.0
AWAY_SECONDS = 15.0
WAIT_SECONDS = 120.0
"""A process that hasn't ended so long after its training is killed; its row says so."""

MODES = ("well", "hangs", "slow", "500", "resets", "back", "leaves")
KINDS = ("sink", "user", "alone")

CLIENT = """
import sys, time
import torch
import phasewatch as pw

kind, folder, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.manual_seed(0)
torch.set_num_threads(1)
data = torch.randn(64, 4), torch.randn(64, 1)


class Timed(pw.WandbSink):
    cpu = 0.0

    def write(self, item):
        began = time.thread_time()
        try:
            super().write(item)
        finally:
            Timed.cpu += time.thread_time() - began


def make_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def loss(model, batch):
    x, y = batch
    return torch.nn.functional.mse_loss(model(x), y)


run = None
if kind != "sink":
    import wandb
    run = wandb.init(project="p", settings=wandb.Settings(init_timeout=20, finish_timeout=10))
sampler = pw.SGLD(step_size=1e-3, localization=10.0, nbeta=20.0, chains=2, draws=4, burn_in=1, batch_size=16)
probe = pw.Probe(make_model, loss, data, sampler=sampler, threads=1)
sinks = [] if kind == "alone" else [Timed(run)]
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
monitor = pw.PhaseMonitor(model, probe, run=folder, at=pw.every(100), sinks=sinks)
began, step = time.monotonic(), 0
while time.monotonic() - began < seconds:
    step += 1
    optimizer.zero_grad()
    value = loss(model, data)
    value.backward()
    optimizer.step()
    monitor(step)
    if run and step % 100 == 0:
        run.log({"loss": float(value)})
    time.sleep(0.005)
print("LOOP", time.time(), Timed.cpu, len(monitor.trajectory), flush=True)
monitor.close()
print("CLOSED", time.time(), flush=True)
"""


class Server(ThreadingHTTPServer):
    """As much of W&B's server as opens a run and takes its rows, if it is in the mood.

    Args:
        mode: one of `MODES`.
    """

    daemon_threads = True

    def __init__(self, mode: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.mode = mode
        self.began: float | None = None
        self.rows = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no news."""


class Answer(BaseHTTPRequestHandler):
    """The answer to one request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Answer, or don't."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        server = cast(Server, self.server)
        mode = server.mode
        server.began = server.began or time.monotonic()  # a busy machine takes long to import W&B
        away = server.began + AWAY_SECONDS - time.monotonic()
        if mode == "hangs" or (mode == "leaves" and away < 0):
            time.sleep(1000)
        elif mode == "slow":
            time.sleep(SLOW_SECONDS)
        elif mode == "back":
            time.sleep(max(0.0, away))
        if mode == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        self._send(500 if mode == "500" else 200, self._answer(server, body))

    do_GET = do_PUT = do_POST

    def _answer(self, server: Server, body: str) -> Any:
        if self.path.endswith("file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            server.rows += sum("phase/llc" in line for line in history.get("content", ()))
            return {"exitcode": None, "limits": {}}
        if "upsertBucket" in body:
            project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
            bucket = {"id": "B", "name": "run", "displayName": "run", "project": project, "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in body:
            return {"data": {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": []}}}
        if "createArtifact(" in body:
            made = {"id": "A", "state": "COMMITTED", "artifactSequence": {"id": "S", "latestArtifact": None}}
            return {"data": {"createArtifact": {"artifact": made}}}
        if "rtifactType" in body:
            return {"data": {"project": {"artifactType": {"name": "run_table"}, "artifact": None}}}
        viewer = {"id": "V", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
        info = {"cliVersionInfo": {"max_cli_version": "9.9"}, "latestLocalVersionInfo": None, "features": []}
        return {"data": {"viewer": viewer, "serverInfo": info}}

    def _send(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def row(mode: str, kind: str, seconds: float) -> str:
    """Train against one server, and say what it cost."""
    server = Server(mode)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        wandb = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_DIR": folder, "WANDB_MODE": "online"}
        # Files, since W&B's own process holds pipes open when ours is gone.
        said_to, warned_to = Path(folder, "out"), Path(folder, "err")
        with said_to.open("w") as out_file, warned_to.open("w") as err_file:
            done = subprocess.Popen(
                [sys.executable, "-c", CLIENT, kind, str(Path(folder, "run")), str(seconds)],
                stdout=out_file,
                stderr=err_file,
                env={**os.environ, **wandb, "OMP_NUM_THREADS": "1"},
                cwd=folder,
            )
            try:
                done.wait(seconds + WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                done.kill()
                done.wait()
        ended = time.time()
        out, err = said_to.read_text(), warned_to.read_text()
        kept = Path(folder, "run", "points.jsonl")
        points = len(kept.read_text().splitlines()) if kept.exists() else 0
    said = {words[0]: words[1:] for line in out.splitlines() if (words := line.split())}
    if "CLOSED" not in said:
        return f"| {mode} | {kind} | ended with {done.returncode}: {(err.strip().splitlines() or [''])[-1][:80]} |"
    loop, closed = float(said["LOOP"][0]), float(said["CLOSED"][0])
    share = f"{100 * float(said['LOOP'][1]) / seconds:.1f} %"
    warned = sum("The sink " in line for line in err.splitlines())
    times = f"{closed - loop:.1f} | {ended - closed:.1f} | {ended - loop:.1f}"
    return f"| {mode} | {kind} | {share} | {times} | {warned} | {points} | {server.rows} |"


def main() -> None:
    """Print the table."""
    parser = command_line(__doc__, quick="one row")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each training")
    parser.add_argument("--only", help="rows such as hangs or hangs:sink, with commas")
    arguments = parser.parse_args()
    rows = [(mode, kind) for mode in MODES for kind in KINDS]
    if arguments.quick:
        rows = rows[:1]
    if arguments.only:
        wanted = arguments.only.split(",")
        rows = [(mode, kind) for mode, kind in rows if mode in wanted or f"{mode}:{kind}" in wanted]
    print("| server | run | of training | close(), s | exit, s | together | warnings | points kept | rows that came |")
    print("|---|---|---|---|---|---|---|---|---|")
    for mode, kind in rows:
        print(row(mode, kind, 5.0 if arguments.quick else arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
