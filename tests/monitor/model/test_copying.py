"""A copy of the user's model: what comes along and what stays behind."""

import functools
import threading
import types

import pytest
import torch
from awkward_models import BATCHES, OldWeightNorm, loss
from torch import nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.copying import own_copy
from phasewatch.monitor.snapshots.snapshot import Snapshot


class Remembering(nn.Module):
    """Keeps what a forward pass with gradients left, in an attribute and inside a dict."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.cache = {}

    def forward(self, x):
        self.last = self.layer(x)
        self.cache["last"] = [self.last]
        return self.last


def test_a_model_that_has_run_can_be_copied():
    live = Remembering()
    loss(live, BATCHES[0]).backward()
    copied = own_copy(live)
    assert copied.layer.weight.grad is None
    assert live.layer.weight.grad is not None
    assert torch.equal(copied.last, live.last)
    assert copied.cache["last"][0] is copied.last
    assert copied.last.grad_fn is None
    assert live.last.grad_fn is not None


class Uncopied:
    def __reduce_ex__(self, protocol):
        raise TypeError("not this one")


def test_what_cant_be_copied_asks_for_a_factory():
    model = nn.Linear(2, 2)
    model.lock = Uncopied()
    with pytest.raises(PhasewatchError, match=r"can't copy the model.*Give the function that builds it instead"):
        own_copy(model)


def test_locks_files_and_threads_are_shared(tmp_path):
    model = nn.Linear(2, 2)
    with (tmp_path / "log").open("w") as file:
        model.lock, model.log, model.stream = threading.RLock(), {"file": file}, iter(x for x in "ab")
        copied = own_copy(model)
    assert copied.lock is model.lock
    assert copied.log["file"] is model.log["file"]
    assert copied.weight is not model.weight


def test_wrappers_are_looked_through():
    inner = nn.Linear(4, 3)
    compiled = torch.compile(inner, backend="eager")
    for wrapped in (compiled, nn.DataParallel(inner), nn.DataParallel(compiled)):
        copied = own_copy(wrapped)
        assert type(copied) is nn.Linear
        assert copied.weight is not inner.weight
        assert list(Snapshot.of(wrapped, 0).tensors) == ["weight", "bias"]


def test_torchs_own_hooks_come_along_and_the_users_stay():
    model = OldWeightNorm()
    model.layer.register_forward_hook(functools.partial(print, "no"))
    copied = own_copy(model)
    assert len(copied.layer._forward_pre_hooks) == 1
    assert not copied.layer._forward_hooks
    assert len(model.layer._forward_hooks) == 1


def test_a_method_that_was_put_in_place_of_forward_is_bound_to_the_copy_closure_and_all():
    """As TRL does with `types.MethodType`, whose function `copy.deepcopy` keeps by itself."""
    model = nn.Linear(4, 3)
    original = model.forward

    def forward(self, x):
        return 2 * original(x) + self.bias

    model.forward = types.MethodType(forward, model)
    model.again = functools.partial(model.forward)
    copied = own_copy(model)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    x = BATCHES[0]
    expected = 2 * nn.functional.linear(x, copied.weight, copied.bias) + copied.bias
    for function in (copied, copied.again):
        value = function(x)
        assert torch.equal(value, expected)
        copied.zero_grad()
        value.sum().backward()
        assert copied.weight.grad is not None
    assert model.weight.grad is None


def test_mixed_precision_that_was_put_around_forward_stays_behind():
    """As accelerate's `prepare(model)` does with mixed_precision="bf16"."""
    model = nn.Linear(4, 3)
    plain = model(BATCHES[0])
    model._original_forward = model.forward
    model.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(nn.Linear.forward), model)
    assert model(BATCHES[0]).dtype is torch.bfloat16
    assert torch.equal(own_copy(model)(BATCHES[0]), plain)
    assert model(BATCHES[0]).dtype is torch.bfloat16
