"""Two ranks of a training by the trainers of Hugging Face and Lightning, with the callback and without."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

import phasewatch as pw

pytestmark = pytest.mark.slow


def two_ranks(trainer, folder, kind, **order):
    """What each rank left."""
    pytest.importorskip({"hugging_face": "transformers"}.get(trainer, trainer))
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed", reason="trains with DeepSpeed: pip install deepspeed")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [sys.executable, str(Path(__file__).with_name(f"{trainer}_ranks.py"))]
    order = json.dumps({"folder": str(folder), "kind": kind, **order})
    processes = []
    for rank in ("0", "1"):
        of = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
        of |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([*command, order, rank], env=environment(**of), **pipes))
    left = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        lines = [line for line in out.splitlines() if line.startswith('{"')]
        assert lines, err
        left.append(json.loads(lines[-1]))
    return left


@pytest.mark.parametrize(
    ("trainer", "kind"),
    [
        *(("hugging_face", kind) for kind in ("ddp", "zero1", "zero2", "zero3", "zero3 loaded")),
        *(("lightning", kind) for kind in ("ddp", "fsdp2", "tp")),
    ],
)
def test_every_rank_trains_bit_identically_and_the_snapshots_are_whole(trainer, kind, tmp_path):
    for rank in two_ranks(trainer, tmp_path, kind):
        assert rank.keys() == {"without", "inline", "background"}, rank
        assert len({*rank.values()}) == 1
    inline, background = (
        list(pw.Trajectory.read(tmp_path / measure / "phasewatch/points.jsonl")) for measure in ("inline", "background")
    )
    assert [point.step for point in inline] == [2, 4, 6]
    assert inline == background


@pytest.mark.parametrize(
    ("trainer", "kind", "order", "said"),
    [
        ("hugging_face", "ddp", {"stream": True}, "the training data is a Stream, which can only be iterated"),
        ("hugging_face", "zero3", {"stream": True}, "the training data is a Stream, which can only be iterated"),
        ("lightning", "fsdp2", {"late": True}, "had no weights yet as the trainer began (configure_model makes them)"),
    ],
)
def test_what_rank_0_cannot_measure_ends_every_rank_with_its_sentence(trainer, kind, order, said, tmp_path):
    first, second = two_ranks(trainer, tmp_path, kind, **order)
    assert said in first["said"]
    assert second["said"] == f"Rank 0 has no monitor: {first['said']}"
