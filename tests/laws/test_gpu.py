"""The laws on a CUDA device: run with `-m gpu` where there is one."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import phasewatch as pw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SAMPLER = pw.SGLD(step_size=1e-4, localization=100, nbeta=30, chains=3, draws=8, burn_in=4, batch_size=16)


def make_model():
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def data(seed=0, size=128):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def train(attach, steps=24):
    torch.manual_seed(0)
    model = make_model().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = (part.cuda() for part in data())
    call, close = attach(model)
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (32,), device="cuda")
        optimizer.zero_grad()
        loss(model, (x[rows], y[rows])).backward()
        optimizer.step()
        call(step)
    close()
    states = [torch.get_rng_state(), torch.cuda.get_rng_state()]
    return [*model.state_dict().values(), *states]


@pytest.mark.parametrize("measure", ["inline", "background"])
def test_training_on_the_gpu_is_untouched_and_replay_repeats_it(tmp_path, measure):
    probe = pw.Probe(make_model, loss, data(), sampler=SAMPLER, device="cuda")

    def attach(model):
        monitor = pw.PhaseMonitor(model, probe, run=tmp_path / "run", at=pw.every(8), measure=measure)
        return monitor, monitor.close

    plain = train(lambda model: (lambda step: None, lambda: None))
    watched = train(attach)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    live = list(pw.Trajectory.read(tmp_path / "run" / "points.jsonl"))
    assert [point.step for point in live] == [8, 16, 24]
    assert all(point.llc.health is not pw.Health.DIVERGED for point in live)
    assert list(pw.replay(tmp_path / "run", probe)) == live


def test_the_gpu_and_the_cpu_measure_the_same_model():
    torch.manual_seed(1)
    model = make_model()
    snapshot = pw.Snapshot.of(model, 0)
    sampler = pw.SGLD(step_size=1e-3, localization=100, nbeta=30, chains=4, draws=1800, burn_in=100, batch_size=64)
    points = {
        device: pw.Probe(make_model, loss, data(), sampler=sampler, device=device)(snapshot)
        for device in ("cpu", "cuda")
    }
    assert points["cuda"].loss == pytest.approx(points["cpu"].loss, rel=1e-5)
    spread = (points["cpu"].llc.error ** 2 + points["cuda"].llc.error ** 2) ** 0.5
    assert spread < 0.25
    assert abs(points["cpu"].llc.value - points["cuda"].llc.value) < 4 * spread


def test_a_model_on_the_gpu_is_measured_there():
    model = make_model().cuda()
    probe = pw.Probe(model, loss, data(), sampler=SAMPLER)
    assert probe.subject.model.device.type == "cuda"
    assert probe(pw.Snapshot.of(model, 3)).step == 3
    assert pw.Probe(partial(make_model), loss, data(), sampler=SAMPLER).subject.model.device.type == "cpu"


class Attention(nn.Module):
    """With more blocks than run on a GPU at once, which add gradients in any order unless they are told not to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(500, 768), nn.Linear(768, 500)
        self.mix = nn.ModuleList([nn.Linear(768, 2304) for _ in range(4)])

    def forward(self, words):
        x = self.embedding(words)
        for mix in self.mix:
            q, k, v = (part.unflatten(-1, (12, 64)).transpose(1, 2) for part in mix(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(x)


def next_word(model, words):
    return F.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


def test_chains_in_place_are_the_same_each_time():
    words = torch.randint(500, (64, 513), generator=torch.Generator().manual_seed(1))
    sampler = pw.Langevin(step_size=1e-5, nbeta=30.0, localization=100.0, chains=2, draws=20, burn_in=5, batch_size=8)
    probe = pw.Probe(Attention, next_word, words, sampler=sampler, device="cuda", autocast=torch.bfloat16)
    probe.subject.loss.vectorised = False
    snapshot = pw.Snapshot.of(Attention(), 0)
    assert probe(snapshot) == probe(snapshot)
    assert not torch.are_deterministic_algorithms_enabled()


class RotatedAttention(nn.Module):
    """Has queries in float32 beside values in bfloat16 under autocast, as rotary positions make them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix, self.out = nn.Embedding(50, 64), nn.Linear(64, 192), nn.Linear(64, 50)

    def forward(self, words):
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.mix(self.embedding(words)).chunk(3, -1))
        turn = torch.ones(words.shape[1], 16, device=words.device)
        q, k = q * turn, k * turn
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_attention_of_two_types_is_vectorised_and_measured_as_in_place():
    words = torch.randint(50, (256, 33), generator=torch.Generator().manual_seed(1))
    snapshot, found = pw.Snapshot.of(RotatedAttention(), 0), {}
    for vectorised in (True, False):
        probe = pw.Probe(RotatedAttention, next_word, words, sampler=SAMPLER, device="cuda", autocast=torch.bfloat16)
        assert probe.subject.loss.mask_forms, probe.path
        probe.subject.loss.vectorised = vectorised
        found[vectorised] = probe(snapshot).llc
    apart = abs(found[True].value - found[False].value)
    assert apart < max(0.05 * abs(found[False].value), 3 * found[False].error)


def test_metrics_see_a_snapshot_that_was_copied_to_the_gpu_once():
    model = make_model()
    snapshot = pw.Snapshot.of(model, 0)

    def length(model, batch):
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        assert weights.device.type == "cuda"
        return weights.norm().item()

    def moved(model, batch):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        return length(model, batch)

    metrics = {"moved": moved, "length": length}
    probe = pw.Probe(make_model, loss, data(), sampler=SAMPLER, device="cuda", metrics=metrics)
    nearby = probe.subject.model.nearby(snapshot)
    assert all(tensor.device.type == "cuda" for tensor in nearby.tensors.values())
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).norm().item()
    for _ in range(2):
        assert probe(snapshot).metrics["length"] == pytest.approx(expected, rel=1e-5)
    assert all(tensor.device.type == "cpu" for tensor in snapshot.tensors.values())
