"""The sampled parameters as a list of tensors, and loading snapshots whatever their names."""

import pytest
import torch
from awkward_models import (
    BATCHES,
    Buffers,
    Counting,
    OldWeightNorm,
    Parametrized,
    Recurrent,
    Tied,
    loss,
    seeded,
)
from torch import nn

from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
from phasewatch.monitor.model.weights import SampledModel
from phasewatch.monitor.snapshots.snapshot import Snapshot


def sampled(make, *, dtype=torch.float64, **more):
    return SampledModel(seeded(make, dtype), **more)


# What is sampled


def test_only_what_is_trained_is_sampled():
    model = sampled(Tied)
    assert model.size == 16 + 4 + 4 + 8 + 2
    assert model.names == ["first.weight", "first.bias", "second.bias", "again.inner.1.weight", "again.inner.1.bias"]
    assert [parameter.shape for parameter in model.parameters] == [(4, 4), (4,), (4,), (2, 4), (2,)]
    assert model.parameters[0] is model.module.first.weight
    assert [tuple(tensor.shape) for tensor in model.fixed] == [(4, 4), (4,)]


def test_only_what_is_asked_for_is_sampled_and_the_rest_needs_no_gradient():
    model = sampled(Tied, only={"first.weight", "second.bias"})
    assert model.names == ["first.weight", "second.bias"]
    assert model.size == 20
    needing = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    assert needing == ["first.weight", "second.bias"]
    assert len(model.fixed) == 5


def test_weights_are_copies_and_set_replaces_them_everywhere():
    model = sampled(Tied)
    before = model.weights()
    model.set([2 * weight + 1 for weight in before])
    for weight, parameter in zip(before, model.parameters, strict=True):
        assert torch.equal(parameter, 2 * weight + 1)
        assert parameter.requires_grad
    assert torch.equal(model.module.second.weight, 2 * before[0] + 1)
    assert torch.equal(model.module.again["inner"][0].weight, 2 * before[0] + 1)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_chains_are_kept_in_single_precision_at_least(dtype, kept):
    model = sampled(Tied, dtype=dtype)
    assert model.dtype is kept
    assert {weight.dtype for weight in model.weights()} == {kept}
    model.set([weight + 0.5 for weight in model.weights()])
    assert {parameter.dtype for parameter in model.parameters} == {dtype}


def test_masks_by_name_come_in_the_order_of_the_parameters():
    model = sampled(Tied)
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[1, 2] = True
    masks = {"second.bias": torch.ones(4, dtype=torch.bool), "first.weight": corner}
    found = model.mask(masks)
    assert torch.equal(found[0], corner)
    assert found[2] is None  # all of it moves
    assert [bool(mask.any()) for k, mask in enumerate(found) if k in {1, 3, 4}] == [False] * 3
    assert [mask.shape for mask in found if mask is not None] == [(4, 4), (), (), ()]


def test_no_mask_and_masks_of_everything_are_none():
    model = sampled(Tied)
    assert model.mask(None) is None
    everything = {
        name: torch.ones_like(p, dtype=torch.bool) for name, p in zip(model.names, model.parameters, strict=True)
    }
    assert model.mask(everything) is None


def test_it_is_in_evaluation_mode():
    model = SampledModel(Buffers().train())
    assert not any(module.training for module in model.module.modules())


def test_no_parameters():
    with pytest.raises(PhasewatchError, match=r"Probe\(model=Dropout\(\.\.\.\)\) has no parameters with requires_grad"):
        SampledModel(nn.Dropout())


def test_all_frozen():
    with pytest.raises(PhasewatchError, match="nothing to sample"):
        SampledModel(nn.Linear(4, 3).requires_grad_(False))


def test_on_meta():
    with pytest.raises(PhasewatchError, match="meta device, which holds shapes and no weights"):
        SampledModel(nn.Linear(4, 3, device="meta"))


# Loading a snapshot, whatever its names


def renamed(model, prefix="", without=(), **more):
    state = {f"{prefix}{name}": t.clone() for name, t in model.state_dict().items() if name not in without}
    return Snapshot(7, state | more)


def other(make):
    torch.manual_seed(9)
    return make().double()


@pytest.mark.parametrize("make", [Tied, Parametrized, Buffers, OldWeightNorm, Recurrent])
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "a.b."])
def test_any_names_of_a_whole_model_load(make, prefix):
    model, wanted = sampled(make), other(make)
    model.load(renamed(wanted, prefix))
    for name, tensor in Snapshot.of(wanted, 0).tensors.items():
        assert torch.equal(Snapshot.of(model.module, 0).tensors[name], tensor), name


def test_a_tied_name_may_be_missing_whichever_it_is():
    for missing in ("first.weight", "second.weight"):
        model, wanted = sampled(Tied), other(Tied)
        model.load(renamed(wanted, without=(missing,)))
        assert torch.equal(model.module.second.weight, wanted.first.weight)


def test_extra_names_are_left_out_with_one_warning():
    model = sampled(Tied)
    snapshot = renamed(other(Tied), "model.", **{"criterion.weight": torch.ones(2), "zzz": torch.ones(1)})
    with pytest.warns(PhasewatchWarning, match="criterion.weight of the snapshots is not in the probe's model") as said:
        model.load(snapshot)
    model.load(snapshot)
    assert len(said) == 1
    assert torch.equal(model.module.first.weight, other(Tied).first.weight)


def test_a_model_and_its_average_in_one_file_are_not_guessed_between():
    both = renamed(other(Tied), "model.").tensors | renamed(other(Tied), "ema.").tensors
    with pytest.raises(PhasewatchError, match=r"holds the probe's model 2 times, under model\., ema\."):
        sampled(Tied).load(Snapshot(7, both))


def test_the_bare_names_win_over_a_copy_beside_them():
    both = renamed(other(Tied)).tensors | renamed(Tied().double(), "ema.").tensors
    model = sampled(Tied)
    with pytest.warns(PhasewatchWarning, match="ema"):
        model.load(Snapshot(7, both))
    assert torch.equal(model.module.first.weight, other(Tied).first.weight)


def test_missing_names_are_named():
    with pytest.raises(PhasewatchError, match=r"snapshot of step 7 lacks second\.bias of the probe's model, and "):
        sampled(Tied).load(renamed(other(Tied), without=("second.bias",)))
    with pytest.raises(PhasewatchError, match=r"lacks .* and has nothing"):
        sampled(Tied).load(Snapshot(7, {}))
    with pytest.raises(PhasewatchError, match=r"lacks .* and 4 more of the probe's model, and has x\.y\."):
        sampled(Tied).load(Snapshot(7, {"x.y": torch.ones(1)}))


def test_wrong_shapes_are_named_and_nothing_is_loaded():
    model = sampled(Tied)
    before = model.weights()
    shapes = r"frozen\.bias has shape \(3,\) where the probe's model has \(4,\)"
    with pytest.raises(PhasewatchError, match=shapes):
        model.load(renamed(other(Tied), **{"frozen.bias": torch.ones(3)}))
    assert all(map(torch.equal, model.weights(), before))


def test_non_persistent_buffers_that_a_snapshot_lacks_start_anew():
    model = sampled(Counting)
    bare = renamed(other(Counting))
    for _ in range(2):
        model.load(bare)
        assert model.module.calls == 0
        for batch in BATCHES:
            loss(model.module, batch.double())
        assert model.module.calls == 3
    model.load(Snapshot.of(model.module, 0))
    assert model.module.calls == 3


def test_expanded_buffers_load():
    model = sampled(Buffers)
    model.load(Snapshot.of(other(Buffers), 1))
    assert model.module.ids.tolist() == [[0, 1, 2]] * 5


def test_a_copy_of_the_weights_looks_for_their_type_once(monkeypatch):
    model, asked = sampled(Tied), []
    monkeypatch.setattr(SampledModel, "dtype", property(lambda self: asked.append(1) or torch.float64))
    assert len(model.weights()) == 5
    assert len(asked) == 1
