"""A model whose weights are spread over processes has the λ̂ of the plain one, however many processes there are."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import environment

import phasewatch as pw
from tests.laws.sharded_ranks import measured

SCRIPT = Path(__file__).with_name("sharded_ranks.py")


def of_ranks(*groups):
    """What each rank found, by group. A group is its folder, its size, what it measures, and what it does then."""
    orders = [dict(zip(("folder", "size", "measure", "then"), group, strict=True)) for group in groups]
    command = [sys.executable, str(SCRIPT), *(json.dumps(order, default=str) for order in orders)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    said = [path.read_text() for folder, *_ in groups for path in folder.glob("*.err")]
    assert done.returncode == 0, "\n".join([done.stderr, *said])
    return [[found_by(folder / f"rank-{rank}.out") for rank in range(size)] for folder, size, *_ in groups]


def found_by(path):
    lines = path.read_text().splitlines()
    return {name: left for line in lines if line[0] == "{" for name, left in json.loads(line).items()}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Of three ranks, where 99 rows are not a multiple of 3, and some parameters have fewer than 3 rows; and of two."""
    of_three, of_two = (tmp_path_factory.mktemp(name) for name in ("three", "two"))
    measure = [("fsdp", "momentum"), ("double", "kappa"), ("recurrent", "sgld"), ("pairwise", "sgld"), ("tp", "kappa")]
    then = ("held_at_once", "replayed", "misuse", "dies")
    three, two = of_ranks((of_three, 3, [("double", "langevin")], ["unsharded_on_rank_1"]), (of_two, 2, measure, then))
    return {2: two, 3: three, "folder of two": of_two}


@pytest.fixture
def two_ranks(groups):
    return groups[2]


@pytest.fixture
def three_ranks(groups):
    return groups[3]


@cache
def plain(kind, sampler):
    return json.loads(json.dumps(measured(kind, sampler, sharded=False)))


FLOAT64 = {"double", "recurrent"}


def check(found, what, size):
    kind, sampler = what.split()
    expected = plain(kind, sampler)
    assert all(other[what] == found[0][what] for other in found)
    point = found[0][what]
    assert point["again"]
    assert point["settings"] == expected["settings"]
    assert [point["loss"], point["metric"]] == pytest.approx([expected["loss"], expected["metric"]], rel=1e-6)
    assert point["estimates"].keys() == expected["estimates"].keys()
    for name, (value, error, health) in point["estimates"].items():
        assert value == pytest.approx(expected["estimates"][name][0], rel=1e-9 if kind in FLOAT64 else 1e-5)
        assert error == pytest.approx(expected["estimates"][name][1], rel=1e-9 if kind in FLOAT64 else 1e-4)
        assert health == expected["estimates"][name][2]
    assert f"in place, on the shards of {size} process" in point["path"]


def test_one_process_has_the_llc_of_the_plain_model(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = json.loads(json.dumps({"double momentum": measured("double", "momentum", sharded=True)}))
    finally:
        dist.destroy_process_group()
    check([found], "double momentum", 1)


@pytest.mark.parametrize("what", ["fsdp momentum", "double kappa", "recurrent sgld", "pairwise sgld", "tp kappa"])
def test_two_processes_have_the_llc_of_the_plain_model(what, two_ranks):
    check(two_ranks, what, 2)
    part = "1/2" if what in {"fsdp momentum", "double kappa", "recurrent sgld"} else "all"
    assert f"each with {part} of a minibatch" in two_ranks[0][what]["path"]


def test_new_gradients_are_dropped_as_they_come(two_ranks):
    assert [rank["held_at_once"] for rank in two_ranks] == [0, 0]


def test_three_processes_have_the_llc_of_the_plain_model(three_ranks):
    check(three_ranks, "double langevin", 3)


@pytest.mark.slow
def test_four_ranks_in_a_mesh_of_two_axes(tmp_path):
    (found,) = of_ranks((tmp_path, 4, [("both", "sgld"), ("both", "kappa"), ("hsdp", "momentum")], []))
    for what in ("both sgld", "both kappa", "hsdp momentum"):
        check(found, what, 4)


SENTENCES = {
    "a module": "Give the function that builds it",
    "the model in training": "didn't build, perhaps the one in training",
    "seeds": "seed differs: 0 on rank 0, and 1 on rank 1",
    "models": "weights differs",
    "losses": "so they don't hold one model",
    "gradients": "the loss changes by 0.5 of what the gradient says",
    "shapes": "scale has shape (2,)",
    "snapshots": "weights differs",
    "steps": "steps differs: [7] on rank 0, and [8] on rank 1",
    "samplers": "sampler differs",
    "device": "'meta'",
    "fails": "failed on a minibatch of data",
    "shape of the loss": "must return a scalar tensor",
    "another model": "reaches no parameter of the model",
    "after all that": "nothing",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_misuse_ends_in_a_sentence_on_every_process(name, two_ranks):
    for rank in two_ranks:
        assert SENTENCES[name] in rank["misuse"][name]


def test_a_process_that_dies_ends_the_others_with_a_sentence(two_ranks):
    first, second = two_ranks
    assert "no longer work together" in first["dies"]
    assert "dies" not in second


def test_a_process_that_builds_an_unsharded_model_ends_the_others_with_a_sentence(three_ranks):
    first, second, third = (rank["unsharded_on_rank_1"] for rank in three_ranks)
    assert second == "nothing"
    for said in (first, third):
        assert "ended or hangs, built another model" in said


def test_every_rank_replays_and_rank_0_writes(groups):
    leader, follower = (rank["replayed"] for rank in groups[2])
    first, rest, lacking = leader["values"]
    assert [step for step, _ in rest] == [1, 2, 3]
    assert (first, lacking) == (rest[:1], rest[:2])
    assert follower["values"] == [first, rest[1:], lacking]  # what is measured now
    points = pw.Trajectory.read(groups["folder of two"] / "run" / "points.jsonl")
    assert [[point.step, point.llc.value] for point in points] == rest
    assert len(leader["said"]) == 1
    assert leader["said"][0].startswith("Step 3 is left out")
    assert follower["said"] == []
    for found in (leader, follower):
        assert "measures on rank 0 alone, and this probe's model is spread over several processes" in found["monitor"]
        assert "go with a probe of a whole model" in found["workers"]
        assert found["bytes"] > 0
    assert "can't be written to" in leader["taken"]
    assert follower["taken"] == "nothing"
