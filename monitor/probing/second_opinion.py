"""The same chains through devinterp's optimizer, one after another: a second opinion on our own sampler."""

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Generator, Tensor

from phasewatch.monitor.estimates.checks import Checks
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.weights import FlatModel, LossOnBatches
from phasewatch.monitor.sampling.chains import Chains, Stream, chain_seed
from phasewatch.monitor.sampling.curvature import Refused, attempt
from phasewatch.monitor.sampling.settings import SGLD


def run_devinterp_chains(
    model: FlatModel,
    anchor: Tensor,
    pool: Sequence[Any] | Batches,
    order: np.ndarray,
    sampler: SGLD,
    seed: int,
    mask: Tensor | None = None,
) -> Chains:
    """Sample with `devinterp.optim.SGMCMC.sgld`, whose step is that of `sgld_step` (Lau et al. 2023, eq. 15).

    Only the plain model and its own gradient are used, nothing vectorised, so a model with control flow that depends
    on its data can be sampled too. The noise is seeded as in `run_chains`: with float32 weights on the CPU both walk
    the same way, up to rounding. The walk is kept in the precision of `anchor`, not in that of the model's own
    parameters, which in half precision can't hold a small step.

    Args:
        model: what is sampled; left with the weights at which it was last called.
        anchor: w*, shape (parameter,).
        pool: minibatches on the model's device.
        order: which of them each chain takes at each step, indices of shape (burn_in + draws, chain).
        sampler: the settings.
        seed: seed of the noise.
        mask: True for the weights that move, shape (parameter,); all of them if None.

    Returns:
        The paired losses, and an acceptance of NaN: devinterp computes none.
    """
    from devinterp.optim import SGMCMC

    plain = copy.copy(model)
    plain.vectorised = False
    target = LossOnBatches(plain, pool if isinstance(pool, Batches) else Batches(pool))
    numbers = torch.arange(len(pool), device=anchor.device).unsqueeze(1)
    reference = np.empty(len(pool))
    for i in np.unique(order[sampler.burn_in :]):
        reference[i] = target.losses(anchor, numbers[i]).item()
    losses = np.empty(order.shape)
    for chain in range(sampler.chains):
        w = anchor.clone()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="nbeta set to 1")
            optimizer = SGMCMC.sgld(
                [w],
                lr=cast(float, sampler.resolved().step_size),
                nbeta=sampler.nbeta,
                localization=sampler.localization,
                mask=mask,
            )
        noise = Generator(anchor.device).manual_seed(chain_seed(seed, chain, Stream.NOISE))
        for step, i in enumerate(order[:, chain]):
            try:
                loss, grads = attempt(target, anchor, w[None], numbers[i])
            except Refused:
                return Chains.nowhere(sampler)
            losses[step, chain] = loss.item()
            if not math.isfinite(losses[step, chain]):
                return Chains.nowhere(sampler)
            w.grad = grads[0]
            optimizer.step(noise_generator=noise)
    drawn = order[sampler.burn_in :].T
    if not np.isfinite(reference[drawn]).all():
        return Chains.nowhere(sampler)
    return Chains(losses[sampler.burn_in :].T, reference[drawn], math.nan, Checks())
