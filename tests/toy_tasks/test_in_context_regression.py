"""The task of arXiv 2402.02364: its size, its data, its scores, and that it learns."""

import math

import pytest
import torch
from torch import Generator, nn
from torch.func import vmap
from toy_models import assert_chains_are_vectorised

from phasewatch.toy_tasks.in_context_regression import (
    RegressionData,
    RegressionTransformer,
    icl_score,
    loss,
    out_of_distribution,
    published_metrics,
    task_prior_score,
    training,
)
from phasewatch.toy_tasks.regression_estimators import dmmse_predictions, ridge_distance, ridge_predictions


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def seeded_model(**size) -> RegressionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RegressionTransformer(**size)


class Fixed(nn.Module):
    """Predicts what it is given."""

    def __init__(self, predictions):
        super().__init__()
        self.predictions = predictions

    def forward(self, x, y):
        return self.predictions


# The model


def test_the_published_size():
    assert sum(p.numel() for p in RegressionTransformer().parameters()) == 51_717


@pytest.mark.parametrize(("dimensions", "examples", "layers", "heads"), [(4, 8, 2, 4), (3, 5, 1, 2), (1, 2, 3, 1)])
def test_shapes(dimensions, examples, layers, heads):
    model = seeded_model(dimensions=dimensions, examples=examples, layers=layers, heads=heads, width=16, mlp_width=24)
    x, y = RegressionData(dimensions, examples)(generator(), 7)
    assert x.shape == (7, examples, dimensions)
    assert y.shape == (7, examples)
    assert model(x, y).shape == (7, examples)
    assert model(x[:, :2], y[:, :2]).shape == (7, 2)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"RegressionTransformer\(width=30, heads=4\): the heads must divide"):
        RegressionTransformer(width=30)


def test_a_prediction_depends_on_its_x_and_the_pairs_before_it_alone():
    model = seeded_model(width=16)
    x, y = RegressionData()(generator(), 6)
    before = model(x, y)
    for k in range(8):
        other_y = y.clone()
        other_y[:, k] += 10.0
        changed = (model(x, other_y) - before).abs().amax(0)
        assert (changed[: k + 1] == 0).all()
        assert (changed[k + 1 :] > 1e-4).all()
        other_x = x.clone()
        other_x[:, k] += 10.0
        changed = (model(other_x, y) - before).abs().amax(0)
        assert (changed[:k] == 0).all()
        assert (changed[k:] > 1e-4).all()


def test_fewer_pairs_are_the_first_of_more():
    model = seeded_model(width=16)
    x, y = RegressionData()(generator(), 6)
    torch.testing.assert_close(model(x[:, :3], y[:, :3]), model(x, y)[:, :3])


def test_tokens_are_zero_and_x_then_y_and_zeros():
    model = seeded_model(width=16)
    x, y = RegressionData()(generator(), 6)
    seen = []
    model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, y)
    (tokens,) = seen
    assert tokens.shape == (6, 16, 5)
    assert torch.equal(tokens[:, ::2, 1:], x)
    assert torch.equal(tokens[:, 1::2, 0], y)
    assert (tokens[:, ::2, 0] == 0).all()
    assert (tokens[:, 1::2, 1:] == 0).all()


def test_attention_is_that_of_torch():
    model = seeded_model(width=16)
    attention = model.blocks[0].attn
    residual = torch.randn(5, 10, 16, generator=generator())
    theirs = nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.qkv.weight)
        theirs.out_proj.weight.copy_(attention.out.weight)
    future = torch.ones(10, 10, dtype=torch.bool).triu(1)
    expected, _ = theirs(residual, residual, residual, attn_mask=future)
    torch.testing.assert_close(attention(residual), expected, rtol=1e-4, atol=1e-6)


def test_attention_patterns_are_causal_and_sum_to_one():
    model = seeded_model(width=16)
    x, y = RegressionData()(generator(), 6)
    output, cache = model.run_with_cache(x, y)
    torch.testing.assert_close(output, model(x, y))
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        assert pattern.shape == (6, 4, 16, 16)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(6, 4, 16))
        assert (pattern.triu(1) == 0).all()
        assert (pattern.tril() > 0).sum() == 6 * 4 * 16 * 17 / 2


@pytest.mark.parametrize(
    "name", ["hook_embed", *(f"blocks.1.{n}" for n in ("attn.hook_pattern", "hook_attn_out", "hook_mlp_out"))]
)
def test_a_hook_reaches_the_output(name):
    model = seeded_model(width=16)
    x, y = RegressionData()(generator(), 6)
    before = model(x, y)
    hooked = model.run_with_hooks(x, y, fwd_hooks=[(name, lambda value, hook: torch.zeros_like(value))])
    assert not torch.allclose(hooked, before, atol=1e-3)
    assert torch.equal(model(x, y), before)


def test_the_residual_stream_is_the_sum_of_what_is_hooked():
    model = seeded_model(width=16)
    _, cache = model.run_with_cache(*RegressionData()(generator(), 6))
    parts = [cache["hook_embed"]]
    for layer in range(2):
        parts += [cache[f"blocks.{layer}.hook_attn_out"], cache[f"blocks.{layer}.hook_mlp_out"]]
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], sum(parts))


def test_chains_are_vectorised():
    data = RegressionData()
    assert_chains_are_vectorised(lambda: seeded_model(width=16), loss, [data(generator(seed), 32) for seed in range(3)])


# The data


def test_moments_of_the_data():
    data = RegressionData(dimensions=3, examples=4, noise_variance=0.3, input_scale=2.5, task_scale=0.7)
    size = 40_000
    x, y = (part.double() for part in data(generator(1), size))

    def close(values, truth, bound=0.06):
        error = values.std(0) / math.sqrt(size)
        assert ((values.mean(0) - truth).abs() < 4 * error).all()
        assert (error < bound).all()

    close(x.flatten(1), 0.0)
    close(x.square().flatten(1), 2.5)
    close(x[:, 0] * x[:, 1], 0.0)
    close(y, 0.0)
    close(y.square(), 3 * 2.5 * 0.7 + 0.3)
    # One task for a sequence: y₁y₂ x₁·x₂ has mean task_scale · E(x₁·x₂)² = 0.7 · 3 · 2.5², and the noise drops out
    close(y[:, 0] * y[:, 1] * (x[:, 0] * x[:, 1]).sum(-1), 0.7 * 3 * 2.5**2, bound=0.3)
    # Another task for the next one
    close(y[:-1, 0] * y[1:, 0] * (x[:-1, 0] * x[1:, 0]).sum(-1), 0.0, bound=0.3)


def test_noise_is_what_the_line_leaves():
    x, y = RegressionData(dimensions=2, examples=30, noise_variance=0.3)(generator(2), 4000)
    w = torch.linalg.lstsq(x.double(), y.double().unsqueeze(-1)).solution
    left = (y.double() - (x.double() @ w).squeeze(-1)).square().sum(1) / 28
    assert abs(left.mean() - 0.3) < 4 * left.std() / math.sqrt(4000)
    assert left.std() / math.sqrt(4000) < 0.01


def tasks_of(x, y):
    """The task of each sequence, from as many pairs without noise as there are dimensions."""
    return torch.linalg.solve(x.double(), y.double())


def test_with_m_tasks_every_sequence_has_one_of_them_all_as_often():
    data = RegressionData(dimensions=2, examples=2, noise_variance=0.0, tasks=5, task_seed=3)
    x, y = data(generator(), 10_000)
    distance = (tasks_of(x, y)[:, None] - data.task_vectors.double()).norm(dim=-1)
    assert distance.amin(1).quantile(0.99) < 1e-3
    share = distance.argmin(1).bincount(minlength=5) / 10_000
    assert (abs(share - 0.2) < 4 * math.sqrt(0.16 / 10_000)).all()


def test_tasks_are_normal_and_their_own_seed_decides():
    vectors = RegressionData(dimensions=3, tasks=20_000, task_scale=2.5).task_vectors.double()
    assert vectors.shape == (20_000, 3)
    assert (vectors.mean(0).abs() < 4 * math.sqrt(2.5 / 20_000)).all()
    assert (abs(vectors.square().mean(0) - 2.5) < 4 * 2.5 * math.sqrt(2 / 20_000)).all()
    assert torch.equal(RegressionData(tasks=4).task_vectors, RegressionData(tasks=8).task_vectors[:4])
    assert not torch.equal(RegressionData(tasks=4).task_vectors, RegressionData(tasks=4, task_seed=1).task_vectors)
    assert RegressionData().task_vectors is None


def test_one_task_is_a_line():
    x, y = RegressionData(noise_variance=0.0, tasks=1)(generator(), 64)
    torch.testing.assert_close(y, x @ RegressionData(tasks=1).task_vectors[0])


def test_the_generator_decides():
    data = RegressionData()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = data(generator(3), 16), data(generator(3), 16), data(generator(4), 16)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


# The scores


def test_scores_by_hand():
    x = torch.zeros(2, 3, 4)
    y = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]])
    model = Fixed(torch.tensor([[0.0, 2.0, 2.5], [-3.0, 1.5, 2.0]]))
    assert loss(model, (x, y)).item() == pytest.approx((1 + 0 + 0.25 + 4 + 1 + 0) / 6)
    assert icl_score(model, (x, y)) == pytest.approx((0.25 + 0) / 2 - (1 + 4) / 2)
    assert task_prior_score(model, (x, y)) == pytest.approx((0 + 4 + 6.25 + 9 + 2.25 + 4) / 6)


def test_out_of_distribution_looks_at_the_model_alone():
    model = seeded_model(width=16)
    data = RegressionData(input_scale=4.0)
    metric = out_of_distribution(data, size=64, seed=5)
    expected = loss(model, data(generator(5), 64)).item()
    for seed in (0, 1):
        assert metric(model, RegressionData()(generator(seed), 8)) == expected


def test_published_metrics_of_a_model_that_predicts_nothing():
    class Nothing(nn.Module):
        def forward(self, x, y):
            return torch.zeros_like(y)

    data = RegressionData()
    batch = data(generator(), 4096)
    found = {name: metric(Nothing(), batch) for name, metric in published_metrics(data).items()}
    assert set(found) == {"icl_score", "task_prior", "ridge_distance", "ood_inputs", "ood_tasks"}
    assert found["task_prior"] == 0
    assert abs(found["icl_score"]) < 0.8  # y is as large at every place
    assert found["ood_inputs"] == pytest.approx(16.125, rel=0.1)
    assert found["ood_tasks"] == pytest.approx(16.125, rel=0.1)
    assert found["ridge_distance"] == pytest.approx(ridge_predictions(*batch, 0.125).square().mean().item())


def test_metrics_of_m_tasks():
    class First(nn.Module):
        def forward(self, x, y):
            return x @ data.task_vectors[0]

    data = RegressionData(tasks=3)
    batch = data(generator(), 512)
    found = {name: metric(First(), batch) for name, metric in published_metrics(data).items()}
    assert found.keys() - published_metrics(RegressionData()).keys() == {"dmmse_distance", "new_tasks"}
    best = dmmse_predictions(*batch, data.task_vectors, 0.125)
    assert found["dmmse_distance"] == pytest.approx((First()(*batch) - best).square().mean().item())
    # ‖w − w₁‖² of a new task w ~ N(0, I), and the noise
    assert found["new_tasks"] == pytest.approx(4 + data.task_vectors[0].square().sum().item() + 0.125, rel=0.1)


# Training


def test_a_training_step_is_adam_on_a_batch_of_its_seed():
    data, model, by_hand = RegressionData(), seeded_model(width=16), seeded_model(width=16)
    steps = training(model, data, seed=3)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=3e-3)
    draws = generator(3)
    for step in (1, 2, 3):
        assert next(steps) == step
        optimizer.zero_grad()
        loss(by_hand, data(draws, 256)).backward()
        optimizer.step()
        for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_published_schedule_is_a_triangle():
    data, model, by_hand = RegressionData(), seeded_model(width=16), seeded_model(width=16)
    optimizer = torch.optim.Adam(by_hand.parameters())
    draws = generator(3)
    for step, share in zip(training(model, data, seed=3, steps=5), (1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3), strict=True):
        optimizer.param_groups[0]["lr"] = 3e-3 * share
        optimizer.zero_grad()
        loss(by_hand, data(draws, 256)).backward()
        optimizer.step()
        for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=f"step {step}")


def test_training_learns_in_context():
    data, model = RegressionData(), seeded_model(width=16)
    batch = data(generator(99), 2048)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    draws = generator(1)
    scores = {}
    for step in range(201):
        if step % 200 == 0:
            with torch.no_grad():
                scores[step] = icl_score(model, batch), loss(model, batch).item(), ridge_distance()(model, batch)
        optimizer.zero_grad()
        loss(model, data(draws, 256)).backward()
        optimizer.step()
    (icl, value, distance), (later_icl, later_value, later_distance) = scores[0], scores[200]
    assert abs(icl) < 0.6
    assert later_icl < icl - 1.0
    assert later_value < value - 1.0
    assert later_distance < distance / 2


def test_the_loss_is_vectorised_over_models():
    model = seeded_model(width=16)
    x, y = RegressionData()(generator(), 12)
    together = vmap(lambda a, b: model(a, b))(x.reshape(3, 4, 8, 4), y.reshape(3, 4, 8))
    torch.testing.assert_close(together.reshape(12, 8), model(x, y))
