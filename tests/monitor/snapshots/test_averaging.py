"""Averaged weights: the running average against its definition, and the mean of neighbours against the obvious one."""

import pickle
from itertools import pairwise

import pytest
import torch
from assorted_model import AssortedModel
from torch import nn

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.averaging import RunningAverage
from phasewatch.monitor.snapshots.snapshot import same_weights

LATE = 5_000


def walk(model, steps):
    """The model at each step, its parameters and buffers moved at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for step in steps:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            model.norm.running_mean.add_(step)
            model.norm.num_batches_tracked.add_(1)
            yield step


def follow(average, model, steps):
    for step in walk(model, steps):
        average.update(model, step)


def followed(steps):
    """A model that walked, and its average."""
    torch.manual_seed(0)
    model, average = AssortedModel(), RunningAverage(0.3)
    follow(average, model, steps)
    return model, average


def by_definition(path, share):
    """Each tensor weighed by (s / t)^(1/share) − (s' / t)^(1/share), s' being the step taken in before s."""
    last = path[-1][0]
    parts = [(step / last) ** (1 / share) for step, _ in path]
    shares = [parts[0], *(b - a for a, b in pairwise(parts))]
    return {
        name: sum(s * tensors[name].double() for s, (_, tensors) in zip(shares, path, strict=True))
        for name in path[0][1]
    }


@pytest.mark.parametrize(
    ("share", "steps"),
    [
        (0.02, range(1, 201)),
        (0.3, range(0, 41)),
        (0.05, range(LATE, LATE + 300)),
        (0.05, [3, 4, 9, 10, 11, 30, 31, 32, 33]),
        (0.5, range(1, 30)),
    ],
)
def test_the_average_is_what_its_definition_says(share, steps):
    torch.manual_seed(0)
    model, average, path = AssortedModel(), RunningAverage(share), []
    for step in walk(model, steps):
        average.update(model, step)
        path.append((step, {name: p.detach().clone() for name, p in model.named_parameters()}))
    snapshot = average.snapshot(model, steps[-1])
    expected = by_definition(path, share)
    for name, own in model.named_parameters():
        found = snapshot.tensors[name]
        assert (found.dtype, found.shape) == (own.dtype, own.shape)
        assert found.is_contiguous()
        if name not in ("low", "whole"):
            torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=1e-6)
    # Kept in float32: in bfloat16 the average of small steps would stand still.
    torch.testing.assert_close(snapshot.tensors["low"].double(), expected["low"], rtol=2**-8, atol=1e-6)
    assert torch.equal(snapshot.tensors["frozen"], model.frozen)
    assert torch.equal(snapshot.tensors["whole"], model.whole)
    assert set(snapshot.tensors) == set(pw.Snapshot.of(model, 0).tensors)
    assert not torch.allclose(snapshot.tensors["a.weight"], model.a.weight, atol=1e-3)


def test_buffers_are_the_models_own_and_nothing_is_shared():
    model, average = followed(range(1, 6))
    snapshot = average.snapshot(model, 5)
    for name, buffer in model.named_buffers():
        assert torch.equal(snapshot.tensors[name], buffer)
    before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    follow(average, model, range(6, 9))
    assert same_weights(snapshot, pw.Snapshot(5, before))


def test_a_step_that_comes_again_changes_nothing_and_an_earlier_one_begins_anew():
    model, average = followed(range(1, 6))
    before = average.snapshot(model, 5)
    follow(average, model, [5])
    assert torch.equal(average.snapshot(model, 5).tensors["a.weight"], before.tensors["a.weight"])
    follow(average, model, [3])
    assert same_weights(average.snapshot(model, 3), pw.Snapshot.of(model, 3))
    follow(average, model, [4])
    assert not same_weights(average.snapshot(model, 4), pw.Snapshot.of(model, 4))


def test_going_back_from_far_or_from_nan_leaves_nothing_of_it():
    model, average = AssortedModel(), RunningAverage(1e-4)
    with torch.no_grad():
        before = pw.Snapshot.of(model, 0)
        model.a.weight.fill_(torch.nan)
        average.update(model, 10**9)
        model.a.weight.copy_(before.tensors["a.weight"])
    for _ in range(2):
        average.update(model, 0)
        assert same_weights(average.snapshot(model, 0), before)


def test_it_goes_on_from_inference_mode_and_through_a_wrapper():
    model, average = nn.Linear(3, 1), RunningAverage(0.3)
    with torch.inference_mode():
        average.update(model, 1)
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(nn.DataParallel(model), 2)
    part = 1 - 0.5 ** (1 / 0.3)
    torch.testing.assert_close(average.snapshot(model, 2).tensors["weight"], model.weight.detach() - 1 + part)


# Over a saved series


def saved(path, steps):
    """A series of random walks, and its snapshots."""
    torch.manual_seed(0)
    folder, model = pw.SnapshotFolder(path), AssortedModel()
    for step in walk(model, steps):
        folder.save(pw.Snapshot.of(model, step))
    return folder


def test_a_snapshot_is_the_mean_of_its_neighbours(tmp_path):
    folder = saved(tmp_path, range(1000, 1070, 10))
    series = pw.averaged(folder, neighbours=2, within=0.5)
    assert series.steps == folder.steps
    assert series.source(1030) == folder.source(1030)
    for step, around in {
        1000: [1000],
        1010: [1000, 1010, 1020],
        1030: [1010, 1020, 1030, 1040, 1050],
        1050: [1040, 1050, 1060],
        1060: [1060],
    }.items():
        assert series.window(step) == tuple(around)
        found, own = series.load(step), folder.load(step)
        assert found.step == step
        for name, tensor in own.tensors.items():
            assert found.tensors[name].dtype == tensor.dtype
            if name.startswith("norm.") and name not in ("norm.weight", "norm.bias"):
                assert torch.equal(found.tensors[name], tensor), name
            else:
                mean = torch.stack([folder.load(s).tensors[name].double() for s in around]).mean(0)
                torch.testing.assert_close(found.tensors[name], mean.to(tensor.dtype))
        for name in ("frozen", "mask", "whole"):
            assert torch.equal(found.tensors[name], own.tensors[name])


def test_neighbours_are_close_and_as_many_before_as_after(tmp_path):
    series = pw.averaged(saved(tmp_path, [10, 20, 40, 98, 99, 100, 101, 103, 104]), neighbours=3, within=0.02)
    assert {step: series.window(step) for step in series.steps} == {
        10: (10,),
        20: (20,),
        40: (40,),
        98: (98,),
        99: (98, 99, 100),
        100: (99, 100, 101),
        101: (100, 101, 103),
        103: (101, 103, 104),
        104: (104,),
    }


def test_less_noise_the_more_neighbours(tmp_path):
    """White noise around one model: its standard deviation falls as one over the square root of the window."""
    folder = pw.SnapshotFolder(tmp_path)
    generator = torch.Generator().manual_seed(2)
    for step in range(1000, 1020):
        folder.save(pw.Snapshot(step, {"w": torch.randn(5000, generator=generator)}))
    for neighbours in (1, 3):
        deviation = pw.averaged(folder, neighbours=neighbours).load(1010).tensors["w"].std().item()
        expected = (2 * neighbours + 1) ** -0.5
        assert abs(deviation - expected) < 4 * expected / 10_000**0.5


def test_a_folder_is_opened_and_the_series_travels(tmp_path):
    saved(tmp_path, range(1000, 1030, 10))
    series = pickle.loads(pickle.dumps(pw.averaged(tmp_path)))
    assert same_weights(series.load(1010), pw.averaged(str(tmp_path)).load(1010))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neighbours": 0}, r"averaged\(neighbours=0\) must be a whole number of at least 1"),
        ({"neighbours": 1.5}, r"averaged\(neighbours=1.5\) must be a whole number"),
        ({"within": 0}, r"averaged\(within=0\) must be a finite number above 0 and below 1, the share of a step"),
        ({"within": 5}, r"averaged\(within=5\) must be a finite number above 0 and below 1"),
        ({"within": float("nan")}, r"averaged\(within=nan\) must be a finite number above 0"),
        ({"within": "0.1"}, r"averaged\(within='0.1'\) must be a finite number above 0"),
        ({"within": 1e-3}, r"averaged\(within=0.001\) finds no snapshot among 3 with one on each side.*Raise it, or"),
    ],
)
def test_what_makes_no_average_is_refused(tmp_path, arguments, message):
    folder = saved(tmp_path, range(1000, 1030, 10))
    with pytest.raises(PhasewatchError, match=message):
        pw.averaged(folder, **arguments)


def test_names_of_wrappers_in_some_of_the_snapshots_are_looked_through(tmp_path):
    folder = saved(tmp_path, range(1000, 1030, 10))
    expected = pw.averaged(folder).load(1010)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in folder.load(1020).tensors.items()}
    folder.save(pw.Snapshot(1020, compiled))
    assert same_weights(pw.averaged(folder).load(1010), expected)


def test_snapshots_of_different_models_are_named(tmp_path):
    folder = saved(tmp_path, range(1000, 1030, 10))
    folder.save(pw.Snapshot(1020, {"a.weight": torch.ones(2, 4)}))
    with pytest.raises(PhasewatchError, match=r"averaged\(...\) can't average steps 1010 and 1020: a.bias has another"):
        pw.averaged(folder).load(1010)
