"""Whatever the model: training is untouched, live points equal replayed ones, and λ̂ is that of a plain loop."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map
from zoo_hub import HUB
from zoo_layers import LAYERS

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchWarning
from phasewatch.monitor.sampling.random_streams import ChainNoise
from tests.noise import noise_of_step

SAMPLER = pw.SGLD(step_size=1e-4, localization=50.0, nbeta=30.0, chains=2, draws=4, burn_in=2, batch_size=None)
ZOO = LAYERS | HUB


def some_of_the_zoo():
    """All models; every fifth runs by default, the others with `-m slow`."""
    for number, (name, case) in enumerate(ZOO.items()):
        yield pytest.param(case, id=name, marks=[pytest.mark.slow] if number % 5 else [])


pytestmark = [
    pytest.mark.usefixtures("reported"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.parametrize("case", list(some_of_the_zoo())),
]


def made(case):
    torch.manual_seed(3)
    return case.make()


def first_rows(case):
    return tree_map(lambda leaf: leaf[:16], case.data())


def probe_of(case, model, **more):
    """A probe of which nothing is said but that its chains can't be vectorised."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PhasewatchWarning)
        probe = pw.Probe(model, case.loss, first_rows(case), sampler=SAMPLER, threads=1, **more)
    told = [str(warning.message) for warning in caught if warning.category is PhasewatchWarning]
    assert all("run one after another" in message for message in told), told
    return probe


def train(case, path=None):
    model = made(case).train()
    monitor = None
    if path is not None:
        monitor = pw.PhaseMonitor(model, probe_of(case, model), run=path, at=pw.every(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in (1, 2):
        optimizer.zero_grad()
        case.loss(model, first_rows(case)).backward()
        optimizer.step()
        if monitor is not None:
            monitor(step)
    if monitor is not None:
        monitor.close()
    left = {**model.state_dict(), "stream": torch.get_rng_state()}
    left |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return left, monitor


def test_training_is_untouched_and_a_replay_repeats_its_points(case, tmp_path):
    plain, _ = train(case)
    watched, monitor = train(case, tmp_path / "run")
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name].to_dense(), watched[name].to_dense()) for name in plain)
    assert monitor.trajectory.steps.tolist() == [1, 2]
    replayed = pw.replay(tmp_path / "run", probe_of(case, lambda: made(case)), run=tmp_path / "again")
    assert list(replayed) == list(monitor.trajectory)


def in_real_parts(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def plain_chain(case, chain):
    """SGLD by the user's own model and its backward pass, nothing else: the losses that a chain draws."""
    model = made(case).eval()
    data, stream = first_rows(case), ChainNoise(0, chain, torch.device("cpu"))
    trained = [p for p in model.parameters() if p.requires_grad]
    anchor = [p.detach().clone() for p in trained]
    losses = []
    for step in range(-1, SAMPLER.burn_in + SAMPLER.draws):
        noise = noise_of_step(stream, [in_real_parts(p.detach()) for p in trained])
        if step < 0:  # what a chain with momentum starts with
            continue
        model.zero_grad()
        loss = case.loss(model, data)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p, w, z in zip(trained, anchor, noise, strict=True):
                grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
                drift = SAMPLER.nbeta * grad + SAMPLER.localization * (p - w)
                # Training leaves an embedding's padding row, whose gradient is zero, as it is.
                still = (grad == 0).all(-1, keepdim=True) if "embed.weight" in dict(model.named_parameters()) else False
                z = torch.view_as_complex(z) if p.is_complex() else z
                p += torch.where(torch.as_tensor(still), 0, -SAMPLER.step_size / 2 * drift + SAMPLER.step_size**0.5 * z)
    return losses[SAMPLER.burn_in :]


def test_lambda_hat_is_that_of_a_plain_loop_by_both_paths(case):
    probe = probe_of(case, lambda: made(case))
    snapshot = pw.Snapshot.of(made(case), 1)
    model = made(case).eval()
    loss = case.loss(model, first_rows(case)).item()
    expected = [SAMPLER.nbeta * (np.mean(plain_chain(case, chain)) - loss) for chain in range(SAMPLER.chains)]
    found = {}
    for stacked in {probe.subject.loss.vectorised, False}:
        probe.subject.loss.vectorised = stacked
        point = probe(snapshot)
        assert point.loss == pytest.approx(loss, rel=1e-5)
        found[stacked] = point.llc
        np.testing.assert_allclose(point.llc.per_chain, expected, rtol=2e-3, atol=2e-5 * SAMPLER.nbeta * abs(loss))
    assert len(set(found)) > 0
