"""Two ranks of a distributed training, with a monitor on each and without: bit-identical, and none waits for ever."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from law_models import classify
from processes import environment

import phasewatch as pw


def two_ranks(folder: Path, **order):
    """What each rank left; an empty dict for one that was killed."""
    folder.mkdir(exist_ok=True)
    order = {"store": str(folder / "store"), "folder": str(folder), "who": "all", **order}
    script = str(Path(__file__).with_name("ranks.py"))
    subprocess.run([sys.executable, script, json.dumps(order)], env=environment(), timeout=280, check=True)
    left = []
    for rank in range(2):
        out, err = ((folder / f"rank-{rank}.{name}").read_text() for name in ("out", "err"))
        lines = [line for line in out.splitlines() if line.startswith("{")]
        assert lines or rank == order.get("dies", [None])[0], err
        left.append({**(json.loads(lines[-1]) if lines else {}), "stderr": err})
    return left


def points(folder: Path):
    return pw.Trajectory.read(folder / "points.jsonl")


FSDP1 = "fsdp1", "fsdp1 with original parameters"
DEEPSPEED = "zero1", "zero2", "zero3", "zero3 loaded"


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(("ddp", "fsdp2"), id="ddp and fsdp2"),
        pytest.param(FSDP1, id="fsdp1", marks=pytest.mark.slow),
        pytest.param(("tp",), id="tensor parallelism", marks=pytest.mark.slow),
        pytest.param(DEEPSPEED, id="deepspeed", marks=pytest.mark.slow),
    ],
)
def test_every_rank_trains_bit_identically_and_rank_0_writes(kinds, tmp_path):
    if kinds == DEEPSPEED:
        pytest.importorskip("deepspeed", reason="trains with DeepSpeed: pip install deepspeed")
    trainings = [(kind, measure) for kind in kinds for measure in (None, "inline", "background")]
    left = two_ranks(tmp_path, trainings=trainings)
    measured = {}
    for kind in kinds:
        for rank in left:
            assert rank.keys() == {f"{kind}-{measure}" for kind, measure in trainings} | {"stderr"}, rank
            assert rank[f"{kind}-None"] == rank[f"{kind}-inline"] == rank[f"{kind}-background"]
        one_stream = left[0][f"{kind}-None"]["stream"] == left[1][f"{kind}-None"]["stream"]
        assert one_stream == (kind == "tp")
        inline, background = (points(tmp_path / f"{kind}-{measure}") for measure in ("inline", "background"))
        assert inline.steps.tolist() == [2, 4]
        assert list(inline) == list(background)
        snapshots = tmp_path / f"{kind}-inline" / "snapshots"
        assert {path.name for path in snapshots.iterdir()} == {f"step-0000000{n}.safetensors" for n in (2, 4)}
        measured[kind] = inline
    for other in kinds[1:]:  # the same training, whose sums are taken in another order
        assert measured[other].loss == pytest.approx(measured[kinds[0]].loss, rel=1e-4)
        assert measured[other].llc == pytest.approx(measured[kinds[0]].llc, abs=1e-3)


@pytest.mark.slow
def test_measuring_may_take_longer_than_the_process_groups_timeout(tmp_path):
    left = two_ranks(tmp_path / "work", trainings=[("ddp", "inline")], timeout=6, **{"measuring takes": 9})
    assert all("ddp-inline" in rank for rank in left), left
    assert points(tmp_path / "work" / "ddp-inline").steps.tolist() == [2, 4]


@pytest.mark.slow
def test_a_monitor_on_rank_0_alone_measures_in_the_background(tmp_path):
    left = two_ranks(tmp_path / "work", trainings=[("ddp", "inline")], who="first")
    assert all("ddp-inline" in rank for rank in left), left
    assert "made on one rank of a distributed training, so it measures in the background" in left[0]["stderr"]
    assert points(tmp_path / "work" / "ddp-inline").steps.tolist() == [2, 4]


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_ranks_that_disagree_about_the_folder_stop_with_a_sentence(kind, tmp_path):
    left = two_ranks(tmp_path / "work", trainings=[(kind, "inline")], runs=["a", "b"])
    for rank in left:
        assert "PhaseMonitor(run=...) differs between the ranks of this training" in rank["said"]
        assert str(tmp_path / "work" / "a") in rank["said"]
    assert not (tmp_path / "work" / "b").exists()


@pytest.mark.slow
def test_when_a_rank_dies_in_a_gather_the_other_says_so_and_what_is_written_stays(tmp_path):
    left = two_ranks(tmp_path / "work", trainings=[("fsdp2", "inline")], dies=[1, 4], timeout=8)
    assert left[0]["said"].startswith("The weights of step 4 can't be gathered from the processes of this training")
    assert points(tmp_path / "work" / "fsdp2-inline").steps.tolist() == [2]


@pytest.mark.slow
def test_when_rank_0_dies_while_others_wait_they_say_so(tmp_path):
    left = two_ranks(tmp_path / "work", trainings=[("ddp", "inline")], dies=[0, 4], dead=3)
    assert "rank 0 has ended, hangs, or isn't at that step" in left[1]["said"]
    assert points(tmp_path / "work" / "ddp-inline").steps.tolist() == [2]


def test_a_probe_of_a_sharded_model_is_refused_in_words():
    import torch.distributed as dist
    from torch import nn, randn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(nn.Linear(6, 3), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            pw.PhasewatchError, match=r"spread over several processes.*Give the function that builds it"
        ):
            pw.Probe(model, classify, (randn(64, 6), randn(64)))
        with pytest.raises(pw.PhasewatchError, match=r"Have PhaseMonitor gather them, called on every rank"):
            pw.Snapshot.of(model, 1)
    finally:
        dist.destroy_process_group()
