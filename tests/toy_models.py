"""What the tests of all toy models check alike."""

import torch

from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.weights import SampledModel


def assert_chains_are_vectorised(make, loss, batches):
    """Whether a model's chains run stacked, with the losses that the model has by itself at several sets of weights.

    Args:
        make: builds the model, the same each time.
        loss: `loss(model, batch)`.
        batches: a minibatch for each set of weights.
    """
    model = SampledModel(make())
    stacked = ModelLoss(model, loss)
    stacked.choose_path(Batches(batches))
    assert stacked.vectorised
    generator = torch.Generator().manual_seed(0)
    rows = [w + 0.01 * torch.randn(len(batches), *w.shape, generator=generator) for w in model.weights()]
    together = stacked.at_rows.rows(rows, Batches(batches))
    alone = []
    for row, batch in enumerate(batches):
        one = SampledModel(make())
        one.set([weight[row] for weight in rows])
        alone.append(loss(one.module, batch).detach())
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
