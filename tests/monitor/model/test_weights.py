import copy
import functools
import sys
import threading
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
from phasewatch.monitor.model.isolation import measuring
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.weights import FlatModel, own_copy, under_autocast
from phasewatch.monitor.snapshots.snapshot import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

BATCHES = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def loss(model, x):
    return model(x).square().mean()


class Tied(nn.Module):
    """Two tied weights, one frozen, and a module reachable by two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.again = nn.ModuleDict({"inner": nn.ModuleList([self.first, nn.Linear(4, 2)])})

    def forward(self, x):
        x = self.second(self.first(x).tanh()).tanh()
        return self.again["inner"][1](self.again["inner"][0](self.frozen(x)).tanh())


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.symmetric = nn.Linear(4, 4)
        parametrize.register_parametrization(self.symmetric, "weight", Symmetric())
        self.direct = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(()))])

    def forward(self, x):
        return self.symmetric(self.normed(x).tanh() * self.direct[0]) + self.direct[1]


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


class Buffers(nn.Module):
    """BatchNorm, dropout, a non-persistent buffer, one that is expanded and one that isn't a number with a gradient."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        self.register_buffer("shift", torch.full((3,), 0.3), persistent=False)
        self.register_buffer("ids", torch.arange(3).unsqueeze(0).expand(5, 3))
        self.net[1].running_mean.fill_(0.4)

    def forward(self, x):
        return self.net(x) + self.shift + self.ids


class OldWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.layer = nn.utils.weight_norm(nn.Linear(4, 3))

    def forward(self, x):
        return self.layer(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(0))[0]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return y if y.sum() > 0 else 2 * y


class Noisy(nn.Module):
    """Draws from the global stream in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) + torch.randn(3)


class Counting(nn.Module):
    """Changes a buffer in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + 0.1 * self.calls


def flat(make, *, dtype=torch.float64, loss=loss):
    torch.manual_seed(0)
    return FlatModel(make().to(dtype), loss)


def obvious(make, weights, batches, dtype=torch.float64):
    """Losses and gradients of a model for each chain, by torch's own backward pass."""
    losses, grads = [], []
    for row, batch in zip(weights, batches, strict=True):
        torch.manual_seed(0)
        model = make().to(dtype).eval()
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            nn.utils.vector_to_parameters(row.to(dtype), trained)
        value = loss(model, batch)
        value.backward()
        losses.append(value.detach())
        grads.append(torch.cat([p.grad.flatten() for p in trained]))
    return torch.stack(losses), torch.stack(grads)


def perturbed(model, chains=3):
    noise = torch.randn(chains, model.size, generator=torch.Generator().manual_seed(4), dtype=model.dtype)
    return model.weights() + 0.3 * noise


@pytest.mark.parametrize("make", [Tied, Parametrized, Buffers, OldWeightNorm])
def test_vectorised_losses_and_gradients_are_the_obvious_ones(make):
    batches = [batch.double() for batch in BATCHES]
    model = flat(make)
    model.choose_path(Batches(batches))
    assert model.vectorised
    w = perturbed(model)
    expected, expected_grads = obvious(make, w, batches)
    losses, grads = model.losses_and_grads(w, Batches(batches))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.losses(w, Batches(batches)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.weights(), flat(make).weights(), rtol=0, atol=0)


def choose_twice(model, batches):
    model.choose_path(Batches(batches))
    model.choose_path(Batches(batches))


@pytest.mark.parametrize("make", [Recurrent, Branching])
def test_what_cant_be_vectorised_runs_chain_after_chain_and_says_so_once(make):
    batches = [batch.double() for batch in BATCHES]
    model = flat(make)
    with pytest.warns(PhasewatchWarning, match=f"one after another.*{make.__name__} can't be vectorised") as said:
        choose_twice(model, batches)
    assert len([w for w in said if w.category is PhasewatchWarning]) == 1
    torch.testing.assert_close(model.weights(), flat(make).weights(), rtol=0, atol=0)
    w = perturbed(model)
    expected, expected_grads = obvious(make, w, batches)
    losses, grads = model.losses_and_grads(w, Batches(batches))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [Noisy, Counting])
def test_models_whose_loss_changes_from_call_to_call_run_chain_after_chain(make):
    model = flat(make)
    with pytest.warns(PhasewatchWarning, match="one after another"):
        model.choose_path(Batches([batch.double() for batch in BATCHES]))


def test_a_loss_that_differs_when_vectorised_is_caught():
    def peculiar(model, x):
        return loss(model, x) * (1.0 if type(model.first.weight) is nn.Parameter else 1.1)

    model = flat(Tied, loss=peculiar)
    with pytest.warns(PhasewatchWarning, match="its vectorised loss differs from its plain one"):
        model.choose_path(Batches([batch.double() for batch in BATCHES]))
    assert not model.vectorised


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


def test_rounding_at_a_minimum_is_no_reason_to_run_chain_after_chain(at_minimum):
    trained, batches = at_minimum
    model = FlatModel(copy.deepcopy(trained), under_autocast(squared_error, "cpu", torch.bfloat16))
    w, own = model._nearby(2), model.weights()
    _, vectorised = model.losses_and_grads(w, batches)
    model.vectorised = False
    _, plain = model.losses_and_grads(w, batches)
    assert (plain - vectorised).abs().max() > 0.1 * plain.abs().max()
    model._load_flat(own)
    model.choose_path(batches)
    assert model.vectorised
    assert torch.equal(model.weights(), own)


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_a_gradient_that_differs_when_vectorised_is_caught_at_a_minimum(at_minimum, factor):
    def peculiar(model, batch):
        value = squared_error(model, batch)
        vectorised = type(model[0].weight) is not nn.Parameter
        return value.detach() + factor * (value - value.detach()) if vectorised else value

    trained, batches = at_minimum
    model = FlatModel(copy.deepcopy(trained), under_autocast(peculiar, "cpu", torch.bfloat16))
    with pytest.warns(PhasewatchWarning, match="its vectorised loss differs from its plain one"):
        model.choose_path(batches)
    assert not model.vectorised


def test_a_loss_that_needs_autocast_is_judged_without_full_precision(at_minimum):
    trained, batches = at_minimum
    halved = Batches([(batches[i][0].bfloat16(), batches[i][1]) for i in range(2)])
    with pytest.raises(RuntimeError, match="dtype"):
        squared_error(trained, halved[0])
    model = FlatModel(copy.deepcopy(trained), under_autocast(squared_error, "cpu", torch.bfloat16))
    own = model.weights()
    with pytest.warns(PhasewatchWarning, match="its vectorised loss differs from its plain one"):
        model.choose_path(halved)
    assert torch.equal(model.weights(), own)


def test_weights_that_are_not_numbers_are_vectorised_all_the_same():
    model = FlatModel(Tied(), loss)
    model._load_flat(torch.full_like(model.weights(), torch.nan))
    model.choose_path(Batches(BATCHES))
    assert model.vectorised


def test_minibatches_of_different_lengths_run_one_after_another():
    model = flat(Tied)
    batches = [BATCHES[0].double(), BATCHES[1].double()[:3], BATCHES[2].double()[:2]]
    w = perturbed(model)
    expected, expected_grads = obvious(Tied, w, batches)
    losses, grads = model.losses_and_grads(w, Batches(batches))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-12)


def test_the_path_is_chosen_without_gradients_too():
    def branches(model, x):
        value = loss(model, x)
        return value if torch.is_grad_enabled() or value > 0 else 2 * value

    model = flat(Tied, loss=branches)
    with pytest.warns(PhasewatchWarning, match="one after another"):
        model.choose_path(Batches([batch.double() for batch in BATCHES]))


def test_the_path_is_chosen_on_minibatches_of_one_length():
    model = flat(Recurrent)
    with pytest.warns(PhasewatchWarning, match="one after another"):
        model.choose_path(Batches([BATCHES[0].double(), BATCHES[1].double()[:3]]))


def test_low_precision_models_are_sampled_in_float32_and_vectorised():
    batches = [batch.bfloat16() for batch in BATCHES]
    model = flat(Tied, dtype=torch.bfloat16)
    assert model.dtype is torch.float32
    model.choose_path(Batches(batches))
    assert model.vectorised
    w = perturbed(model)
    expected, _ = obvious(Tied, w, batches, dtype=torch.bfloat16)
    losses, grads = model.losses_and_grads(w, Batches(batches))
    assert grads.dtype is torch.float32
    torch.testing.assert_close(losses.float(), expected.float(), rtol=5e-2, atol=1e-2)


def test_only_what_is_trained_is_sampled():
    model = flat(Tied)
    assert model.size == 16 + 4 + 4 + 8 + 2
    assert not any(name.startswith("frozen") for name in model.trainable)


def test_evaluation_mode_and_buffers_stay():
    torch.manual_seed(0)
    model = FlatModel(own_copy(Buffers().train()), loss)
    before = {name: buffer.clone() for name, buffer in model.model.named_buffers()}
    assert before
    model.choose_path(Batches(BATCHES))
    for vectorised in (True, False):
        model.vectorised = vectorised
        model.losses_and_grads(perturbed(model), Batches(BATCHES))
    assert not any(module.training for module in model.model.modules())
    for name, buffer in model.model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_no_parameters():
    with pytest.raises(PhasewatchError, match=r"Probe\(model=Dropout\(\.\.\.\)\) has no parameters with requires_grad"):
        FlatModel(nn.Dropout(), loss)


def test_all_frozen():
    with pytest.raises(PhasewatchError, match="nothing to sample"):
        FlatModel(nn.Linear(4, 3).requires_grad_(False), loss)


def test_on_meta():
    with pytest.raises(PhasewatchError, match="meta device, which holds shapes and no weights"):
        FlatModel(nn.Linear(4, 3, device="meta"), loss)


# --- loading a snapshot, whatever its names -------------------------------------------------------------------------


def renamed(model, prefix="", without=(), **more):
    state = {f"{prefix}{name}": t.clone() for name, t in model.state_dict().items() if name not in without}
    return Snapshot(7, state | more)


def other(make):
    torch.manual_seed(9)
    return make().double()


@pytest.mark.parametrize("make", [Tied, Parametrized, Buffers, OldWeightNorm, Recurrent])
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "a.b."])
def test_any_names_of_a_whole_model_load(make, prefix):
    model, wanted = flat(make), other(make)
    model.load(renamed(wanted, prefix))
    for name, tensor in Snapshot.of(wanted, 0).tensors.items():
        assert torch.equal(Snapshot.of(model.model, 0).tensors[name], tensor), name


def test_a_tied_name_may_be_missing_whichever_it_is():
    for missing in ("first.weight", "second.weight"):
        model, wanted = flat(Tied), other(Tied)
        model.load(renamed(wanted, without=(missing,)))
        assert torch.equal(model.model.second.weight, wanted.first.weight)


def test_extra_names_are_left_out_with_one_warning():
    model = flat(Tied)
    snapshot = renamed(other(Tied), "model.", **{"criterion.weight": torch.ones(2), "zzz": torch.ones(1)})
    with pytest.warns(PhasewatchWarning, match="criterion.weight of the snapshots is not in the probe's model") as said:
        model.load(snapshot)
    model.load(snapshot)
    assert len(said) == 1
    assert torch.equal(model.model.first.weight, other(Tied).first.weight)


def test_a_model_and_its_average_in_one_file_are_not_guessed_between():
    both = renamed(other(Tied), "model.").tensors | renamed(other(Tied), "ema.").tensors
    with pytest.raises(PhasewatchError, match=r"holds the probe's model 2 times, under model\., ema\."):
        flat(Tied).load(Snapshot(7, both))


def test_the_bare_names_win_over_a_copy_beside_them():
    both = renamed(other(Tied)).tensors | renamed(Tied().double(), "ema.").tensors
    model = flat(Tied)
    with pytest.warns(PhasewatchWarning, match="ema"):
        model.load(Snapshot(7, both))
    assert torch.equal(model.model.first.weight, other(Tied).first.weight)


def test_missing_names_are_named():
    with pytest.raises(PhasewatchError, match=r"snapshot of step 7 lacks frozen\.weight of the probe's model, and "):
        flat(Tied).load(renamed(other(Tied), without=("frozen.weight",)))
    with pytest.raises(PhasewatchError, match=r"lacks .* and has nothing"):
        flat(Tied).load(Snapshot(7, {}))
    with pytest.raises(PhasewatchError, match=r"lacks .* and 4 more of the probe's model, and has x\.y\."):
        flat(Tied).load(Snapshot(7, {"x.y": torch.ones(1)}))


def test_wrong_shapes_are_named_and_nothing_is_loaded():
    model = flat(Tied)
    before = model.weights()
    shapes = r"frozen\.bias has shape \(3,\) where the probe's model has \(4,\)"
    with pytest.raises(PhasewatchError, match=shapes):
        model.load(renamed(other(Tied), **{"frozen.bias": torch.ones(3)}))
    assert torch.equal(model.weights(), before)


def test_non_persistent_buffers_that_a_snapshot_lacks_start_anew():
    model = flat(Counting)
    bare = renamed(other(Counting))
    for _ in range(2):
        model.load(bare)
        assert model.model.calls == 0
        for batch in BATCHES:
            loss(model.model, batch.double())
        assert model.model.calls == 3
    model.load(Snapshot.of(model.model, 0))
    assert model.model.calls == 3


def test_expanded_buffers_load():
    model = flat(Buffers)
    model.load(Snapshot.of(other(Buffers), 1))
    assert model.model.ids.tolist() == [[0, 1, 2]] * 5


# --- copying the model ----------------------------------------------------------------------------------------------


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


def test_what_cant_be_copied_asks_for_a_factory():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(PhasewatchError, match=r"can't copy the model.*Give the function that builds it instead"):
        own_copy(model)


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


def test_transformer_encoders_are_vectorised():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x):
            return self.layer(x.unsqueeze(0))

    model = FlatModel(Encoder(), loss)
    with measuring(0, model.device, threads=1, precision=None):
        model.choose_path(Batches(BATCHES))
    assert model.vectorised


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
    monkeypatch.setattr(FlatModel, "prepare", FlatModel._compile)
    model, batches = FlatModel(Tied(), loss), Batches(BATCHES)
    expected = model.losses_and_grads(model.weights().expand(3, -1), batches)
    if reason is None:
        model.prepare(batches)
    else:
        with pytest.warns(PhasewatchWarning, match=f"run uncompiled, which is slower: Tied can't be .*{reason}"):
            model.prepare(batches)
    if seen:
        model.prepare(batches)  # and says nothing again
    found = model.losses_and_grads(model.weights().expand(3, -1), batches)
    torch.testing.assert_close(found, expected)
