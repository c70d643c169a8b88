"""Distributed checkpoints: of any number of ranks, in pieces that are checked, and nothing that they name is run."""

import json
import os
import pickle

import pytest
import torch
from checkpoint_layouts import deepspeed_3, hf_dcp, save_by_ranks, save_distributed, torchtitan, weights
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.formats.pieces import Piece, Pieces
from phasewatch.monitor.snapshots.series import open_series

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def load(folder, step=1):
    return open_series(folder).load(step).tensors


def refusal(folder):
    with pytest.raises(PhasewatchError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_any_number_of_ranks(tmp_path, ranks):
    """The last ranks of seven hold nothing of a tensor of five rows."""
    save_by_ranks(tmp_path / "step-1", lambda model: {"model": model}, ranks, weights(1))
    found = load(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(1).items())
    import torch.distributed.checkpoint as dcp

    theirs = {"model": {name: torch.zeros_like(tensor) for name, tensor in weights(1).items()}}
    dcp.load(theirs, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs["model"].items())


def test_dtypes_scalars_and_what_is_no_tensor(tmp_path):
    state = {name: torch.arange(6).to(getattr(torch, name)).reshape(2, 3) for name in ("bfloat16", "int64", "bool")}
    state |= {
        "one": torch.tensor(3),
        "none": torch.empty(0, 2),
        "text": "a",
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    save_distributed(tmp_path / "step-1", {"model": state, "epoch": 3})
    found = load(tmp_path)
    assert found.keys() == state.keys() - {"text"}
    for name, tensor in found.items():
        assert tensor.dtype == state[name].dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, state[name])


def test_a_model_whose_names_begin_with_model_is_whole(tmp_path):
    state = {"model.layers.weight": torch.ones(2), "lm_head.weight": torch.zeros(2)}
    save_distributed(tmp_path / "step-1", state)
    assert load(tmp_path).keys() == state.keys()


def test_the_optimizers_pieces_are_not_read(tmp_path):
    torchtitan(tmp_path, 1)
    other = tmp_path / "step-1" / "__2_0.distcp"
    found = load(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(1).items())
    other.write_bytes(b"")
    assert "__2_0.distcp is empty, cut off" in refusal(tmp_path)


class Runs:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def changed(folder, change):
    """The folder's metadata, changed by a function."""
    file = folder / "step-1" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def test_what_a_metadata_would_run_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    folder = tmp_path / "series"
    save_distributed(folder / "step-1", {"model": weights(1)})

    def hide(metadata):
        metadata.planner_data[Runs(trace)] = Runs(trace)
        metadata.state_dict_metadata["x"] = Runs(trace)
        metadata.storage_data[MetadataIndex("model.head.bias")] = Runs(trace)

    changed(folder, hide)
    refusal(folder)
    (folder / "step-1" / ".metadata").write_bytes(pickle.dumps(Runs(trace)))
    assert ".metadata is empty, cut off, or not a checkpoint" in refusal(folder)
    assert not trace.exists()


def test_what_a_piece_would_run_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    folder = tmp_path / "series"
    save_distributed(folder / "step-1", {"model": {"w": torch.ones(500)}})
    hostile = tmp_path / "hostile"
    torch.save(Runs(trace), hostile)

    def point_there(metadata):
        (info,) = metadata.storage_data.values()
        info.relative_path, info.offset, info.length = "hostile", 0, 4000

    changed(folder, point_there)
    hostile.rename(folder / "step-1" / "hostile")
    refusal(folder)
    assert not trace.exists()


def first(mapping):
    return next(iter(mapping.values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(first(m.storage_data), "relative_path", "../x.distcp"), "which isn't a file beside it"),
        (lambda m: setattr(first(m.storage_data), "relative_path", "x.distcp"), "names x.distcp, which isn't there"),
        (lambda m: setattr(first(m.storage_data), "transform_descriptors", ["zstd"]), r"packed pieces \(\['zstd'\]\)"),
        (lambda m: setattr(first(m.storage_data), "length", 3), "not a checkpoint at all"),
        (lambda m: setattr(first(m.storage_data), "offset", 10**9), "not a checkpoint at all"),
        (lambda m: setattr(first(m.storage_data), "offset", "a"), "not a checkpoint at all"),
        (lambda m: m.storage_data.clear(), "not a checkpoint at all"),
        (lambda m: setattr(first(m.state_dict_metadata), "size", torch.Size([10**12])), "not a checkpoint at all"),
        (lambda m: first(m.state_dict_metadata).chunks.clear(), "not a checkpoint at all"),
        (
            lambda m: first(m.state_dict_metadata).chunks.append(
                ChunkStorageMetadata(torch.Size([10**12]), torch.Size([10**12]))
            ),
            "not a checkpoint at all",
        ),
        (lambda m: m.state_dict_metadata.clear(), r"holds a dict without a state dict \(nothing\)"),
    ],
)
def test_metadata_that_lies(tmp_path, change, words):
    save_distributed(tmp_path / "step-1", {"model": {"w": torch.ones(500)}})
    changed(tmp_path, change)
    with pytest.raises(PhasewatchError, match=words):
        load(tmp_path)


@pytest.mark.parametrize(
    ("size", "pieces", "whole"),
    [
        ((4,), [((0,), (2,)), ((2,), (2,))], True),
        ((4,), [((0,), (3,)), ((2,), (2,))], False),
        ((4,), [((0,), (2,)), ((1,), (2,))], False),
        ((2, 2), [((0, 0), (2, 1)), ((0, 1), (1, 1)), ((1, 1), (1, 1))], True),
        ((2, 2), [((0, 0), (1, 2)), ((0, 0), (2, 1))], False),
        ((2, 2), [((0, 0), (2, 3))], False),
        ((), [((), ())], True),
        ((), [], False),
        ((0, 3), [], True),
        ((4,), [((0,), (4,)), ((4,), (0,))], True),
        ((4,), [((0, 0), (4, 1))], False),
        ((-4,), [((0,), (4,))], False),
        ((4.0,), [((0,), (4,))], False),
    ],
)
def test_pieces_make_up_a_tensor_or_are_refused(size, pieces, whole):
    tensor = Pieces(torch.float32, size, {Piece(*piece): None for piece in pieces})
    if whole:
        tensor.check()
    else:
        with pytest.raises(ValueError, match=r"piece|shape"):
            tensor.check()


def test_pieces_in_safetensors_that_are_missing_or_overlap(tmp_path):
    hf_dcp(tmp_path, 1)
    first, second = sorted((tmp_path / "step-1").glob("shard-*"))
    content = second.read_bytes()
    second.unlink()
    found = load(tmp_path)  # a rank's file less, and nothing tells how many there were
    assert len(found["head.bias"]) == 3
    info = {name: {"saved_offsets": [1, 0][: tensor.dim()]} for name, tensor in load_file(first).items()}
    save_file(load_file(first), second, metadata={"DCP_SHARDING_INFO": json.dumps(info)})
    assert "not a checkpoint at all" in refusal(tmp_path)
    second.write_bytes(content)
    assert torch.equal(load(tmp_path)["head.bias"], weights(1)["head.bias"])


def test_a_rank_of_zero_3_that_is_missing(tmp_path):
    deepspeed_3(tmp_path, 1)
    (tmp_path / "global_step1" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    assert "global_step1 holds 2 of 3 files *_optim_states.pt; copy the checkpoint again." in refusal(tmp_path)
    for file in (tmp_path / "global_step1").glob("*_optim_states.pt"):
        file.unlink()
    assert "global_step1 holds no *_optim_states.pt, which have the weights; copy them too." in refusal(tmp_path)


@pytest.mark.slow
def test_fully_sharded_on_two_processes(tmp_path):
    """FSDP2 of torch on two processes of this machine writes it, as torchtitan does."""
    import torch.multiprocessing as mp

    mp.spawn(_train_sharded, (str(tmp_path),), nprocs=2)
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    found = load(tmp_path / "series")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _train_sharded(rank, folder):
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    own, state = get_state_dict(model, optimizer)
    dcp.save({**own, "optimizer": state}, checkpoint_id=f"{folder}/series/step-1")
    whole, _ = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pt")
    dist.barrier()
    dist.destroy_process_group()
