"""A model whose weights are spread over processes has the λ̂ of the plain one, however many processes there are."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from processes import environment

from tests.laws.sharded_ranks import measured

SCRIPT = Path(__file__).with_name("sharded_ranks.py")


def ranks(folder, size, fails=(), **order):
    """What each rank printed; None for one that is to fail."""
    order = {"store": str(folder / "store"), "size": size, **order}
    command = [sys.executable, str(SCRIPT), json.dumps(order)]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        for rank in range(size)
    ]
    found = []
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=240)
        assert (process.returncode != 0) == (rank in fails), err.decode()
        found.append(None if rank in fails else json.loads(out.decode().splitlines()[-1]))
    return found


@cache
def plain(kind, sampler):
    return json.loads(json.dumps(measured(kind, sampler, sharded=False)))


def check(folder, size, *what):
    first, *others = ranks(folder, size, measure=what)
    assert all(other == first for other in others)
    for kind, sampler in what:
        found, expected = first[f"{kind} {sampler}"], plain(kind, sampler)
        assert found["again"]
        assert found["settings"] == expected["settings"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["metric"] == pytest.approx(expected["metric"], rel=1e-6)
        assert found["estimates"].keys() == expected["estimates"].keys()
        for name, (value, error, health) in found["estimates"].items():
            assert value == pytest.approx(expected["estimates"][name][0], rel=1e-9 if kind == "double" else 1e-5)
            assert error == pytest.approx(expected["estimates"][name][1], rel=1e-9 if kind == "double" else 1e-4)
            assert health == expected["estimates"][name][2]
        assert f"in place, on the shards of {size} processes" in found["path"]
    return first


def test_one_rank(tmp_path):
    check(tmp_path, 1, ("fsdp", "langevin"))


def test_two_ranks(tmp_path):
    found = check(
        tmp_path, 2, ("fsdp", "momentum"), ("double", "kappa"), ("pairwise", "sgld"), ("tp", "langevin"), ("tp", "kappa")
    )
    assert "each with 1/2 of a minibatch" in found["fsdp momentum"]["path"]
    assert "each with all of a minibatch" in found["pairwise sgld"]["path"]
    assert "each with all of a minibatch" in found["tp kappa"]["path"]


def test_three_ranks_with_shards_of_unequal_sizes_and_none(tmp_path):
    check(tmp_path, 3, ("fsdp", "sgld"), ("double", "langevin"))


@pytest.mark.slow
def test_four_ranks_in_a_mesh_of_two_axes(tmp_path):
    check(tmp_path, 4, ("both", "sgld"), ("both", "kappa"), ("hsdp", "momentum"))


SENTENCES = {
    "a module": "Give the function that builds it",
    "the model in training": "didn't build, perhaps the one in training",
    "seeds": "seed differs: 0 on rank 0, and 1 on rank 1",
    "models": "weights differs",
    "weights": "so they don't hold one model",
    "sums": "the loss changes by 0.5 of what the gradient says",
    "shapes": "scale has shape (2,)",
    "snapshots": "weights differs",
    "steps": "steps differs: [0] on rank 0, and [1] on rank 1",
    "samplers": "sampler differs",
    "device": "'meta'",
    "fails": "failed on a minibatch of data",
    "shape of the loss": "must return a scalar tensor",
    "another model": "reaches no parameter of the model",
    "after all that": "nothing",
}


def test_misuse_ends_in_a_sentence_on_every_rank(tmp_path):
    for rank in ranks(tmp_path, 2, misuse="misuse"):
        assert rank.keys() == SENTENCES.keys()
        for name, sentence in SENTENCES.items():
            assert sentence in rank[name], name


def test_a_rank_that_dies_or_builds_an_unsharded_model_ends_the_others_with_a_sentence(tmp_path):
    for misuse in ("dies", "unsharded_on_rank_1"):
        (tmp_path / misuse).mkdir()
        left = ranks(tmp_path / misuse, 2, fails=(1,) * (misuse == "dies"), misuse=misuse)
        assert "no longer work together" in left[0]["measured"]
        assert "ended or hangs, built another model" in left[0]["measured"]
