"""Training with the monitor is bit-identical to training without it."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from law_models import BRIDGE, GPT2, PERCEPTRON, TRANSFORMER, Case, Perceptron, classify, labelled
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map
from torch.utils.data import DataLoader, TensorDataset

import phasewatch as pw

SAMPLER = pw.SGLD(step_size=1e-5, nbeta=10.0, chains=2, draws=4, burn_in=1, batch_size=16)
STEPS = 4


Watch = Callable[[nn.Module], Any]
"""Given the live model, what is called with each step, or None; closed at the end."""


def everything(model: nn.Module, *others: Any) -> dict[str, Any]:
    """All that a monitor could disturb, by name, comparable with ==."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "python stream": random.getstate(),
        "numpy stream": (numpy_state[1].tolist(), *numpy_state[2:]),
        "torch stream": torch.get_rng_state().tolist(),
        "torch seed": torch.initial_seed(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    for name, module in model.named_modules():
        state[f"mode of {name}"] = module.training
        state[f"hooks of {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"parameter {name}"] = bits(parameter)
        state[f"gradient of {name}"] = bits(parameter.grad)
        state[f"kind of {name}"] = (parameter.requires_grad, id(parameter) in map(id, model.parameters()))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state[f"buffer {name}"] = bits(buffer)
    for path, leaf in tree_flatten_with_path([other.state_dict() for other in others])[0]:
        state[f"state {path}"] = bits(leaf)
    return state


def bits(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    flat = value.detach().contiguous().flatten()
    return (value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes())


def train(case: Case, watch: Watch | None = None, surroundings: Callable[[], Any] = contextlib.nullcontext) -> Any:
    """A training run that draws from every random stream; what it leaves, and its losses."""
    random.seed(5)
    np.random.seed(6)  # noqa: NPY002
    torch.manual_seed(7)
    model = case.make().train()
    next(m for m in model.modules() if not list(m.children())).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    data = case.data()
    parameters = list(model.parameters())
    monitor = watch(model) if watch else None
    losses = []
    for step in range(1, STEPS + 1):
        rows = torch.randperm(64)[: 16 + random.randrange(8) + np.random.randint(8)]  # noqa: NPY002
        loss = case.loss(model, tree_map(lambda tensor, rows=rows: tensor[rows], data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if monitor:
            with surroundings():
                before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
                monitor(step)
                after = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
                assert before == after
    if monitor:
        monitor.close()
        assert monitor.trajectory.steps.tolist() == list(range(1, STEPS + 1))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    return everything(model, optimizer, schedule) | {"losses": losses}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or a[name] != b[name])


@pytest.mark.parametrize(
    ("case", "measure"),
    [
        pytest.param(PERCEPTRON, "inline", id="mlp-inline"),
        pytest.param(TRANSFORMER, "inline", id="transformer-inline"),
        pytest.param(BRIDGE, "inline", id="bridge-inline"),
        pytest.param(GPT2, "inline", id="gpt2-inline"),
        pytest.param(PERCEPTRON, "background", id="mlp-background"),
        pytest.param(TRANSFORMER, "background", id="transformer-background", marks=pytest.mark.slow),
        pytest.param(BRIDGE, "background", id="bridge-background", marks=pytest.mark.slow),
        pytest.param(GPT2, "background", id="gpt2-background", marks=pytest.mark.slow),
    ],
)
def test_training_is_bit_identical(case, measure, tmp_path):
    def watch(model):
        made = model if measure == "inline" else case.make
        probe = pw.Probe(made, case.loss, case.data(), sampler=SAMPLER)
        return pw.PhaseMonitor(model, probe, run=tmp_path / "run", at=pw.every(1), measure=measure)

    assert differences(train(case), train(case, watch)) == []


@pytest.mark.usefixtures("reported")
@pytest.mark.parametrize("case", [PERCEPTRON, TRANSFORMER, BRIDGE], ids=["mlp", "transformer", "bridge"])
@pytest.mark.parametrize("surroundings", [contextlib.nullcontext, torch.inference_mode], ids=["plain", "inference"])
def test_training_is_bit_identical_with_an_average_beside_it(case, surroundings, tmp_path):
    def watch(model):
        probe = pw.Probe(case.make, case.loss, case.data(), sampler=SAMPLER)
        return pw.PhaseMonitor(model, probe, run=tmp_path / "run", at=pw.every(1), average=0.1)

    assert differences(train(case), train(case, watch, surroundings)) == []


def test_the_comparison_sees_a_monitor_that_disturbs():
    def watch(model):
        class Disturbing:
            trajectory = pw.Trajectory()

            def __call__(self, step):
                torch.rand(1)

            def close(self):
                self.trajectory = type("T", (), {"steps": np.arange(1, STEPS + 1)})

        return Disturbing()

    found = differences(train(PERCEPTRON), train(PERCEPTRON, watch))
    assert "torch stream" in found
    assert "losses" in found
    assert "parameter head.weight" in found


def random_factory() -> nn.Module:
    """Draws from each stream, and leaves torch's switched."""
    random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    return Perceptron()


@pytest.mark.usefixtures("reported")
@pytest.mark.parametrize(
    "surroundings",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True),
    ],
    ids=["no_grad", "inference_mode", "autocast", "anomaly"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_surroundings_of_the_call_change_neither_training_nor_points(surroundings, tmp_path):
    monitors = []

    def watch_inside(surroundings, run):
        def watch(model):
            with surroundings():
                probe = pw.Probe(random_factory, classify, labelled(), sampler=SAMPLER)
                monitors.append(pw.PhaseMonitor(model, probe, run=tmp_path / run, at=pw.every(1)))
            return monitors[-1]

        return watch

    plain = train(PERCEPTRON)
    assert differences(plain, train(PERCEPTRON, watch_inside(surroundings, "inside"), surroundings)) == []
    assert differences(plain, train(PERCEPTRON, watch_inside(contextlib.nullcontext, "outside"))) == []
    inside, outside = (list(monitor.trajectory) for monitor in monitors)
    assert inside == outside


@pytest.mark.usefixtures("reported")
def test_a_probe_built_mid_training_disturbs_nothing(tmp_path):
    def watch(model):
        class Late:
            monitor = None

            def __call__(self, step):
                if step == 3:
                    probe = pw.Probe(model, classify, labelled(), sampler=SAMPLER)
                    self.monitor = pw.PhaseMonitor(model, probe, run=tmp_path / "run", at=pw.every(1))
                if self.monitor:
                    self.monitor(step)

            def close(self):
                self.monitor.close()
                assert self.monitor.trajectory.steps.tolist() == [3, 4]
                self.trajectory = type("T", (), {"steps": np.arange(1, STEPS + 1)})

        return Late()

    assert differences(train(PERCEPTRON), train(PERCEPTRON, watch)) == []


def train_from_loader(run, measure, num_workers=0):
    random.seed(5)
    np.random.seed(6)  # noqa: NPY002
    torch.manual_seed(7)
    model = Perceptron().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(*labelled()), batch_size=16, shuffle=True, generator=torch.Generator())
    monitor = None
    seen = []
    for epoch in range(2):
        for i, batch in enumerate(loader):
            if measure and monitor is None:
                made = model if measure == "inline" else Perceptron
                probe = pw.Probe(made, classify, loader, sampler=SAMPLER)
                monitor = pw.PhaseMonitor(model, probe, run=run, at=pw.every(1), measure=measure)
            seen.append(bits(batch[0]))
            optimizer.zero_grad()
            classify(model, batch).backward()
            optimizer.step()
            if monitor:
                monitor(4 * epoch + i)
    if monitor:
        monitor.close()
        assert len(monitor.trajectory) == 8
    return everything(model, optimizer) | {"seen": seen, "loader stream": bits(loader.generator.get_state())}


@pytest.mark.usefixtures("reported")
def test_a_loader_that_trains_and_is_probed_at_once_keeps_its_order(tmp_path):
    plain = train_from_loader(tmp_path, None)
    assert differences(plain, train_from_loader(tmp_path / "inline", "inline")) == []
    assert differences(plain, train_from_loader(tmp_path / "background", "background")) == []


@pytest.mark.usefixtures("reported")
def test_the_users_hooks_see_none_of_the_monitors_passes(tmp_path):
    calls = []
    model = Perceptron()
    model.head.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    model.head.weight.register_hook(lambda _: calls.append("gradient"))
    model.head.weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    probe = pw.Probe(model, classify, labelled(), sampler=SAMPLER)
    with pw.PhaseMonitor(model, probe, run=tmp_path / "run", at=pw.every(1)) as monitor:
        monitor(1)
    assert len(monitor.trajectory) == 1
    assert calls == []
    classify(model, labelled()).backward()
    assert set(calls) == {"forward", "before", "backward", "gradient", "accumulated"}


def test_threads_and_precision_of_the_probe_hold_only_while_it_measures(tmp_path):
    seen = []

    def threads(model, batch):
        seen.append((torch.get_num_threads(), torch.get_float32_matmul_precision()))
        return 0.0

    threads_before, precision_before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    model = Perceptron()
    torch.set_float32_matmul_precision("high")
    try:
        probe = pw.Probe(
            model, classify, labelled(), sampler=SAMPLER, metrics={"t": threads}, threads=threads_before + 1
        )
        torch.set_float32_matmul_precision("medium")
        probe(pw.Snapshot.of(model, 0))
        assert seen == [(threads_before + 1, "high")]
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads_before, "medium")
    finally:
        torch.set_float32_matmul_precision(precision_before)


def test_a_measurement_that_fails_midway_leaves_no_trace():
    def fails(model, batch):
        random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
        if armed:
            raise RuntimeError("no")
        return classify(model, batch)

    armed = []
    model = Perceptron()
    probe = pw.Probe(model, fails, labelled(), sampler=SAMPLER, threads=torch.get_num_threads() + 1)
    before = everything(model)
    armed.append(True)
    with pytest.raises(RuntimeError, match="no"):
        probe(pw.Snapshot.of(model, 0))
    assert differences(before, everything(model)) == []


def test_the_live_models_tensors_are_shared_with_nothing():
    model = Perceptron()
    probe = pw.Probe(model, classify, labelled(), sampler=SAMPLER)
    theirs = {t.data_ptr() for t in tree_leaves([list(model.parameters()), list(model.buffers())])}
    ours = {t.data_ptr() for t in [*probe.subject.model.module.parameters(), *probe.subject.model.module.buffers()]}
    copied = {t.data_ptr() for t in pw.Snapshot.of(model, 0).tensors.values()}
    assert not theirs & ours
    assert not theirs & copied
