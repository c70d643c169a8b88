"""The compiled loss and its kernel against the plain ones, on a GPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from phasewatch.monitor.model.autocast import under_autocast
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.weights import SampledModel
from phasewatch.monitor.sampling.chains import run_chains
from phasewatch.monitor.sampling.settings import Langevin

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sides", [(16, 16, 16), (5, 20, 32), (1, 7, 9)])
def test_small_products_are_those_of_bmm(sides, dtype):
    from phasewatch.monitor.model.compiled import small_bmm

    m, n, k = sides
    generator = torch.Generator("cuda").manual_seed(0)
    left = torch.randn(777, m, k, generator=generator, device="cuda", dtype=dtype)
    right = torch.randn(777, n, k, generator=generator, device="cuda", dtype=dtype).mT  # not contiguous
    exact = left.double() @ right.double()
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(small_bmm(left, right).double(), exact, rtol=tolerance, atol=tolerance * 4)


class Attention(nn.Module):
    """One layer of attention over short sequences, with a scalar parameter and an odd number of weights."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(24, 72)
        self.out = nn.Linear(24, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 12)).movedim(-4, -2).unbind(-4)
        mixed = (q @ k.mT * self.scale / 12**0.5).softmax(-1) @ v
        return self.out(mixed.movedim(-3, -2).flatten(-2))


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def prepared(loss_function, rows: int) -> tuple[ModelLoss, ModelLoss, Batches]:
    """A plain and a compiled loss, and minibatches."""
    torch.manual_seed(0)
    model = Attention().cuda()
    plain, fast = (ModelLoss(SampledModel(model), loss_function) for _ in range(2))
    x = torch.randn(6, 32, 9, 24, device="cuda")
    batches = Batches([(some, some[..., :3]) for some in x])
    for model_loss in (plain, fast):
        model_loss.choose_path(batches)
        assert model_loss.vectorised
    fast.compile(batches.take(torch.arange(rows, device="cuda") % 6))
    assert fast.at_rows.is_compiled(rows)
    return plain, fast, batches


@pytest.mark.parametrize(
    ("loss_function", "tolerance"), [(loss, 1e-4), (under_autocast(loss, "cuda", torch.bfloat16), 3e-2)]
)
def test_compiled_losses_and_gradients_are_the_plain_ones(loss_function, tolerance):
    plain, fast, batches = prepared(loss_function, 6)
    weights = [w + 0.1 * torch.randn(6, *w.shape, device="cuda") for w in plain.model.weights()]
    (losses, grads), (expected, slopes) = (m.at_rows.rows_and_gradients(weights, batches) for m in (fast, plain))
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    apart, size = (
        sum(float(tensor.square().sum()) for tensor in tensors)
        for tensors in ([g - s for g, s in zip(grads, slopes, strict=True)], slopes)
    )
    assert apart < tolerance**2 * size


def test_compiled_chains_agree_with_plain_ones(monkeypatch):
    plain, fast, batches = prepared(loss, 8)
    monkeypatch.setattr(plain, "compile", lambda batches: None)
    sampler = Langevin(1e-4, 10.0, 100.0, chains=4, draws=300, burn_in=50, batch_size=32)
    anchors = [[weight.clone() for weight in plain.model.weights()] for _ in range(2)]
    expected, found = (run_chains(LossOnBatches(m, batches), anchors, sampler, 0) for m in (plain, fast))
    for a, b in zip(expected, found, strict=True):
        excess, fast_excess = ((c.losses - c.reference).mean() for c in (a, b))
        assert abs(excess - fast_excess) < 0.01 * excess
