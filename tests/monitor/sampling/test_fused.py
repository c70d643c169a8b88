"""The step as one kernel: its coefficients, its noise, and chains that take it, beside the plain step."""

import pytest
import torch

import phasewatch as pw
from phasewatch.monitor.sampling import chains
from phasewatch.monitor.sampling.fused import Coefficients, FusedStep
from phasewatch.monitor.sampling.position import AnchorOnDevice, AnchorOnHost, DisplacementOnDevice
from phasewatch.monitor.sampling.random_streams import ChainNoise
from phasewatch.monitor.sampling.ways import Way
from tests.noise import noise_of_step

SETTING = {"step_size": 1e-4, "nbeta": 70.0, "localization": 30.0, "draws": 20, "burn_in": 8, "batch_size": 32}
SAMPLERS = {
    "SGLD": pw.SGLD(**SETTING),
    "no momentum": pw.Langevin(**SETTING, momentum=0.0),
    "momentum": pw.Langevin(**SETTING, momentum=0.6),
    "kappa": pw.Langevin(**{**SETTING, "step_size": None}, kappa=0.5),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_coefficients_are_those_of_the_step(sampler):
    generator = torch.Generator().manual_seed(0)
    w, velocity, anchor, grad, noise = torch.randn(5, 50, generator=generator, dtype=torch.float64)
    eps, kept = 0.013, sampler.velocity_kept
    after, moved = sampler.step(w, None if kept is None else velocity, anchor, grad, noise, eps)
    found = Coefficients.of(sampler, eps)
    terms = torch.stack([w - anchor, grad, velocity if kept else 0 * w, noise, velocity if kept == 0 else 0 * w])
    torch.testing.assert_close(w + torch.tensor(found.weights, dtype=torch.float64) @ terms, after)
    if kept:
        torch.testing.assert_close(torch.tensor(found.velocity, dtype=torch.float64) @ terms[:4], moved)
    torch.testing.assert_close(anchor + found.start * noise, sampler.start(anchor, noise, eps))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    def test_noise_is_normal_and_depends_on_its_number_alone(self):
        shapes = [(3,), (1000, 1500), (2**26 + 5,), (7, 11)]
        like = [torch.empty(shape, device="cuda") for shape in shapes]
        stream = ChainNoise(3, 1, torch.device("cuda"))
        first, second = noise_of_step(stream, like), noise_of_step(stream, like)
        again = noise_of_step(ChainNoise(3, 1, torch.device("cuda")), like)
        other = noise_of_step(ChainNoise(3, 2, torch.device("cuda")), like)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        z = first[2].double()
        moments = [float((z**k).mean()) for k in (1, 2, 3, 4)]
        errors = [4 * (variance / z.numel()) ** 0.5 for variance in (1, 2, 15, 96)]
        assert all(abs(m - true) < e for m, true, e in zip(moments, (0, 1, 0, 3), errors, strict=True))
        assert z.abs().max() > 5
        for pair in ((first[2][:-1], first[2][1:]), (first[2], second[2]), (first[2], other[2])):
            assert abs(float((pair[0].double() * pair[1]).mean())) < 4 / z.numel() ** 0.5

    @pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
    @pytest.mark.parametrize("parts", [None, {"a": "0.weight", "b": {"0.bias": torch.arange(16) % 3 > 0}}])
    def test_chains_are_those_of_the_plain_step(self, monkeypatch, sampler, parts):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).cuda()
        x = torch.randn(256, 8)

        def loss(model, batch):
            return (model(batch) - torch.tanh(batch[:, :1])).square().mean()

        probe, snapshot = pw.Probe(model, loss, x, sampler=sampler, parts=parts), pw.Snapshot.of(model, 0)

        def found():
            point = probe(snapshot)
            return torch.tensor([point.llc.value] + [part.value for part in point.parts.values()])

        probe.subject.loss.vectorised = True
        stacked = found()
        probe.subject.loss.vectorised = False
        for position, tolerance in ((AnchorOnDevice, 1e-5), (AnchorOnHost, 1e-5), (DisplacementOnDevice, 0.02)):
            monkeypatch.setattr(chains, "ways", lambda target, rows, position=position: iter([Way(0, position)]))
            with monkeypatch.context() as patch:
                patch.setattr(FusedStep, "fits", staticmethod(lambda *_: False))
                plain = found()
            near = {"rtol": tolerance, "atol": tolerance * abs(float(plain[0]))}
            torch.testing.assert_close(found(), plain, **near)
            if sampler.target_kappa is None:  # else steps go by the curvature of a part of the minibatch
                torch.testing.assert_close(plain, stacked, **near)
