"""The local learning coefficient of one model, without a training loop."""

from typing import Any

from torch import nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Estimate
from phasewatch.monitor.model.loss import Loss
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.snapshot import Snapshot


def estimate_llc(model: nn.Module, loss: Loss, data: Any, *, sampler: Sampler | None = None, seed: int = 0) -> Estimate:
    """Estimate the local learning coefficient of a model where it stands (Lau et al. 2023).

    Args:
        model: the model at a minimum of its loss, or nearly.
        loss: `loss(model, batch)`, the mean over the batch as a scalar tensor.
        data: any form that `Probe` takes.
        sampler: how to sample.
        seed: of the minibatches and the noise.

    Returns:
        λ̂ with its error and its verdict.

    Raises:
        PhasewatchError: as `Probe` does, for a model, loss or data that can't be measured.

    Example:
        Of a regular model λ is half the number of its parameters:

        >>> import torch, phasewatch as pw
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(20, 1, bias=False), torch.randn(512, 20)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> def loss(model, batch):
        ...     return model(batch).square().mean() / 2
        >>> sampler = pw.Langevin(kappa=0.5, localization=1, nbeta=1000, draws=400, batch_size=None)
        >>> found = pw.estimate_llc(model, loss, x, sampler=sampler)
        >>> abs(found.value - 10) < 3 * found.error
        True
    """
    if not isinstance(model, nn.Module):
        raise PhasewatchError(f"estimate_llc(model=...) takes a torch.nn.Module; a {type(model).__name__} came.")
    try:
        probe = Probe(model, loss, data, sampler=sampler, seed=seed)
    except PhasewatchError as error:
        raise PhasewatchError(str(error).replace("Probe(", "estimate_llc(", 1)) from error
    return probe(Snapshot.of(model, step=0)).llc
