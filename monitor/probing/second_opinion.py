"""The same estimate through devinterp's optimizer: an independent implementation to check our own sampler by."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Generator

from phasewatch.monitor.errors import PhasewatchError, requires
from phasewatch.monitor.estimates.estimate import Estimate
from phasewatch.monitor.estimates.verdict import estimate_from_losses
from phasewatch.monitor.model.gradients import clear_gradients
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.weights import Weights
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.probing.subject import WHOLE
from phasewatch.monitor.sampling.random_streams import (
    Stream,
    chain_seed,
    flattened,
    groups_of,
    minibatch_orders,
    unflattened,
)
from phasewatch.monitor.sampling.settings import SGLD
from phasewatch.monitor.sampling.target import Target
from phasewatch.monitor.snapshots.snapshot import Snapshot


def second_opinion(probe: Probe, snapshot: Snapshot) -> Estimate:
    """Estimate the local learning coefficient of a snapshot with `devinterp.optim.SGMCMC.sgld`, chain after chain.

    Its step is that of `SGLD` (Lau et al. 2023, eq. 15), its minibatches and noise those of our own chains. Only the
    plain model and its own gradient are used, nothing vectorised.

    Args:
        probe: with `sampler=pw.SGLD(...)`, which is what that optimizer does. The estimate is that of `Point.llc`: of
            the whole model, or of the parameters that `parts` names.
        snapshot: of the probe's model.

    Returns:
        The estimate. Its checks are NaN, so that its verdict is by the chains' losses alone.

    Raises:
        PhasewatchError: if devinterp isn't installed, or the probe samples by another step or by masks.

    Example:
        >>> import torch, phasewatch as pw
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(64, 3)
        >>> def loss(model, batch):
        ...     return model(batch).square().mean()
        >>> probe = pw.Probe(model, loss, x, sampler=pw.SGLD(step_size=1e-3, batch_size=None))
        >>> snapshot = pw.Snapshot.of(model, step=0)
        >>> ours, theirs = probe(snapshot).llc, pw.second_opinion(probe, snapshot)
        >>> abs(ours.value - theirs.value) < 3 * (ours.error + theirs.error)
        True
    """
    sampler, subject = probe.sampler, probe.subject
    if not isinstance(sampler, SGLD):
        raise PhasewatchError(
            f"second_opinion(probe, snapshot) samples by SGLD, and the probe by {type(sampler).__name__}. "
            "Give a probe with sampler=pw.SGLD(...)."
        )
    if subject.parts[WHOLE] is not None:
        raise PhasewatchError(
            "second_opinion(probe, snapshot) samples whole parameters, and the probe only some of their elements. "
            "Give a probe whose parts=... names parameters or modules, or none."
        )
    if subject.loss.vector.ranks > 1:
        raise PhasewatchError(
            "second_opinion(probe, snapshot) samples by devinterp's optimizer, which draws other noise on every "
            "process of a sharded model. Give a probe of the unsharded model."
        )
    with subject.measuring():
        subject.load(snapshot)
        target = LossOnBatches(subject.loss, subject.kept(sampler))
        losses, reference = run_devinterp_chains(target, subject.model.weights(), sampler, probe.seed)
    return estimate_from_losses(losses, reference, nbeta=sampler.nbeta, parameters=subject.model.size)


def run_devinterp_chains(target: Target, anchor: Weights, sampler: SGLD, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The losses of chains that devinterp's optimizer moves.

    Args:
        target: the loss; its parameters are left at the anchor.
        anchor: w*.
        sampler: the settings.
        seed: of the noise and the minibatches.

    Returns:
        L_m(w) and L_m(w*) on the same minibatches, each of shape (chain, draw). L_m(w) is NaN from where a chain met a
        loss that isn't finite, or weights that the model refuses.
    """
    with requires("second_opinion(probe, snapshot)"):
        from devinterp.optim import SGMCMC
    steps = sampler.burn_in + sampler.draws
    orders = minibatch_orders(seed, sampler.chains, steps, target.minibatches, whole=target.whole).numpy()
    target.set(anchor)
    reference = np.array([float(target.loss(number)) for number in range(target.minibatches)])
    losses = np.full(orders.shape, math.nan)
    groups = groups_of(
        [weight.numel() for weight in anchor]
    )  # one vector each, so that its noise is drawn as that of our own chains is
    for chain, order in enumerate(orders):
        weights = [flattened([anchor[k] for k in group]).clone().requires_grad_() for group in groups]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="nbeta set to 1")
            optimizer = SGMCMC.sgld(
                weights, lr=cast(float, sampler.step_size), nbeta=sampler.nbeta, localization=sampler.localization
            )
        noise = Generator(anchor[0].device).manual_seed(chain_seed(seed, chain, Stream.NOISE))
        for weight in weights:  # our own chains take their first noise for their start, where SGLD needs none
            torch.empty_like(weight).normal_(generator=noise)
        for step, number in enumerate(order):
            clear_gradients(target.parameters)
            try:
                losses[chain, step] = float(target.add_gradient(int(number)))
            except torch.OutOfMemoryError:
                raise
            except Exception:
                target.set(anchor)
                target.add_gradient(int(number))  # an error that comes up here too is none of the chain's doing
                break
            if not math.isfinite(losses[chain, step]):
                break
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in target.parameters]
            for weight, group in zip(weights, groups, strict=True):
                weight.grad = flattened([grads[k] for k in group]).to(weight.dtype)
            with _default_dtype(anchor[0].dtype):  # it draws its noise in this type, whatever the weights have
                optimizer.step(noise_generator=noise)
            shapes = [[anchor[k] for k in group] for group in groups]
            target.set(
                [w for flat, some in zip(weights, shapes, strict=True) for w in unflattened(flat.detach(), some)]
            )
        target.set(anchor)
    clear_gradients(target.parameters)
    return losses[:, sampler.burn_in :], reference[orders[:, sampler.burn_in :]]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
