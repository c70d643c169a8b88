"""The samplers' steps by hand, with every parameter away from 0 and 1, and what they do by taking many of them."""

import math

import pytest
import torch
from torch import Generator, Tensor

from phasewatch.monitor.sampling.steps import baoab_start, baoab_step, sgld_step

SCALE = {"nbeta": 3.0, "gamma": 5.0, "eps": 0.16}


def doubles(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


# SGLD


def test_sgld_by_hand():
    stepped = sgld_step(
        doubles([1.5, -2.0], [4.0, 0.5]),
        doubles(0.5, 3.0),
        doubles([0.7, -1.3], [-2.0, 0.3]),
        doubles([0.4, -2.2], [1.5, -0.5]),
        **SCALE,
    )
    # 1.5 − 0.08·(3·0.7 + 5·1) + 0.4·0.4, and so on
    close(stepped, doubles([1.092, -0.568], [3.68, 1.228]))


def test_sgld_takes_an_anchor_and_a_step_size_for_each_chain():
    w, grads, noise = doubles([1.5], [1.5]), doubles([0.7], [0.7]), doubles([0.4], [0.4])
    close(sgld_step(w, doubles([0.5], [-0.5]), grads, noise, **SCALE), doubles([1.092], [0.692]))
    eps = doubles([0.16], [0.04])
    # 1.5 − 0.02·(3·0.7 + 5·1) + 0.2·0.4
    close(sgld_step(w, doubles(0.5), grads, noise, **SCALE | {"eps": eps}), doubles([1.092], [1.438]))


# BAOAB


def test_the_first_position_by_hand():
    close(
        baoab_start(doubles(0.5, 3.0), doubles([0.4, -2.2], [1.5, -0.5]), eps=0.16), doubles([0.58, 2.56], [0.8, 2.9])
    )
    close(baoab_start(doubles(0.5), doubles([0.4], [0.4]), eps=doubles([0.16], [0.04])), doubles([0.58], [0.54]))


def test_baoab_by_hand():
    w, velocity = baoab_step(
        doubles([1.5, -2.0], [4.0, 0.5]),
        doubles([-0.3, 0.9], [2.0, -1.1]),
        doubles(0.5, 3.0),
        doubles([0.7, -1.3], [-2.0, 0.3]),
        doubles([0.4, -2.2], [1.5, -0.5]),
        **SCALE,
        momentum=0.6,
    )
    # Forces −7.1, 28.9, −11.5, 11.6; velocities after the kick −3.14, 12.46, −2.6, 3.54;
    # positions 0.872, 0.492, 3.48, 1.208; velocities 0.6·p + 0.8·z; positions again.
    close(velocity, doubles([-1.564, 5.716], [-0.36, 1.724]))
    close(w, doubles([0.5592, 1.6352], [3.408, 1.5528]))


def test_baoab_takes_an_anchor_and_a_step_size_for_each_chain():
    one = doubles([1.5], [1.5]), doubles([-0.3], [-0.3])
    anchors, grad, noise, eps = (
        doubles([0.5], [-0.5]),
        doubles([0.7], [0.7]),
        doubles([0.4], [0.4]),
        doubles([0.16], [0.04]),
    )
    together = baoab_step(*one, anchors, grad, noise, **SCALE | {"eps": eps}, momentum=0.6)
    for c, size in enumerate((0.16, 0.04)):
        alone = baoab_step(*(each[c] for each in (*one, anchors, grad, noise)), **SCALE | {"eps": size}, momentum=0.6)
        close(together[0][c], alone[0])
        close(together[1][c], alone[1])


def test_without_momentum_it_is_the_step_of_leimkuhler_and_matthews():
    """From the position half a step later than theirs: w ← w + ε/2·F(w) + √ε/2·(z_n + z_{n+1})."""
    w, anchor, grad = doubles(1.5, -2.0), doubles(0.5, 3.0), doubles(0.7, -1.3)
    before, after = doubles(0.4, -2.2), doubles(1.5, -0.5)
    found, velocity = baoab_step(w, before, anchor, grad, after, **SCALE, momentum=0.0)
    force = -(3.0 * grad + 5.0 * (w - anchor))
    close(found, w + 0.08 * force + 0.2 * (before + after))
    close(velocity, after)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_no_force_leaves_a_velocity_its_variance(momentum):
    noise, before = torch.randn(2, 100_000, generator=Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros_like(noise)
    _, velocity = baoab_step(zero, before, zero, zero, noise, nbeta=3.0, gamma=5.0, eps=0.16, momentum=momentum)
    assert velocity.var().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / 100_000))
    assert (velocity * before).mean().item() == pytest.approx(momentum, abs=4 * math.sqrt(2 / 100_000))


# Many steps: the variance on a quadratic


@pytest.mark.parametrize("momentum", [None, 0.0, 0.7])
def test_the_stationary_variance_of_a_quadratic(momentum):
    """SGLD has 1/(a·(1 − ε·a/4)), a = nβ·h + γ, and BAOAB 1/a, for any step size and momentum."""
    nbeta, gamma, h, chains = 20.0, 5.0, 2.5, 40_000
    a = nbeta * h + gamma
    scale = {"nbeta": nbeta, "gamma": gamma, "eps": 1.5 / a}
    generator = Generator().manual_seed(9)

    def drawn() -> Tensor:
        return torch.randn(chains, generator=generator, dtype=torch.float64)

    anchor = doubles(0.8)
    w, velocity = anchor + 0 * drawn(), drawn()
    if momentum is not None:
        w = baoab_start(anchor, velocity, eps=scale["eps"])
    for _ in range(60):
        grad = h * (w - anchor)
        if momentum is None:
            w = sgld_step(w, anchor, grad, drawn(), **scale)
        else:
            w, velocity = baoab_step(w, velocity, anchor, grad, drawn(), **scale, momentum=momentum)
    squares = a * (w - anchor).square()
    error = squares.std().item() / math.sqrt(chains)
    truth = 1 / (1 - 1.5 / 4) if momentum is None else 1.0
    assert abs(squares.mean().item() - truth) < 4 * error
    assert error < 0.02  # the two kinds of step are 0.6 apart
