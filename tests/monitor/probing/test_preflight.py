"""What a user's model, loss or data gets wrong is said when the probe is made, and nothing where all is well."""

import functools
import itertools
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning

SAMPLER = pw.SGLD(step_size=1e-4, nbeta=20.0, chains=2, draws=4, burn_in=2, batch_size=16)
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def loss(model, x):
    return (model(x) - 0.5).square().mean()


def probe(model, loss=loss, data=X, **more):
    return pw.Probe(model, loss, data, sampler=SAMPLER, threads=1, **more)


@dataclass
class Pair:
    x: torch.Tensor
    name: str


class Bag:
    def __init__(self, x):
        self.x = x


COLLATED = {
    "a dataclass": lambda rows: Pair(torch.stack(rows), "all"),
    "an object": lambda rows: Bag(torch.stack(rows)),
    "an array": lambda rows: torch.stack(rows).numpy(),
}


@pytest.mark.parametrize("collate", COLLATED.values(), ids=COLLATED)
@pytest.mark.parametrize("changes", [False, True])
def test_samples_that_change_are_told_of_whatever_a_batch_is(collate, changes):
    def collated(rows):
        return collate([row + changes * torch.rand(()) for row in rows])

    def of_batch(model, batch):
        return loss(model, torch.as_tensor(getattr(batch, "x", batch)))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        probe(nn.Linear(4, 1), of_batch, DataLoader(list(X), collate_fn=collated))
    assert any("fetched again" in str(each.message) for each in told) == changes


def test_a_loss_that_calls_backward_itself_is_refused_in_a_sentence():
    def stepped(model, x):
        value = loss(model, x)
        value.backward()
        return value

    with pytest.raises(PhasewatchError, match=r"backward pass of what stepped.*Return the loss itself"):
        probe(nn.Linear(4, 1), stepped)


class Weighted(nn.Module):
    """A linear model of which a subclass spoils the weights' gradient or keeps something made from them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(F.linear(x, self.weight()).tanh())

    def weight(self):
        return self.body.weight


class StraightThrough(Weighted):
    def weight(self):
        w = self.body.weight
        return w + (w.square() - w).detach()


class GradientHook(Weighted):
    def weight(self):
        w = 1.0 * self.body.weight
        if w.requires_grad:
            w.register_hook(lambda grad: 3 * grad)
        return w


class HalfDetached(Weighted):
    def weight(self):
        return self.body.weight * self.body.weight.detach()


class Cached(Weighted):
    @functools.cache  # noqa: B019
    def weight(self):
        return self.body.weight.exp()


class CachedInAttribute(Weighted):
    made = None

    def weight(self):
        if self.made is None:
            self.made = self.body.weight.exp()
        return self.made


class DetachedNorm(Weighted):
    def weight(self):
        return self.body.weight / self.body.weight.detach().norm()


class DerivativeAlone(Weighted):
    """A gradient penalty by hand: without gradients it fails."""

    def forward(self, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
        return slope


class Derivative(Weighted):
    """The same by torch.func, which takes no saved-tensor hooks."""

    def forward(self, x):
        return torch.func.vmap(torch.func.grad(lambda row: Weighted.forward(self, row).sum()))(x)


class WithoutGradients(Weighted):
    def forward(self, x):
        return super().forward(x) * (1.0 if torch.is_grad_enabled() else 1.5)


class Keeping(Weighted):
    """Leaves what it computed in an attribute, a buffer made anew among them, and goes on from there."""

    def __init__(self):
        super().__init__()
        self.state = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        self.state = super().forward(x) + (0 if self.state is None else 1e-6 * self.state.detach()[: len(x)])
        return self.state


class Detached(Weighted):
    def weight(self):
        return self.body.weight.detach()


@pytest.mark.filterwarnings("ignore:The chains run one after another")
@pytest.mark.parametrize("make", [StraightThrough, GradientHook, HalfDetached, DetachedNorm])
def test_a_gradient_that_is_not_that_of_the_loss_is_said_with_its_parameter(make):
    with pytest.warns(PhasewatchWarning, match=r"gradient isn't that of the loss.*body\.weight"):
        probe(make())


def test_a_loss_that_changes_by_as_much_both_ways_does_change():
    """As at an exact minimum, where the gradient is rounding."""

    def bowl(model, x):
        return model.weight.square().sum() + 1e-25 * model.weight.sum() + 0 * x.sum()

    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe(model, bowl)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layers", [1, 2])
def test_at_a_minimum_the_gradient_is_that_of_the_loss(layers, dtype):
    """Slopes are of the size of rounding there, and along the weights a product curves more than it slopes."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3000, 30, generator=generator) * torch.logspace(-1, 0, 30)).to(dtype)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30, 30, bias=False, dtype=dtype) for _ in range(layers)))
    with torch.no_grad():
        y = x.double()
        for layer in model:
            y = y @ layer.weight.double().T
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        probe(model, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), (x, y.to(dtype)))
    assert not said


@pytest.mark.parametrize("make", [Cached, CachedInAttribute])
def test_something_kept_between_calls_is_refused(make):
    with pytest.raises(PhasewatchError, match=r"no longer depends on body\.weight.*functools\.cache"):
        probe(make())


def test_something_kept_by_the_model_that_trains_is_refused():
    model = CachedInAttribute()
    model(X)
    with pytest.raises(PhasewatchError, match=r"in your model the loss depends on body\.weight"):
        probe(model)


@pytest.mark.filterwarnings("ignore:The chains run one after another")
@pytest.mark.parametrize("make", [DerivativeAlone, Derivative, WithoutGradients])
def test_a_loss_that_needs_gradients_inside_is_evaluated_as_in_training(make):
    made, model = probe(make(), eval_batch=X), make()
    assert made(pw.Snapshot.of(model, 1)).loss == pytest.approx(loss(model, X).item(), rel=1e-6)
    assert made(pw.Snapshot.of(model, 1)).llc.value == probe(make, eval_batch=X)(pw.Snapshot.of(model, 1)).llc.value


@pytest.mark.filterwarnings("ignore:The chains run one after another")
def test_what_an_evaluation_leaves_in_the_model_is_gone_before_the_next_measurement():
    made = probe(Keeping())
    points = [made(pw.Snapshot.of(Keeping(), 1)) for _ in range(2)]
    assert points[0] == points[1] == probe(Keeping)(pw.Snapshot.of(Keeping(), 1))
    module = made.subject.model.module
    made.subject.model.load(pw.Snapshot.of(Keeping(), 1))
    assert module.calls is dict(module.named_buffers())["calls"]
    assert module.calls == 0
    assert module.state is None or type(module.state) is torch.Tensor


def test_trained_tensors_that_the_loss_has_to_itself_are_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, model, x):
            return self.scale * loss(model, x)

    with pytest.warns(PhasewatchWarning, match=r"depends on Scaled\.scale, with requires_grad=True"):
        probe(Weighted(), Scaled())


def test_a_loss_that_takes_from_an_iterator_is_refused_and_data_that_does_is_said():
    weights = itertools.cycle([1.0, 2.0, 3.0])
    with pytest.raises(PhasewatchError, match="takes something else from an iterator in each call"):
        probe(Weighted, lambda model, x: next(weights) * loss(model, x))
    batches = iter([X[:16]] * 2)
    with (
        pytest.warns(PhasewatchWarning, match="is a function that takes from an iterator"),
        pytest.raises(PhasewatchError, match=r"\(generator, 1024\) failed \(StopIteration"),
    ):
        probe(Weighted, data=lambda generator, size: next(batches))


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (lambda model, x: loss(model, x) + 0j, "returned a complex number"),
        (lambda model, x: loss(model, x)[None], r"returned a tensor of shape \(1,\)"),
    ],
)
def test_losses_that_are_no_real_scalar_are_a_sentence(of, said):
    with pytest.raises(PhasewatchError, match=said):
        probe(Weighted(), of)


def test_what_no_gradient_reaches_is_held_fast():
    with pytest.warns(PhasewatchWarning, match=r"depends on body\.weight.*held fast"):
        made = probe(Detached())
    assert made.subject.model.names == ["body.bias", "head.weight", "head.bias"]


class Padding(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 3, **options)

    def forward(self, tokens):
        return self.embed(tokens).mean((1, 2))


TOKENS = torch.randint(0, 6, (64, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}, {"sparse": True}, {"max_norm": 0.5}], ids=str
)
def test_embeddings_have_the_gradient_of_their_loss(options):
    """And nothing is said; what `max_norm` does is a part of the function, not a change to the chains' weights."""
    model = Padding(**options)
    made = probe(model, data=TOKENS, eval_batch=TOKENS)
    before = model.embed.weight.detach().clone()
    point = made(pw.Snapshot.of(model, 1))
    assert torch.equal(model.embed.weight, before)
    assert made.subject.loss.vectorised
    assert point.loss == pytest.approx(loss(model.eval(), TOKENS).item(), rel=1e-6)
    made.subject.loss.vectorised = False
    assert made(pw.Snapshot.of(Padding(**options), 1)).llc.value == pytest.approx(point.llc.value, rel=1e-3)


class Functional(Padding):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, tokens):
        return F.embedding(tokens, self.embed.weight, **self.options).mean((1, 2))


@pytest.mark.filterwarnings("ignore:The chains run one after another")  # vmap takes the first row's alone for padding
def test_rows_that_no_gradient_reaches_are_held_fast_and_named():
    with pytest.warns(PhasewatchWarning, match=r"depends on row 2 of embed\.weight, and no gradient reaches"):
        made = probe(Functional(padding_idx=2), data=TOKENS)
    (mask,) = made.subject.model.mask(None)
    assert mask.all(1).tolist() == [True, True, False, True, True, True]
    point = made(pw.Snapshot.of(Functional(padding_idx=2), 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Probe")
        by_layer = probe(Padding(padding_idx=2), data=TOKENS)(pw.Snapshot.of(Functional(), 1))
        probe(Functional(), data=TOKENS.clamp(max=4))  # a token that doesn't come up has no gradient either
    assert point.llc.value == pytest.approx(by_layer.llc.value, rel=1e-4)


def test_weights_of_zero_whose_gradient_is_zero_are_sampled_and_nothing_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert probe(model).subject.model.mask(None) is None


@pytest.mark.filterwarnings("ignore:The chains run one after another")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale_grad_by_freq": True}, r"gradient isn't that of the loss.*embed\.weight"),
        ({"max_norm": 0.5}, r"writes to embed\.weight while it is evaluated"),
        ({"sparse": True}, None),
    ],
    ids=str,
)
def test_embeddings_by_function_are_right_or_said(options, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PhasewatchWarning)
        made = probe(Functional(**options), data=TOKENS)
    told = [str(w.message) for w in caught if "one after another" not in str(w.message)]
    assert len(told) == (said is not None), told
    assert all(re.search(said, message) for message in told)
    if said is None:
        expected = probe(Padding(), data=TOKENS)(pw.Snapshot.of(Functional(), 1)).llc.value
        assert made(pw.Snapshot.of(Functional(), 1)).llc.value == pytest.approx(expected, rel=1e-3)


def test_a_padding_row_stays_where_it_is():
    made = probe(Padding(padding_idx=0), data=TOKENS)
    (mask,) = made.subject.model.mask(None)
    assert mask.all(1).tolist() == [False, True, True, True, True, True]


def test_hooks_that_count_are_kept_and_others_are_not():
    def model():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        made[1].register_forward_hook(lambda module, inputs, output: 3 * output)
        made[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
        made[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
        return made

    seen = []
    mine = model()
    made = probe(mine, eval_batch=X)
    copied = made.subject.model.module
    assert [len(copied[i]._forward_hooks) for i in range(3)] == [0, 1, 0]
    assert len(copied[0]._forward_pre_hooks) == 1
    assert made(pw.Snapshot.of(mine, 0)).loss == pytest.approx(loss(mine, X).item(), rel=1e-6)
    assert len(seen) == 1  # ours just now
    assert probe(model, eval_batch=X)(pw.Snapshot.of(mine, 0)) == made(pw.Snapshot.of(mine, 0))


def test_a_function_that_belongs_to_the_original_is_bound_to_the_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    inner = model[1].forward
    model[1].forward = lambda x: 2 * inner(x)
    model[0].scale = lambda x: x * model[0].weight.mean()
    made = probe(model)
    assert made.subject.model.module[1].forward.__closure__[0].cell_contents.__self__ is made.subject.model.module[1]


class Elsewhere:
    """Holds a model where no copy reaches."""

    def __init__(self, model):
        self.model = model

    def __deepcopy__(self, memo):
        return self

    def __call__(self, x):
        return self.model.running_mean + x


def test_a_copy_that_reads_the_original_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[0].extra = Elsewhere(model[1])
    with pytest.raises(PhasewatchError, match=r"copy reads 1\.running_mean of the model that it was copied from"):
        probe(model, lambda model, x: model(model[0].extra(x)).square().mean())


def test_a_copy_with_another_loss_is_said():
    class Counting(nn.Linear):
        def __deepcopy__(self, memo):
            return nn.Linear(4, 1)

    with pytest.warns(PhasewatchWarning, match=r"copy of the model has a loss of .* where your model has"):
        probe(Counting(4, 1))


def test_a_loss_that_needs_more_arguments_is_a_sentence():
    with pytest.raises(PhasewatchError, match=r"needs\(model, batch\) failed .*missing 1 required"):
        probe(nn.Linear(4, 1), needs)


def needs(model, batch, *, scale):
    return scale * loss(model, batch)


@pytest.mark.parametrize("output", [lambda v: (v, X), lambda v: {"loss": v, "logits": X}], ids=["tuple", "mapping"])
def test_a_loss_among_other_outputs_is_taken(output):
    expected = probe(Weighted())(pw.Snapshot.of(Weighted(), 0))
    found = probe(Weighted(), lambda model, x: output(loss(model, x)))(pw.Snapshot.of(Weighted(), 0))
    assert found == expected


class Masking:
    """Hides numbers at random, by a generator that is made at the first call, as transformers' collator does."""

    generator = None

    def __call__(self, samples):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(7)
        clean = torch.stack(samples)
        return clean * (torch.rand(clean.shape, generator=self.generator) > 0.3)


def test_a_collator_with_a_generator_is_left_alone_and_one_drawing_is_kept(tmp_path):
    collate = Masking()
    with pytest.warns(PhasewatchWarning, match="One drawing of each minibatch is kept"):
        made = probe(Weighted(), data=DataLoader(list(X), batch_size=16, collate_fn=collate))
    assert collate.generator is None
    assert made(pw.Snapshot.of(Weighted(), 0)) == made(pw.Snapshot.of(Weighted(), 0))
    used = Masking()
    used(list(X))
    with pytest.warns(PhasewatchWarning, match="One drawing of each minibatch is kept"):
        again = probe(Weighted(), data=DataLoader(list(X), batch_size=16, collate_fn=used))
    assert again.settings == made.settings
    assert again(pw.Snapshot.of(Weighted(), 0)) == made(pw.Snapshot.of(Weighted(), 0))


class Deep(nn.Module):
    """Eight layers, of one of which half the gradient is missing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(8)), nn.Linear(4, 1)

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            weight = layer.weight * layer.weight.detach() if number == 5 else layer.weight
            x = x + F.linear(x, weight, layer.bias).tanh()
        return self.head(x)


def hooked(*gains):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    for gain in gains:
        model[1].register_forward_hook(lambda module, inputs, output, gain=gain: gain * output)
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: hooked(), None),
        (Weighted, None),
        (lambda: hooked(3), None),
        (lambda: hooked(3, 1, 2), None),
        (lambda: hooked(3, 1, 2, 1), None),
        (StraightThrough, "gradient isn't that of the loss"),
        (HalfDetached, "gradient isn't that of the loss"),
        (Deep, r"gradient isn't that of the loss.*layers\.5\.weight"),
        (Detached, "held fast"),
    ],
)
def test_making_a_probe_takes_at_most_20_passes_whatever_is_found(make, said):
    """Without the seven that choose between the paths, and for a plain model with them."""
    passes = []

    def counted(model, x):
        passes.append(1)
        return loss(model, x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = probe(make(), counted)
    told = [str(warning.message) for warning in caught]
    assert len(told) == (said is not None), told
    assert all(re.search(said, message) for message in told)
    assert len(passes) <= (20 if made.subject.model.module._get_name() == "Weighted" else 20 + 7)
    assert made.subject.loss.vectorised
