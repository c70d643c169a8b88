"""Files of torch.save: foreign classes are passed over, nothing is run, and what a file claims is checked."""

import argparse
import functools
import io
import os
import pickle
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.formats.torch_files import TorchFile
from phasewatch.monitor.snapshots.series import open_series
from phasewatch.monitor.snapshots.snapshot import Snapshot, same_weights

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn),
)


def load(file):
    return TorchFile().load(file, None)


def refusal(file):
    with pytest.raises(PhasewatchError) as caught:
        load(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert message.endswith(".")
    return message


def weights():
    generator = torch.Generator().manual_seed(0)
    return {"layer.weight": torch.randn(40, 30, generator=generator), "layer.bias": torch.arange(40.0)}


def assert_weights(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype_and_layout_as_torch_reads_it(tmp_path, zipped):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 5, generator=generator)
    state = {str(dtype): torch.randint(0, 2, (3, 4), generator=generator).to(dtype) for dtype in DTYPES}
    if not zipped:  # which has no storages of these
        state = {name: tensor for name, tensor in state.items() if "uint16" not in name and "float8" not in name}
    state |= {
        "turned": matrix.T,
        "part": matrix[1:3, ::2],
        "expanded": matrix[0].expand(7, 5),
        "one": torch.tensor(3.0),
    }
    state |= {"none": torch.empty(0, 3), "parameter": nn.Parameter(matrix), "tied": matrix, "mine": matrix.T[1]}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    expected, found = torch.load(tmp_path / "a.pt", weights_only=True), load(tmp_path / "a.pt")
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        own = found[name]
        assert (own.dtype, own.shape, own.requires_grad) == (tensor.dtype, tensor.shape, False), name
        assert own.is_contiguous()
        assert same_weights(Snapshot(0, {"": own}), Snapshot(0, {"": tensor.detach().contiguous()})), name


class Settings:
    def __init__(self):
        self.width = 3


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "extra",
    [
        np.mean([2.0, 3.0]),
        np.random.RandomState(0).get_state(),
        np.random.default_rng(0),
        np.ones(3),
        np.int64(3),
        argparse.Namespace(lr=1, inner=argparse.Namespace(a=2)),
        {"out": Path("runs/a")},
        Settings(),
        Settings,
        {1, 2},
        functools.partial(np.mean, axis=0),
        torch.device("cpu"),
        torch.optim.SGD,
        torch.Size([2]),
        range(3),
        2 + 1j,
        defaultdict(list, {"a": [1.0]}),
    ],
    ids=lambda extra: type(extra).__name__,
)
def test_weights_beside_foreign_classes_are_read(tmp_path, extra, zipped):
    content = {"hyper_parameters": extra, "model": weights(), "global_step": 70}
    torch.save(content, tmp_path / "step5.ckpt", _use_new_zipfile_serialization=zipped)
    series = open_series(tmp_path)
    assert series.steps == (70,)
    assert_weights(series.load(70).tensors, weights())


class Runs:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_file_would_run_is_not_run(tmp_path, zipped):
    trace = tmp_path / "trace"
    torch.save({"model": weights(), "x": Runs(trace)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    torch.save(Runs(trace), tmp_path / "b.pt", _use_new_zipfile_serialization=zipped)
    assert_weights(load(tmp_path / "a.pt"), weights())
    assert f"b.pt holds a pickled {os.mkdir.__module__}.mkdir, and phasewatch runs no pickled code" in refusal(
        tmp_path / "b.pt"
    )
    assert not trace.exists()
    torch.load(tmp_path / "b.pt", weights_only=False)  # it would have
    assert trace.exists()


def test_nothing_foreign_is_imported(tmp_path, monkeypatch):
    (tmp_path / "strange_module.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import strange_module  # pyright: ignore[reportMissingImports]

    torch.save({"model": weights(), "x": strange_module.Thing()}, tmp_path / "a.pt")
    monkeypatch.delitem(sys.modules, "strange_module")
    assert_weights(load(tmp_path / "a.pt"), weights())
    assert "strange_module" not in sys.modules


def with_pickle(file, content):
    """A file as torch.save writes it around a pickle of our own making."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(4))
    return file


@pytest.mark.parametrize(
    "operations",
    [
        b"cos\nsystem\nX\x05\x00\x00\x00false\x85R.",
        b"cbuiltins\ngetattr\n(cos\nX\x06\x00\x00\x00systemtRX\x05\x00\x00\x00false\x85R.",
        b"(X\x05\x00\x00\x00falseios\nsystem\n.",
        b"ccollections\nOrderedDict\n}X\x05\x00\x00\x00itemscos\nsystem\nsN\x86b.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__call__cos\nsystem\nsb.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05false\x85R.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_pickles_written_by_hand_run_nothing(tmp_path, monkeypatch, operations):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    refusal(with_pickle(tmp_path / "a.pt", operations))
    assert not ran
    torch.save(weights(), tmp_path / "b.pt")
    assert_weights(load(tmp_path / "b.pt"), weights())


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        *((0, (600_000_000,), (0,)), (0, (2,), (1,)), (1, (1,), (1,)), (0, (-1,), (1,)), (-1, (1,), (1,))),
        *((0, (1, 1), (1,)), (0, (1.5,), (1,)), (0, (True,), (1,)), (0, (2**62, 2**62), (0, 0)), (0, "ab", (1, 1))),
    ],
)
def test_a_tensor_that_claims_too_much_is_refused_without_taking_memory(tmp_path, offset, size, stride):
    stored = io.BytesIO()
    pickler = pickle._Pickler(stored, 2)  # pyright: ignore[reportAttributeAccessIssue]

    class Claims:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (LIES, offset, size, stride, False, {})

    LIES = object()
    pickler.persistent_id = lambda value: ("storage", torch.FloatStorage, "0", "cpu", 1) if value is LIES else None
    pickler.dump({"w": Claims()})
    file = with_pickle(tmp_path / "a.pt", stored.getvalue())
    tracemalloc.start()
    refusal(file)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_small_expanded_and_tied_tensors_are_no_such_claim(tmp_path):
    row, matrix = torch.arange(2048.0), torch.randn(300, 300)
    state = {"positions": row.expand(2048, 2048), "embed": matrix, "head": matrix, "tail": matrix}
    torch.save(state, tmp_path / "a.pt")
    assert_weights(load(tmp_path / "a.pt"), state)


def test_a_memo_of_four_billion_places_takes_no_memory(tmp_path):
    refusal(with_pickle(tmp_path / "a.pt", b"\x80\x02Nr\xff\xff\xff\x7f."))


def test_dicts_that_share_dicts_are_walked_once(tmp_path):
    inner = {"w": torch.ones(2)}
    for _ in range(60):
        inner = {"a": inner, "b": inner}
    torch.save(inner, tmp_path / "a.pt")
    assert_weights(load(tmp_path / "a.pt"), {"w": torch.ones(2)})
    inner["a"]["a"]["itself"] = inner
    torch.save(inner, tmp_path / "a.pt")
    assert_weights(load(tmp_path / "a.pt"), {"w": torch.ones(2)})


def repacked(file, change=lambda name, content: content, method=zipfile.ZIP_STORED):
    saved = io.BytesIO()
    torch.save(weights(), saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(file, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return file


def test_a_file_that_was_packed_again(tmp_path):
    assert_weights(load(repacked(tmp_path / "stored.pt")), weights())
    message = refusal(repacked(tmp_path / "deflated.pt", method=zipfile.ZIP_DEFLATED))
    assert "was packed again with compression; unpack it" in message
    short = repacked(tmp_path / "short.pt", lambda name, content: content[: 4700 if name.endswith("data/0") else None])
    assert "data/0' has 4700 bytes where 4800 belong; copy it again" in refusal(short)


def test_a_flipped_bit(tmp_path):
    torch.save(weights(), tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.find(struct.pack("<4f", 0, 1, 2, 3)) + 6] ^= 0x20
    (tmp_path / "a.pt").write_bytes(content)
    assert "is damaged (Bad CRC-32 for file" in refusal(tmp_path / "a.pt")


def test_a_whole_model_is_no_state_dict(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    words = (
        "a.pt holds a pickled torch.nn.modules.linear.Linear, and phasewatch runs no pickled code; save model.state_"
    )
    assert words in refusal(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_code(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert "a.pt is TorchScript, which is code; save model.state_dict() instead" in refusal(tmp_path / "a.pt")
    assert not warned


def test_training_state_is_not_read(tmp_path):
    """The optimizer's record may even be broken."""
    torch.save({"model": {"w": torch.ones(3)}, "optimizer": {"m": torch.zeros(1000)}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size if "/data/" in info.filename else 0)
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[largest.header_offset + 2000] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    assert_weights(load(tmp_path / "a.pt"), {"w": torch.ones(3)})


def nested(tuples):
    return b"N" + b"\x85" * tuples


@pytest.mark.parametrize(
    "operations",
    [
        # Keys that take for ever to hash, or end Python: tuples of themselves, 300,000 deep, colliding integers.
        b"}" + b"N" + b"q\x00h\x00\x86" * 60 + b"Ns.",
        b"}" + nested(300_000) + b"Ns.",
        b"}(" + nested(300_000) + b"Nu.",
        b"(" + nested(300_000) + b"Nd.",
        b"\x80\x04\x8f(" + nested(300_000) + b"\x90.",
        b"\x80\x04(" + nested(300_000) + b"\x91.",
        b"}(" + b"".join(b"\x8a\x10" + (i * (2**61 - 1)).to_bytes(16, "little") + b"N" for i in range(20_000)) + b"u.",
        # A list by reference, a hundred thousand times.
        b"](" + b"N" * 100_000 + b"eq\x000ctorch\nSize\nq\x01" + b"0h\x01h\x00\x85R" * 100_000 + b".",
        b"(" + b"N" * 100_000 + b"tq\x000cany\nthing\nq\x01" + b"0h\x01h\x00R" * 100_000 + b".",
        b"(" + b"N" * 100_000 + b"tq\x000" + b"h\x00Q0" * 100_000 + b".",
        b"](" + b"NN\x86" * 30_000 + b"eq\x000ccollections\nOrderedDict\nq\x01" + b"0h\x01h\x00\x85R" * 100_000 + b".",
        b"}(" + b"".join(b"X\x06\x00\x00\x00%06dN" % i for i in range(30_000)) + b"uq\x000"
        b"ccollections\nOrderedDict\n)R" + b"h\x00b" * 100_000 + b".",
    ],
)
def test_work_is_bounded_by_the_size_of_the_file(tmp_path, operations):
    file = with_pickle(tmp_path / "a.pt", operations)
    began = time.perf_counter()
    refusal(file)
    assert time.perf_counter() - began < 10


def test_a_length_beyond_the_file_allocates_nothing(tmp_path):
    file = tmp_path / "step5.pt"
    longest = b"\x80\x05\x96" + struct.pack("<Q", 2**40)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", longest)
    assert "not a checkpoint at all" in refusal(file)
    file.write_bytes(longest)
    assert "not a checkpoint at all" in refusal(file)
