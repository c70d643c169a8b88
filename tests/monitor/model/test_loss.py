"""A model's loss and gradient by both paths, against torch's own backward pass, and which path is chosen."""

import copy
import sys
import types
import warnings

import pytest
import torch
from awkward_models import (
    BATCHES,
    Branching,
    Buffers,
    Counting,
    Noisy,
    OldWeightNorm,
    Parametrized,
    Recurrent,
    Tied,
    loss,
    obvious,
    seeded,
)
from torch import Tensor, nn
from torch.nn import functional as F

from phasewatch.monitor.errors import PhasewatchWarning
from phasewatch.monitor.model import loss as loss_module
from phasewatch.monitor.model.autocast import under_autocast
from phasewatch.monitor.model.copying import own_copy
from phasewatch.monitor.model.isolation import measuring
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.vectorised import attention_of_one_type
from phasewatch.monitor.model.weights import SampledModel

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

DOUBLES = [batch.double() for batch in BATCHES]


def of(make, *, dtype=torch.float64, loss=loss) -> ModelLoss:
    return ModelLoss(SampledModel(seeded(make, dtype)), loss)


def of_module(module, loss) -> ModelLoss:
    return ModelLoss(SampledModel(module), loss)


def perturbed(model_loss: ModelLoss, rows=3) -> list[Tensor]:
    """Weights of shape (row, ...) around the model's own."""
    generator = torch.Generator().manual_seed(4)
    weights = model_loss.model.weights()
    return [w + 0.3 * torch.randn(rows, *w.shape, generator=generator, dtype=w.dtype) for w in weights]


def in_place(model_loss: ModelLoss, weights, batches) -> tuple[Tensor, list[Tensor]]:
    """Losses and gradients of each row in the parameters of the model, which are left as they were."""
    target, own = LossOnBatches(model_loss, Batches(batches)), model_loss.model.weights()
    losses, grads = [], []
    for row in range(len(batches)):
        target.set([weight[row] for weight in weights])
        model_loss.model.module.zero_grad(set_to_none=True)
        losses.append(target.add_gradient(row))
        torch.testing.assert_close(target.loss(row), losses[-1], rtol=1e-12, atol=0)
        grads.append([parameter.grad.clone() for parameter in target.parameters])
    target.set(own)
    return torch.stack(losses), [torch.stack(of_one) for of_one in zip(*grads, strict=True)]


def stacked(model_loss: ModelLoss, weights, batches) -> tuple[Tensor, list[Tensor]]:
    """The same as rows of one vectorised axis."""
    which = torch.arange(len(batches))
    target = LossOnBatches(model_loss, Batches(batches))
    losses, grads = target.rows_and_gradients(weights, which)
    torch.testing.assert_close(target.rows(weights, which), losses, rtol=1e-12, atol=0)
    return losses, grads


def assert_same(found, expected, *, rtol=1e-10):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol / 100, atol=rtol / 100)
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=rtol / 100)


def choose(model_loss: ModelLoss, batches=DOUBLES) -> bool:
    model_loss.choose_path(Batches(batches))
    return model_loss.vectorised


# The loss and its gradient


@pytest.mark.parametrize("path", [stacked, in_place])
@pytest.mark.parametrize("make", [Tied, Parametrized, Buffers, OldWeightNorm])
def test_losses_and_gradients_are_the_obvious_ones(make, path):
    model_loss = of(make)
    assert choose(model_loss)
    w = perturbed(model_loss)
    assert_same(path(model_loss, w, DOUBLES), obvious(make, w, DOUBLES))
    assert all(map(torch.equal, model_loss.model.weights(), of(make).model.weights()))


def test_one_set_of_weights_serves_all_rows():
    model_loss = of(Tied)
    weights = model_loss.model.weights()
    expected = torch.stack([loss(model_loss.model.module, batch) for batch in DOUBLES])
    torch.testing.assert_close(model_loss.at_rows.rows(weights, Batches(DOUBLES)), expected, rtol=1e-12, atol=0)


def test_gradients_add_up_by_their_scale():
    model_loss = of(Tied)
    parameters = model_loss.model.parameters
    first = in_place(model_loss, [w.unsqueeze(0) for w in model_loss.model.weights()], DOUBLES[:1])[1]
    second = in_place(model_loss, [w.unsqueeze(0) for w in model_loss.model.weights()], DOUBLES[1:2])[1]
    model_loss.model.module.zero_grad(set_to_none=True)
    target = LossOnBatches(model_loss, Batches(DOUBLES))
    value = target.add_gradient(0, 0.3)
    target.add_gradient(1, -1.7)
    assert value == target.loss(0)  # the loss itself isn't scaled
    expected = [0.3 * a[0] - 1.7 * b[0] for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close([parameter.grad for parameter in parameters], expected, rtol=1e-10, atol=1e-14)


# Which path is chosen


@pytest.mark.parametrize("make", [Recurrent, Branching])
def test_what_cant_be_vectorised_runs_chain_after_chain_and_says_so_once(make):
    model_loss = of(make)
    with pytest.warns(PhasewatchWarning, match=f"one after another.*{make.__name__} can't be vectorised") as said:
        chosen = choose(model_loss), choose(model_loss)
    assert chosen == (False, False)
    assert len([w for w in said if w.category is PhasewatchWarning]) == 1
    assert all(map(torch.equal, model_loss.model.weights(), of(make).model.weights()))
    assert not LossOnBatches(model_loss, Batches(DOUBLES)).vectorised
    w = perturbed(model_loss)
    assert_same(in_place(model_loss, w, DOUBLES), obvious(make, w, DOUBLES))


@pytest.mark.parametrize("make", [Noisy, Counting])
def test_models_whose_loss_changes_from_call_to_call_run_chain_after_chain(make):
    model_loss = of(make)
    with pytest.warns(PhasewatchWarning, match="one after another"):
        assert not choose(model_loss)


def test_a_loss_that_differs_when_vectorised_is_caught():
    def peculiar(model, x):
        return loss(model, x) * (1.0 if type(model.first.weight) is nn.Parameter else 1.1)

    with pytest.warns(PhasewatchWarning, match="its vectorised loss differs from its plain one"):
        assert not choose(of(Tied, loss=peculiar))


def test_rows_too_large_for_the_caches_run_chain_after_chain_and_nothing_is_said(monkeypatch):
    model_loss = of(Tied)
    row = model_loss.bytes_of_a_row(DOUBLES[0])
    assert row > 6 * 8 * model_loss.model.size
    for limit, vectorised in ((row // 2, False), (2 * row, True)):
        monkeypatch.setattr(loss_module, "LARGEST_VECTORISED_ROW", limit)
        assert choose(model_loss) is vectorised


@pytest.fixture(scope="module")
def at_minimum():
    """A perceptron fitted to noisy samples, where what they pull it by cancels, and the samples as two minibatches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 6, generator=generator)
    y = x.sin().sum(-1, keepdim=True) + torch.randn(1024, 1, generator=generator)
    with measuring(0, torch.device("cpu"), threads=1, precision=None):
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

        def again():
            optimizer.zero_grad()
            value = squared_error(model, (x, y))
            value.backward()
            return value

        optimizer.step(again)
    return model, Batches([(x, y), (x, y)])


def squared_error(model, batch):
    return F.mse_loss(model(batch[0]).float(), batch[1])


def mixed(trained, loss=squared_error) -> ModelLoss:
    return of_module(copy.deepcopy(trained), under_autocast(loss, "cpu", torch.bfloat16))


def test_rounding_at_a_minimum_is_no_reason_to_run_chain_after_chain(at_minimum):
    trained, batches = at_minimum
    model_loss = mixed(trained)
    own = model_loss.model.weights()
    w = model_loss._nearby(2)
    _, vectorised = model_loss.at_rows.rows_and_gradients(w, batches)
    _, plain = in_place(model_loss, w, [batches[0], batches[1]])
    apart = max(float((a - b).abs().max()) for a, b in zip(plain, vectorised, strict=True))
    assert apart > 0.1 * max(float(a.abs().max()) for a in plain)
    model_loss.choose_path(batches)
    assert model_loss.vectorised
    assert all(map(torch.equal, model_loss.model.weights(), own))


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_a_gradient_that_differs_when_vectorised_is_caught_near_a_minimum(at_minimum, factor):
    def peculiar(model, batch):
        value = squared_error(model, batch)
        vectorised = type(model[0].weight) is not nn.Parameter
        return value.detach() + factor * (value - value.detach()) if vectorised else value

    trained, batches = at_minimum
    near = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1.02)  # how large rounding is, and so what it hides, depends on the processor
    model_loss = mixed(near, peculiar)
    with pytest.warns(PhasewatchWarning, match="its vectorised loss differs from its plain one"):
        model_loss.choose_path(batches)
    assert not model_loss.vectorised


def test_a_loss_that_needs_autocast_is_judged_without_full_precision(at_minimum):
    trained, batches = at_minimum
    halved = Batches([(batches[i][0].bfloat16(), batches[i][1]) for i in range(2)])
    with pytest.raises(RuntimeError, match="dtype"):
        squared_error(trained, halved[0])
    model_loss = mixed(trained)
    own = model_loss.model.weights()
    with pytest.warns(PhasewatchWarning, match="its vectorised loss differs from its plain one"):
        model_loss.choose_path(halved)
    assert all(map(torch.equal, model_loss.model.weights(), own))


def test_weights_that_are_not_numbers_are_vectorised_all_the_same():
    model_loss = of(Tied, dtype=torch.float32)
    model_loss.model.set([torch.full_like(weight, torch.nan) for weight in model_loss.model.weights()])
    assert choose(model_loss, BATCHES)


def test_minibatches_of_different_lengths_run_one_after_another():
    model_loss = of(Tied)
    assert choose(model_loss)
    batches = [DOUBLES[0], DOUBLES[1][:3], DOUBLES[2][:2]]
    assert not LossOnBatches(model_loss, Batches(batches)).vectorised
    w = perturbed(model_loss)
    assert_same(in_place(model_loss, w, batches), obvious(Tied, w, batches))


def test_the_path_is_chosen_without_gradients_too():
    def branches(model, x):
        value = loss(model, x)
        return value if torch.is_grad_enabled() or value > 0 else 2 * value

    with pytest.warns(PhasewatchWarning, match="one after another"):
        assert not choose(of(Tied, loss=branches))


def test_the_path_is_chosen_on_minibatches_of_one_length():
    with pytest.warns(PhasewatchWarning, match="one after another"):
        assert not choose(of(Recurrent), [DOUBLES[0], DOUBLES[1][:3]])


@pytest.mark.parametrize("path", [stacked, in_place])
def test_low_precision_models_are_sampled_in_float32_and_vectorised(path):
    batches = [batch.bfloat16() for batch in BATCHES]
    model_loss = of(Tied, dtype=torch.bfloat16)
    assert choose(model_loss, batches)
    w = perturbed(model_loss)
    expected, _ = obvious(Tied, w, batches, dtype=torch.bfloat16)
    losses, grads = path(model_loss, w, batches)
    assert {weight.dtype for weight in w} == {torch.float32}
    assert path is in_place or {grad.dtype for grad in grads} == {torch.float32}
    torch.testing.assert_close(losses.float(), expected.float(), rtol=5e-2, atol=1e-2)


@pytest.mark.parametrize("path", [stacked, in_place])
def test_evaluation_mode_and_buffers_stay(path):
    torch.manual_seed(0)
    model_loss = of_module(own_copy(Buffers().train()), loss)
    module = model_loss.model.module
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert before
    assert choose(model_loss, BATCHES)
    path(model_loss, perturbed(model_loss), BATCHES)
    assert not any(part.training for part in module.modules())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])


def test_transformer_encoders_are_vectorised():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x):
            return self.layer(x.unsqueeze(0))

    model_loss = of_module(Encoder(), loss)
    with measuring(0, model_loss.model.device, threads=1, precision=None):
        assert choose(model_loss, BATCHES)


# Compiling


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (lambda plain: lambda *given: 1.0 * plain(*given), None),
        (lambda plain: lambda *given: 1.1 * plain(*given), "its compiled loss differs from its plain one"),
        (lambda plain: int("no compiler here"), "invalid literal"),
        (lambda plain: lambda *given: int("no Triton"), "invalid literal"),
    ],
)
def test_a_compiler_is_trusted_where_it_is_right(monkeypatch, compiler, reason, seen):
    """With a compiler of our own, as what is to be checked is the choice: torch's needs a GPU here."""
    monkeypatch.setitem(sys.modules, "phasewatch.monitor.model.compiled", types.SimpleNamespace(compiled=compiler))
    model_loss, batches = of(Tied, dtype=torch.float32), Batches(BATCHES)
    assert choose(model_loss, BATCHES)
    weights = perturbed(model_loss)
    expected = model_loss.at_rows.rows_and_gradients(weights, batches)
    nearby = model_loss._nearby(3)
    monkeypatch.setattr(model_loss, "_nearby", lambda rows: nearby)
    monkeypatch.setattr(model_loss.model, "device", types.SimpleNamespace(type="cuda"))
    if reason is None:
        model_loss.compile(batches)
        assert model_loss.at_rows.is_compiled(3)
    else:
        with pytest.warns(PhasewatchWarning, match=f"run uncompiled, which is slower: Tied can't be .*{reason}"):
            model_loss.compile(batches)
    if seen:
        model_loss.compile(batches)  # and says nothing again
    torch.testing.assert_close(model_loss.at_rows.rows_and_gradients(weights, batches), expected)


def test_nothing_is_compiled_on_a_cpu():
    model_loss = of(Tied)
    assert choose(model_loss)
    model_loss.compile(Batches(DOUBLES))
    assert not model_loss.at_rows.is_compiled(3)


# Autocast inside the loss


def rounded(model, batch):
    """As in a training loop that uses autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return squared_error(model, batch)


@pytest.mark.parametrize("path", [stacked, in_place])
@pytest.mark.parametrize("outer", [True, False])
def test_a_loss_with_an_autocast_of_its_own_sees_the_weights_that_it_is_given(at_minimum, path, outer):
    """Autocast keeps its copies of the weights until the outermost region ends, and so may have those of before."""
    trained, batches = at_minimum
    model_loss = of_module(copy.deepcopy(trained), rounded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            w = perturbed(model_loss, 2)
            losses, _ = path(model_loss, w, [batches[0], batches[0]])
    expected = []
    for row in range(2):
        model = copy.deepcopy(trained)
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), w, strict=True):
                parameter.copy_(weight[row])
            expected.append(rounded(model, batches[0]))
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-2, atol=0)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("mask", [None, torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)])
def test_vectorised_attention_takes_one_type_in_mixed_precision(mask):
    q, k, v = torch.randn(3, 2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    plain = F.scaled_dot_product_attention
    half = mask.bfloat16() if mask is not None and mask.is_floating_point() else mask
    expected = plain(q.bfloat16(), k.bfloat16(), v.bfloat16(), half)
    with attention_of_one_type():
        with torch.autocast("cpu", torch.bfloat16):
            mixed = F.scaled_dot_product_attention(q, k, v.bfloat16(), mask)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, mask), plain(q, k, v, mask))
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, expected)
    assert F.scaled_dot_product_attention is plain
