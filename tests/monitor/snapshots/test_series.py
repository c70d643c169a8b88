"""Every form of checkpoint series is built as real files and read back against the weights that were saved."""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.folder import SnapshotFolder
from phasewatch.monitor.snapshots.series import Series, open_series
from phasewatch.monitor.snapshots.snapshot import Snapshot


def weights(step: int) -> dict[str, Tensor]:
    """Weights that tell their step, of several dtypes and shapes, a buffer among them."""
    generator = torch.Generator().manual_seed(step)
    return {
        "embed.weight": torch.randn(7, 3, generator=generator),
        "norm.running_mean": torch.randn(3, generator=generator, dtype=torch.float64),
        "norm.num_batches_tracked": torch.tensor(step),
        "head.weight": torch.randn(3, 7, generator=generator).to(torch.bfloat16),
    }


def save(path: Path, content) -> Path:
    """`content` as the suffix of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def save_shards(folder: Path, tensors: dict[str, Tensor], stem: str, suffix: str) -> None:
    """`tensors` as Hugging Face shards them: two files, and an index of which tensor lies in which."""
    names = sorted(tensors)
    shard_of = {}
    for i, part in enumerate((names[:2], names[2:]), start=1):
        shard = f"{stem}-{i:05d}-of-00002{suffix}"
        save(folder / shard, {name: tensors[name] for name in part})
        shard_of |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": shard_of}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def optimizer_state() -> dict:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def assert_weights(snapshot: Snapshot, expected: dict[str, Tensor]) -> None:
    assert set(snapshot.tensors) == set(expected)
    for name, tensor in snapshot.tensors.items():
        assert type(tensor) is Tensor
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


# The series itself


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_state_dicts_in_natural_order(tmp_path, suffix):
    for step in (1000, 20, 100):
        save(tmp_path / f"model_{step}{suffix}", weights(step))
    series = open_series(str(tmp_path))
    assert series.steps == (20, 100, 1000)
    assert len(series) == 3
    assert series.path == tmp_path
    assert series.left_out == ()
    assert series.source(100) == tmp_path / f"model_100{suffix}"
    for step in series.steps:
        snapshot = series.load(step)
        assert snapshot.step == step
        assert_weights(snapshot, weights(step))


def test_iterates_lazily_in_order(tmp_path):
    for step in (1, 2):
        save(tmp_path / f"step{step}.pt", weights(step))
    series = open_series(tmp_path)
    snapshots = iter(series)
    assert next(snapshots).step == 1
    save(tmp_path / "step2.pt", {"late": torch.ones(1)})
    assert set(next(snapshots).tensors) == {"late"}
    assert [snapshot.step for snapshot in series] == [1, 2]


def test_travels_to_another_process(tmp_path):
    save(tmp_path / "step3.pt", weights(3))
    series = open_series(tmp_path)
    copy = pickle.loads(pickle.dumps(series))
    assert isinstance(copy, Series)
    assert copy == series
    assert_weights(copy.load(3), weights(3))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_snapshots_outlive_their_file(tmp_path, suffix):
    file = save(tmp_path / f"step3{suffix}", weights(3))
    snapshot = open_series(tmp_path).load(3)
    with file.open("r+b") as opened:  # in place, so that memory-mapped tensors would see it
        opened.write(bytes(file.stat().st_size))
    assert_weights(snapshot, weights(3))


def test_run_folder_of_our_own(tmp_path):
    for step in (0, 1234):
        save(tmp_path / "icl" / "snapshots" / f"step-{step:08d}.safetensors", weights(step))
    (tmp_path / "icl" / "run.json").write_text("{}")
    (tmp_path / "icl" / "points.jsonl").write_text("")
    series = open_series(tmp_path / "icl")
    assert series.steps == (0, 1234)
    assert series == SnapshotFolder(tmp_path / "icl" / "snapshots")
    assert series == open_series(tmp_path / "icl" / "snapshots")
    assert_weights(series.load(1234), weights(1234))


# Steps


def test_names_without_a_step_are_left_out(tmp_path):
    save(tmp_path / "step10.pt", weights(10))
    for name in ("final.pt", "best.safetensors", "last/model.safetensors"):
        save(tmp_path / name, weights(1))
    for name in ("a.pt", "b.pt"):
        save(tmp_path / "step20" / name, weights(20))
    (tmp_path / "broken.pt").write_bytes(b"")
    (tmp_path / "README.md").write_text("step 3")
    (tmp_path / "log_5.txt").write_text("")
    (tmp_path / "figures_7").mkdir()
    (tmp_path / "._step11.pt").write_bytes(b"left by a mac")
    save(tmp_path / ".trash-12" / "model.pt", weights(12))
    series = open_series(tmp_path)
    assert series.steps == (10,)
    assert series.left_out == ("best.safetensors", "broken.pt", "final.pt", "last", "step20")


@pytest.mark.parametrize("key", ["global_step", "step", "iteration", "iter_num", "step_count"])
def test_a_name_without_a_step_is_read_for_one(tmp_path, key):
    save(tmp_path / "final.pt", {key: 70, "model": weights(70)})
    save(tmp_path / "best.ckpt", {key: True, "model": weights(1)})
    save(tmp_path / "first.ckpt", {key: -1, "model": weights(1)})
    save(tmp_path / "model_60.pt", {key: 999, "model": weights(60)})
    series = open_series(tmp_path)
    assert series.steps == (70, 999)
    assert series.left_out == ("best.ckpt", "first.ckpt")
    assert_weights(series.load(70), weights(70))


def test_names_with_steps_need_no_readable_file(tmp_path):
    (tmp_path / "step1.pt").write_bytes(b"")
    assert open_series(tmp_path).steps == (1,)


def test_a_nameless_copy_of_a_named_step_is_left_out(tmp_path):
    for name in ("epoch=3-step=400.ckpt", "last.ckpt"):
        save(tmp_path / name, {"global_step": 400, "state_dict": weights(400)})
    series = open_series(tmp_path)
    assert series.steps == (400,)
    assert series.source(400).name == "epoch=3-step=400.ckpt"
    assert series.left_out == ("last.ckpt",)


# Folders


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_hugging_face_trainer(tmp_path, form):
    for step in (500, 1000):
        folder = tmp_path / f"checkpoint-{step}"
        if form.startswith("sharded"):
            stem, suffix = ("model", ".safetensors") if "safetensors" in form else ("pytorch_model", ".bin")
            save_shards(folder, weights(step), stem, suffix)
        else:
            save(folder / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin"), weights(step))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            save(folder / name, {"state": torch.ones(1)})
        save(folder / "training_args.bin", argparse.Namespace(learning_rate=0.1))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save(tmp_path / "training_args.bin", argparse.Namespace(learning_rate=0.1))
    series = open_series(tmp_path)
    assert series.steps == (500, 1000)
    assert series.left_out == ()
    for step in series.steps:
        assert series.source(step).parent == tmp_path / f"checkpoint-{step}"
        assert_weights(series.load(step), weights(step))


def test_trainer_state_goes_before_the_name(tmp_path):
    for name, state in {
        "checkpoint-1": '{"global_step": 300}',
        "last": '{"global_step": 400}',
        "checkpoint-500": '{"global_st',
        "checkpoint-600": '{"global_step": null}',
        "checkpoint-700": "[]",
    }.items():
        save(tmp_path / name / "model.safetensors", weights(1))
        (tmp_path / name / "trainer_state.json").write_text(state)
    assert open_series(tmp_path).steps == (300, 400, 500, 600, 700)


def test_safetensors_go_before_pickles(tmp_path):
    save(tmp_path / "checkpoint-5" / "pytorch_model.bin", weights(1))
    save(tmp_path / "checkpoint-5" / "model.safetensors", weights(5))
    assert_weights(open_series(tmp_path).load(5), weights(5))


def test_folders_of_one_file(tmp_path):
    save(tmp_path / "step1000" / "weights.pt", weights(1000))
    (tmp_path / "step1000" / "._weights.pt").write_bytes(b"left by a mac")
    save(tmp_path / "step2000-lr0.1" / "consolidated.00.pth", weights(2000))
    save(tmp_path / "global_step3000" / "mp_rank_00_model_states.pt", {"module": weights(3000), "dp_world_size": 1})
    save(tmp_path / "global_step3000" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"x": torch.ones(1)})
    series = open_series(tmp_path)
    assert series.steps == (1000, 2000, 3000)
    for step in series.steps:
        assert_weights(series.load(step), weights(step))


def test_optimizers_next_to_models_are_no_rivals(tmp_path):
    save(tmp_path / "model_100.pt", weights(100))
    for name in ("Optimizer_100.pt", "model_100_optim.pt", "scheduler_100.pt", "rng_state_100.pth", "scaler_100.pt"):
        save(tmp_path / name, {"state": torch.ones(1)})
    series = open_series(tmp_path)
    assert series.steps == (100,)
    assert series.source(100).name == "model_100.pt"


def test_olmo_composer_timm_and_nanogpt(tmp_path):
    for name in ("model", "optim", "train"):
        content = weights(1000) if name == "model" else {"global_step": 7}
        save(tmp_path / "olmo" / "step1000-unsharded" / f"{name}.pt", content)
    save(tmp_path / "composer" / "ep0-ba1000-rank0.pt", {"state": {"model": weights(1000)}})
    save(tmp_path / "nanogpt" / "ckpt.pt", {"model": weights(1000), "iter_num": 1000})
    save(tmp_path / "runs" / "a" / "ckpt.pt", {"model": weights(1000), "iter_num": 1000})
    save(tmp_path / "timm" / "checkpoint-1000.pth.tar", {"state_dict": weights(1000)})
    for name in ("olmo", "composer", "nanogpt", "runs", "timm"):
        series = open_series(tmp_path / name)
        assert series.steps == (1000,), name
        assert_weights(series.load(1000), weights(1000))


def test_branches_in_the_cache_of_a_hub(tmp_path):
    cache = tmp_path / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    for step in (0, 512, 143_000):
        commit = hashlib.sha1(str(step).encode()).hexdigest()
        save(cache / "snapshots" / commit / "model.safetensors", weights(step))
        (cache / "refs" / f"step{step}").write_text(commit)
    (cache / "refs" / "main").write_text(commit)
    (cache / "refs" / "outside").write_text("../../elsewhere")
    for path in (cache, cache / "snapshots"):
        series = open_series(path)
        assert series.steps == (0, 512, 143_000)
        assert series.left_out == ("main",)
        assert_weights(series.load(512), weights(512))


def test_the_reason_why_nothing_is_read(tmp_path):
    for name in ("a.pt", "b.pt"):
        save(tmp_path / "two" / "step20" / name, weights(20))
    with pytest.raises(PhasewatchError, match=r"step20 holds a\.pt and b\.pt, and it isn't clear which one to read"):
        open_series(tmp_path / "two")
    save(tmp_path / "logs" / "version_0" / "checkpoints" / "step=5.ckpt", weights(5))
    with pytest.raises(PhasewatchError, match=r"version_0 holds no checkpoint itself; version_0/checkpoints does"):
        open_series(tmp_path / "logs")


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    save(tmp_path / "step5.pt", weights(5))
    (tmp_path / "step6").mkdir()
    os.mkfifo(tmp_path / "step6" / name)
    assert open_series(tmp_path).steps == (5,)


# What a file holds


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module", "net", "params"])
def test_nested_next_to_training_state(tmp_path, key):
    content = {
        "epoch": 3,
        "loss": torch.tensor(0.3),
        "optimizer": optimizer_state(),
        "lr_scheduler": {"last": torch.ones(1)},
        "rng_state": {"cpu": torch.get_rng_state()},
        "ema_weights": {"embed.weight": torch.zeros(1)},
        key: OrderedDict(weights(5)),
    }
    save(tmp_path / "step5.pt", content)
    assert_weights(open_series(tmp_path).load(5), weights(5))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state": {"model": state, "optimizers": optimizer_state()}, "rng": {"cpu": torch.ones(1)}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"weights": state, "opt": optimizer_state(), "epoch": 3},
        lambda state: {
            "weights": state,
            "adam": {"state": {"a.weight": {"exp_avg": torch.ones(1)}}, "param_groups": []},
        },
    ],
)
def test_nested_deeper_or_under_another_key(tmp_path, wrap):
    save(tmp_path / "step5.pt", wrap(weights(5)))
    assert_weights(open_series(tmp_path).load(5), weights(5))


def test_what_is_not_a_tensor_is_ignored(tmp_path):
    extra = {"num_batches": 3, "fp8._extra_state": {"scale": torch.ones(2)}, "name": "gpt", 7: torch.ones(1)}
    save(tmp_path / "step5.pt", weights(5) | extra)
    assert_weights(open_series(tmp_path).load(5), weights(5))


def test_views_and_parameters_become_plain_tensors(tmp_path):
    matrix = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    save(tmp_path / "step5.pt", {"view": matrix.T, "parameter": nn.Parameter(matrix[:2])})
    snapshot = open_series(tmp_path).load(5)
    assert_weights(snapshot, {"view": matrix.T, "parameter": matrix[:2]})
    assert snapshot.tensors["parameter"].untyped_storage().nbytes() == 2 * 4 * 4


def test_files_of_old_torch(tmp_path):
    torch.save({"model": weights(5)}, tmp_path / "step5.pt", _use_new_zipfile_serialization=False)
    assert_weights(open_series(tmp_path).load(5), weights(5))


# Names


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "a._orig_mod."])
def test_names_are_those_in_the_file(tmp_path, prefix, suffix):
    own = {prefix + name: tensor for name, tensor in weights(5).items()}
    save(tmp_path / f"step5{suffix}", own)
    assert_weights(open_series(tmp_path).load(5), own)


# What is refused at open


def test_no_such_folder(tmp_path):
    with pytest.raises(PhasewatchError, match=r"open_series\('.*nothing'\): there is no such folder; give the folder"):
        open_series(tmp_path / "nothing")


def test_a_file(tmp_path):
    file = save(tmp_path / "step1.pt", weights(1))
    with pytest.raises(
        PhasewatchError, match=r"open_series\('.*step1.pt'\): this is a file; give the folder that holds"
    ):
        open_series(file)


def test_no_checkpoints_says_what_is_there(tmp_path):
    with pytest.raises(PhasewatchError, match=r"looked in .* for \.safetensors, \.pt.*found nothing; give the folder"):
        open_series(tmp_path)
    save(tmp_path / "final.pt", weights(1))
    (tmp_path / "README.md").write_text("")
    with pytest.raises(PhasewatchError, match=r"found no checkpoint that can be read: final\.pt carries no step, "):
        open_series(tmp_path)
    (tmp_path / "final.pt").unlink()
    for i in range(10):
        (tmp_path / f"log{i}.txt").write_text("")
    with pytest.raises(PhasewatchError, match=r"found README\.md, log0\.txt, log1\.txt, .* and 5 more; give"):
        open_series(tmp_path)


def test_one_checkpoint_is_not_a_series(tmp_path):
    save_shards(tmp_path / "checkpoint-5", weights(5), "model", ".safetensors")
    with pytest.raises(
        PhasewatchError, match=r"checkpoint-5 is one checkpoint, not a series; give the folder that holds"
    ):
        open_series(tmp_path / "checkpoint-5")
    save(tmp_path / "last" / "adapter_model.safetensors", weights(5))
    (tmp_path / "last" / "trainer_state.json").write_text('{"global_step": 5}')
    with pytest.raises(PhasewatchError, match="last is one checkpoint, not a series"):
        open_series(tmp_path / "last")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model_100.pt", "model_100.safetensors"),
        ("epoch=3-step=400-v1.ckpt", "epoch=3-step=400.ckpt"),
        ("checkpoint-7/model.safetensors", "step7.pt"),
    ],
)
def test_a_step_twice(tmp_path, first, second):
    for seed, name in enumerate((first, second)):
        save(tmp_path / name, weights(seed))
    names = rf"{first.split('/')[0]} and {second} are both of step \d+ and differ; move one of them out of"
    with pytest.raises(PhasewatchError, match=names):
        open_series(tmp_path)
    save(tmp_path / first, weights(1))
    series = open_series(tmp_path)
    assert len(series) == 1
    assert series.left_out == (second,)


@pytest.mark.parametrize("copy_name", ["last.ckpt", "epoch=1-step=200-last.ckpt", "best_step_200.ckpt"])
def test_a_copy_of_a_step_is_left_out(tmp_path, copy_name):
    for name in ("epoch=0-step=100.ckpt", "epoch=1-step=200.ckpt", copy_name):
        step = 100 if "100" in name else 200
        save(tmp_path / name, {"global_step": step, "state_dict": weights(step)})
    series = open_series(tmp_path)
    assert series.steps == (100, 200)
    assert len(series.left_out) == 1
    assert_weights(series.load(200), weights(200))


def test_a_step_twice_inside_files_without_one_in_the_name(tmp_path):
    for name in ("best.pt", "last.pt"):
        save(tmp_path / name, {"step": 9, "model": weights(ord(name[0]))})
    with pytest.raises(PhasewatchError, match=r"best\.pt and last\.pt are both of step 9"):
        open_series(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path):
    save(tmp_path / "checkpoint-5" / "model.safetensors", weights(5))
    (tmp_path / "checkpoint-5").chmod(0)
    with pytest.raises(
        PhasewatchError, match=r"checkpoint-5 can't be read \(Permission denied\); check its permissions"
    ):
        open_series(tmp_path)


# What is refused at load


def load_error(folder: Path, step: int = 5) -> str:
    with pytest.raises(PhasewatchError) as caught:
        open_series(folder).load(step)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert message.endswith(".")
    return message


def test_no_such_step(tmp_path):
    for step in (10, 100, 1000):
        save(tmp_path / f"step{step}.pt", weights(step))
    series = open_series(tmp_path)
    with pytest.raises(
        PhasewatchError, match="has no step 130: it has 3 steps from 10 to 1000, and the nearest is 100"
    ):
        series.load(130)
    with pytest.raises(PhasewatchError, match="has no step 0"):
        series.source(0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".old.pt"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.97])
def test_a_cut_file(tmp_path, suffix, keep):
    file = tmp_path / f"step5{suffix}"
    if suffix == ".old.pt":
        torch.save(weights(5), file, _use_new_zipfile_serialization=False)
    else:
        save(file, weights(5))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))])
    message = load_error(tmp_path)
    assert message.startswith((f"{file} is empty, cut off, or not a checkpoint at all", f"{file} is damaged: it has"))
    assert "copy it again" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256)), b"PK\x03\x04" * 9]
)
def test_a_file_of_something_else(tmp_path, suffix, content):
    (tmp_path / f"step5{suffix}").write_bytes(content)
    assert "not a checkpoint at all; copy it again, or move it out of the folder" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(3), "holds a Tensor, not a state dict; save model.state_dict()"),
        ([torch.ones(3)], "holds a list, not a state dict; save model.state_dict()"),
        (3, "holds a int, not a state dict"),
        ({"epoch": 3, "lr": 0.1}, "holds a dict without a state dict ('epoch', 'lr'); save model.state_dict()"),
        ({}, "holds a dict without a state dict (nothing)"),
        (optimizer_state(), "holds a dict without a state dict ('state', 'param_groups')"),
    ],
)
def test_not_a_state_dict(tmp_path, content, words):
    save(tmp_path / "step5.pt", content)
    message = load_error(tmp_path)
    assert message.startswith(f"{tmp_path / 'step5.pt'} holds a")
    assert words in message


def test_safetensors_without_tensors(tmp_path):
    save(tmp_path / "step5.safetensors", {})
    assert "step5.safetensors holds no tensors; save model.state_dict()" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"model": weights(1), "state_dict": weights(2), "epoch": 1}, "'model' and 'state_dict'"),
        ({"generator": weights(1), "critic": weights(2)}, "'generator' and 'critic'"),
        ({"state": {"model": weights(1), "net": weights(2)}}, "'state.model' and 'state.net'"),
        ({"weights": weights(1), "loss": torch.ones(())}, "at its top level and 'weights'"),
    ],
)
def test_two_state_dicts(tmp_path, content, keys):
    save(tmp_path / "step5.pt", content)
    assert f"step5.pt holds 2 state dicts, {keys}; save the one to measure as" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({}, "model.safetensors.index.json names no shard; copy the checkpoint again."),
        ({"w": "../other.safetensors"}, "names the shard '../other.safetensors', which isn't a file beside it"),
        ({"w": "/etc/passwd"}, "names the shard '/etc/passwd', which isn't a file beside it"),
        ({"w": "x" * 5000}, "can't be read (File name too long)"),
    ],
)
def test_an_index_that_leads_elsewhere(tmp_path, weight_map, words):
    save(tmp_path / "other.safetensors", weights(5))
    (tmp_path / "checkpoint-5").mkdir()
    index = tmp_path / "checkpoint-5" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert words in load_error(tmp_path)


@pytest.mark.parametrize(("stem", "suffix"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_a_missing_shard(tmp_path, stem, suffix):
    folder = tmp_path / "checkpoint-5"
    save_shards(folder, weights(5), stem, suffix)
    (folder / f"{stem}-00002-of-00002{suffix}").unlink()
    assert load_error(tmp_path) == (
        f"{folder / stem}{suffix}.index.json names the shard {stem}-00002-of-00002{suffix}, "
        "which isn't there; put it next to the index."
    )


def test_a_shard_that_lacks_a_tensor(tmp_path):
    folder = tmp_path / "checkpoint-5"
    save_shards(folder, weights(5), "model", ".safetensors")
    save(folder / "model-00001-of-00002.safetensors", {"embed.weight": torch.ones(1)})
    message = load_error(tmp_path)
    assert (
        "model-00001-of-00002.safetensors lacks head.weight, which model.safetensors.index.json puts there" in message
    )


@pytest.mark.parametrize("text", ["", '{"weight_map"', "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_broken_index(tmp_path, text):
    save_shards(tmp_path / "checkpoint-5", weights(5), "model", ".safetensors")
    (tmp_path / "checkpoint-5" / "model.safetensors.index.json").write_text(text)
    assert re.search(r"model\.safetensors\.index\.json is (empty, cut off|not JSON)", load_error(tmp_path))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_went_away(tmp_path, suffix):
    file = save(tmp_path / f"step5{suffix}", weights(5))
    series = open_series(tmp_path)
    file.unlink()
    with pytest.raises(
        PhasewatchError, match=rf"step5{suffix} is no longer there; put it back, or open the series again"
    ):
        series.load(5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_cannot_be_read(tmp_path, suffix):
    file = save(tmp_path / f"step5{suffix}", weights(5))
    series = open_series(tmp_path)
    file.unlink()
    file.symlink_to(file)  # a loop can't be opened by root either
    with pytest.raises(PhasewatchError, match=r"can't be read \(.*symbolic links.*\); check the path"):
        series.load(5)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_without_permission(tmp_path, suffix):
    save(tmp_path / f"step5{suffix}", weights(5)).chmod(0)
    assert "can't be read (Permission denied); check its permissions." in load_error(tmp_path)


def test_a_moved_folder_is_opened_again(tmp_path):
    save(tmp_path / "old" / "step5.pt", weights(5))
    series = open_series(tmp_path / "old")
    shutil.move(tmp_path / "old", tmp_path / "new")
    with pytest.raises(PhasewatchError, match="no longer there"):
        series.load(5)
    assert_weights(open_series(tmp_path / "new").load(5), weights(5))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_link_that_leads_out_is_refused(tmp_path, suffix):
    outside = save(tmp_path / f"outside{suffix}", weights(5))
    folder = tmp_path / "series"
    save(folder / f"step5{suffix}", weights(5)).unlink()
    (folder / f"step5{suffix}").symlink_to(outside)
    with pytest.raises(PhasewatchError, match=rf"step5{suffix} leads out of .*series; put the file itself there"):
        open_series(folder).load(5)
    outside.rename(folder / f"kept{suffix}.bak")
    (folder / f"step5{suffix}").unlink()
    (folder / f"step5{suffix}").symlink_to(f"kept{suffix}.bak")
    assert_weights(open_series(folder).load(5), weights(5))


def test_a_linked_folder_that_leads_out_is_never_listed(tmp_path, monkeypatch):
    save(tmp_path / "outside" / "model.safetensors", weights(5))
    folder = tmp_path / "series"
    save(folder / "step1.pt", weights(5))
    (folder / "step5").symlink_to(tmp_path / "outside")
    series = open_series(folder)
    assert series.steps == (1,)
    assert series.left_out == ("step5",)
    (folder / "step1.pt").unlink()
    with pytest.raises(PhasewatchError, match="step5 leads out of the folder; put the files themselves there"):
        open_series(folder)


def test_blobs_beside_the_snapshots_of_a_hub_are_inside(tmp_path):
    cache = tmp_path / "models--org--name"
    blob = save(cache / "blobs" / "abc.safetensors", weights(5))
    checkpoint = cache / "snapshots" / ("0" * 40) / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").symlink_to(f"../../../blobs/{blob.name}")
    assert_weights(open_series(checkpoint.parent).load(5), weights(5))


def lie(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        lie({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}),
        lie({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}),
        lie({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 8]}}),
        lie({"w": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}),
        lie({"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}),
        lie({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        lie({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "vw"}),
        lie({"w": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}),
        lie({"w": 3}),
        lie([]),
        (2**63).to_bytes(8, "little") + bytes(8),
    ],
)
def test_a_header_that_lies(tmp_path, content):
    (tmp_path / "step5.safetensors").write_bytes(content)
    with pytest.raises(PhasewatchError, match=r"step5\.safetensors (is|holds) "):
        open_series(tmp_path).load(5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float8_e4m3fn", "complex64", "int16", "uint16", "bool"])
def test_every_dtype_of_safetensors(tmp_path, dtype):
    tensors = {
        "b": torch.arange(6).to(getattr(torch, dtype)).reshape(2, 3),
        "a": torch.tensor(1.0),
        "empty": torch.ones(0, 4),
    }
    save_file(tensors, tmp_path / "step5.safetensors", metadata={"format": "pt"})
    found = open_series(tmp_path).load(5).tensors
    assert list(found) == ["a", "b", "empty"]
    assert found["b"].dtype == tensors["b"].dtype
    assert found["b"].view(torch.uint8).equal(tensors["b"].view(torch.uint8))
    assert found["empty"].shape == (0, 4)


def test_asking_for_a_source_goes_through_no_other_steps(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        torch.save({"w": torch.zeros(1)}, tmp_path / f"step{step}.pt")
    series = open_series(tmp_path)
    listed = []
    monkeypatch.setattr(Series, "steps", property(lambda self: listed.append(1) or (1, 2, 3)))
    assert [series.source(step).name for step in (3, 1, 2)] == ["step3.pt", "step1.pt", "step2.pt"]
    assert listed == []
