"""The noise of a chain's step, as tests take it."""

from phasewatch.monitor.sampling.random_streams import groups_of, unflattened


def noise_of_step(stream, weights):
    """The next step's noise of a `ChainNoise`, in the shapes of some weights."""
    drawn = []
    for group in groups_of([weight.numel() for weight in weights]):
        some = [weights[k] for k in group]
        sizes = [weight.numel() for weight in some]
        drawn += unflattened(stream.into(some[0].new_empty(sum(sizes)), sizes), some)
    return drawn
