"""A run on W&B's server, which here is a stand-in on loopback that answers the queries of W&B's own client."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest

pytest.importorskip("wandb")

RUN = {
    **dict.fromkeys(["sweepName", "group", "jobType", "commit", "heartbeatAt", "description", "notes"]),
    **{"id": "x", "tags": [], "name": "run1", "displayName": "run1", "state": "finished", "config": "{}"},
    **{"readOnly": False, "createdAt": "2026-01-01T00:00:00", "systemMetrics": "{}", "summaryMetrics": "{}"},
    **{"historyLineCount": 8, "user": {"name": "n", "username": "u"}, "historyKeys": {"lastStep": 7}, "projectId": "1"},
}
ROWS = [
    {"_step": i, "_timestamp": 1e9 + i, "trainer/global_step": 50 * i, "train/loss": 2 - i / 8, "table": {"a": 1}}
    for i in range(8)
]
ROWS[3]["train/loss"] = "NaN"


ASKED = []


class StandIn(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        query, given = "", {}
        if self.path == "/graphql":
            query, given = json.loads(body)["query"], json.loads(body).get("variables") or {}
            ASKED.append((given, self.headers["Authorization"]))
        if "parquetHistory" in query:
            run = {"parquetHistory": {"parquetUrls": [], "liveData": []}}
        elif re.search(r"\bhistory\(", query):
            page = range(given["minStep"], given["maxStep"])
            run = {"history": [json.dumps(row) for row in ROWS if row["_step"] in page]}
        else:
            run = RUN if given.get("name") == "run1" else None
        answer = json.dumps(
            {
                "data": {
                    "viewer": {"id": "1", "entity": "me", "username": "me"},
                    "project": {"internalId": "1", "run": run},
                }
            }
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def read(tmp_path):
    """Runs `phasewatch transitions` against the stand-in."""
    ASKED.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*arguments, **environment):
        folders = {f"WANDB_{kind}": str(tmp_path) for kind in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR")}
        ours = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
            "HOME": str(tmp_path),
            "WANDB_SILENT": "true",
        }
        command = [sys.executable, "-m", "phasewatch.cli", "transitions", *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | folders | ours | environment,
            cwd=tmp_path,
            check=False,
        )

    yield run
    server.shutdown()
    server.server_close()


def test_a_run_is_read_with_the_user_s_key(read):
    done = read("wandb://ent/proj/run1", "--signal", "train/loss", WANDB_API_KEY="k" * 40)
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 points, 1 left out without train/loss." in done.stdout
    assert {given.get("entity", given.get("entityName")) for given, _ in ASKED if given} == {"ent"}


def test_a_run_that_is_not_there_and_no_key_are_sentences(read):
    done = read("wandb://ent/proj/other", "--signal", "train/loss", WANDB_API_KEY="k" * 40)
    assert done.returncode == 2
    assert re.search(r"^phasewatch: wandb://ent/proj/other can't be read from http.* check the address", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    done = read("wandb://ent/proj/run1", "--signal", "loss", WANDB_API_KEY="")
    assert done.stderr == (
        "phasewatch: wandb://ent/proj/run1 needs a key of W&B; run `wandb login`, or set WANDB_API_KEY.\n"
    )
    done = read("wandb://run1", WANDB_API_KEY="k" * 40)
    assert "wandb://run1 names no run; write wandb://ENTITY/PROJECT/RUN" in done.stderr
