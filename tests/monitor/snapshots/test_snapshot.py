import os
import signal
import subprocess
import sys

import pytest
import torch
from assorted_model import AssortedModel
from torch import nn

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.snapshot import unwrap


def test_parameters_and_buffers_once_and_copied():
    torch.manual_seed(0)
    model = AssortedModel()
    snapshot = pw.Snapshot.of(model, 3)
    assert snapshot.step == 3
    assert set(snapshot.tensors) == {
        *("a.weight", "a.bias", "b.bias", "frozen", "low", "turned", "whole", "norm.weight", "norm.bias"),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "mask", "hidden", "wide"),
    }
    before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    with torch.no_grad():
        for tensor in [*model.parameters(), model.norm.running_mean, model.hidden]:
            tensor.add_(1)
    for name, tensor in snapshot.tensors.items():
        assert torch.equal(tensor, before[name])
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


def test_files_hold_every_bit(tmp_path):
    snapshot = pw.Snapshot.of(AssortedModel(), 1234)
    snapshot.tensors["a.bias"][0] = float("nan")
    folder = pw.SnapshotFolder(tmp_path / "snapshots")
    assert folder.steps == ()
    folder.save(snapshot)
    assert [entry.name for entry in folder.path.iterdir()] == ["step-00001234.safetensors"]
    loaded = folder.load(1234)
    assert loaded.step == 1234
    assert loaded.tensors.keys() == snapshot.tensors.keys()
    for name, tensor in snapshot.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_steps_in_order_with_nothing_else(tmp_path):
    folder = pw.SnapshotFolder(tmp_path)
    for step in (123_000_000, 2, 10):
        folder.save(pw.Snapshot(step, {"w": torch.full((1,), float(step))}))
    for stranger in ("step-00000004.unfinished", "step-x.safetensors", "notes.txt"):
        (tmp_path / stranger).write_text("")
    assert folder.steps == (2, 10, 123_000_000)
    assert len(folder) == 3
    assert [(s.step, s.tensors["w"].item()) for s in folder] == [(2, 2), (10, 10), (123_000_000, 123_000_000)]


def test_a_missing_or_damaged_file_is_named(tmp_path):
    folder = pw.SnapshotFolder(tmp_path)
    with pytest.raises(PhasewatchError, match=r"step-00000005\.safetensors is no longer there.* go on without step 5"):
        folder.load(5)
    folder.save(pw.Snapshot(5, {"w": torch.ones(100)}))
    whole = folder.source(5).read_bytes()
    for damaged in (b"", whole[:40], whole[:-1]):
        folder.source(5).write_bytes(damaged)
        with pytest.raises(PhasewatchError, match=r"step-00000005\.safetensors is (empty|damaged)"):
            folder.load(5)


def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    folder = pw.SnapshotFolder(tmp_path)
    folder.save(pw.Snapshot(5, {"w": torch.ones(3)}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.save(pw.Snapshot(5, {"w": torch.zeros(3)}))
    assert folder.load(5).tensors["w"].tolist() == [1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_under_its_final_name_is_whole_after_a_kill(tmp_path):
    script = (
        "import sys, torch, itertools, phasewatch as pw\n"
        "folder = pw.SnapshotFolder(__import__('pathlib').Path(sys.argv[1]))\n"
        "for step in itertools.count():\n"
        "    folder.save(pw.Snapshot(step, {'w': torch.full((500_000,), float(step))}))\n"
        "    print(step, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    with writer:
        while int(writer.stdout.readline()) < 3:
            pass
        writer.send_signal(signal.SIGKILL)
    folder = pw.SnapshotFolder(tmp_path)
    assert len(folder) >= 4
    for snapshot in folder:
        assert torch.equal(snapshot.tensors["w"], torch.full((500_000,), float(snapshot.step)))


def test_a_default_device_of_the_user_holds_no_snapshot():
    model = nn.Linear(2, 2)
    with torch.device("meta"):
        snapshot = pw.Snapshot.of(model, 0)
    assert torch.equal(snapshot.tensors["weight"], model.weight)


def test_wrappers_and_nothing_else_are_looked_through():
    model = nn.Linear(2, 2)
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(torch.compile(nn.DataParallel(model), backend="eager"))) is model

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model
            self.scale = nn.Parameter(torch.ones(1))

    assert set(pw.Snapshot.of(Wrapper(), 0).tensors) == {"scale", "module.weight", "module.bias"}


def test_a_model_on_meta_has_no_weights_to_copy():
    with pytest.raises(PhasewatchError, match=r"Snapshot\.of\(Linear\(\.\.\.\), 3\).*meta device, which holds shapes"):
        pw.Snapshot.of(nn.Linear(2, 2, device="meta"), 3)
