"""Copies between the host and a GPU."""

import pytest
import torch

from phasewatch.monitor.snapshots import transfers
from phasewatch.monitor.snapshots.transfers import onto, transfer


def test_a_tensor_that_is_there_is_not_copied():
    tensor = torch.ones(3)
    assert onto(torch.device("cpu"), tensor) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["contiguous", "of another type", "transposed", "pinned"])
@pytest.mark.parametrize(("source", "to"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_large_tensors_arrive(monkeypatch, source, to, kind):
    monkeypatch.setattr(transfers, "PIECE", 1000)
    given = torch.randn(70, 50, generator=torch.Generator().manual_seed(0)).to(source)
    given = given.T if kind == "transposed" else given
    given = given.pin_memory() if kind == "pinned" and source == "cpu" else given
    into = torch.empty(given.shape, dtype=torch.float64 if kind == "of another type" else torch.float32, device=to)
    transfer(into, given)
    given.zero_() if source == "cuda" else None  # what is on its way isn't waited for
    expected = torch.randn(70, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(into.cpu().float(), expected.T if kind == "transposed" else expected)
    if kind != "of another type":
        assert torch.equal(onto(torch.device(to), into), into)
