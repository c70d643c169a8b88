import copy
import dataclasses
import itertools
import math
import pickle
import threading
import warnings
import weakref

import cloudpickle
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
from phasewatch.monitor.model import copying
from phasewatch.monitor.probing.probe import measure_whole

SAMPLER = pw.Langevin(step_size=1e-5, nbeta=20.0, chains=2, draws=5, burn_in=2, batch_size=8)
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(-1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x).relu())


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def seeded():
    torch.manual_seed(1)
    return Net()


def probe(model=None, loss=loss, data=(X, Y), **more):
    return pw.Probe(model or seeded(), loss, data, **{"sampler": SAMPLER, **more})


def test_loss_and_metrics_are_the_models_own_in_evaluation_mode():
    model = seeded()
    model.body[1].running_mean.fill_(0.2)
    measured = probe(model, eval_batch=(X[:10], Y[:10]), metrics={"logit": lambda model, batch: model(batch[0])[3, 1]})(
        pw.Snapshot.of(model, 12)
    )
    model.eval()
    assert measured.step == 12
    assert measured.loss == pytest.approx(loss(model, (X[:10], Y[:10])).item(), rel=1e-6)
    assert measured.metrics["logit"] == pytest.approx(model(X[:10])[3, 1].item(), rel=1e-6)


def test_a_snapshot_is_what_counts_and_not_the_model_it_was_made_with():
    model = seeded()
    made = probe(model)
    with torch.no_grad():
        model.head.weight.mul_(3)
    assert made(pw.Snapshot.of(model, 1)) == probe(Net)(pw.Snapshot.of(model, 1))
    assert made(pw.Snapshot.of(model, 1)) != made(pw.Snapshot.of(seeded(), 1))


def test_the_seed_decides():
    snapshot = pw.Snapshot.of(seeded(), 1)
    assert probe(seed=1)(snapshot) == probe(seed=1)(snapshot)
    assert probe(seed=1)(snapshot).llc.value != probe(seed=2)(snapshot).llc.value


class Items(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, row):
        return X[row], Y[row]


def test_every_form_of_the_same_data_gives_the_same_point():
    snapshot = pw.Snapshot.of(seeded(), 1)
    expected = probe()(snapshot)
    assert probe(data=Items())(snapshot) == expected
    assert probe(data=TensorDataset(X, Y))(snapshot) == expected
    assert probe(data=DataLoader(Items(), batch_size=3, shuffle=True))(snapshot) == expected
    as_dict = probe(data={"x": X, "y": Y}, loss=lambda model, batch: loss(model, (batch["x"], batch["y"])))
    assert as_dict(snapshot) == expected


def test_data_made_on_the_fly():
    def draw(generator, size):
        x = torch.randn(size, 4, generator=generator)
        return x, x[:, :3].argmax(-1)

    made = probe(data=draw)
    assert len(made.subject.eval_batch[0]) == 1024
    assert made(pw.Snapshot.of(seeded(), 1)) == probe(data=draw)(pw.Snapshot.of(seeded(), 1))


class Drawing:
    """Made on the fly by an object whose `size` means something else."""

    size = (4, 3)

    def __call__(self, generator, size):
        return torch.randn(size, 4, generator=generator), torch.zeros(size, dtype=torch.long)


def test_data_whose_size_means_something_else():
    assert len(probe(data=Drawing()).subject.eval_batch[0]) == 1024


def test_a_padding_collate_function():
    class Texts(Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, row):
            return torch.arange(1 + row % 5)

    def embedded(model, batch):
        return model(batch).square().mean()

    def make():
        return nn.Embedding(6, 3)

    loader = DataLoader(Texts(), collate_fn=lambda items: nn.utils.rnn.pad_sequence(items, batch_first=True))
    made = probe(make, embedded, loader, sampler=dataclasses.replace(SAMPLER, batch_size=2, draws=30))
    estimate = made(pw.Snapshot.of(make(), 1)).llc
    assert math.isfinite(estimate.value)


@pytest.mark.parametrize(
    "metric",
    [
        lambda model, batch: (model.train(), 0.0)[1],
        lambda model, batch: (model.head.weight.zero_(), 0.0)[1],
        lambda model, batch: (model.body[1].running_mean.fill_(9), 0.0)[1],
        lambda model, batch: (torch.rand(3), torch.manual_seed(3), 0.0)[2],
    ],
    ids=["train mode", "weights", "buffers", "stream"],
)
def test_a_metric_that_changes_the_model_changes_nothing_else(metric):
    snapshot = pw.Snapshot.of(seeded(), 1)
    plain = probe(metrics={"logit": lambda model, batch: model(batch[0]).sum()})(snapshot)
    made = probe(metrics={"careless": metric, "logit": lambda model, batch: model(batch[0]).sum()})
    for _ in range(2):
        point = made(snapshot)
        assert (point.loss, point.llc) == (plain.loss, plain.llc)
        assert point.metrics == {"careless": 0.0} | plain.metrics


def test_a_metric_may_return_several_numbers():
    def quiz(model, batch):
        logits = model(batch[0])
        return {"mean": logits.mean(), "spread": logits.std().item()}

    model = seeded()
    point = probe(eval_batch=(X, Y), metrics={"quiz": quiz, "two": lambda *_: 2})(pw.Snapshot.of(model, 1))
    logits = model.eval()(X)
    expected = {"quiz_mean": logits.mean().item(), "quiz_spread": logits.std().item(), "two": 2}
    assert point.metrics == pytest.approx(expected)


def test_several_numbers_that_fail_are_nan_by_their_names():
    def quiz(model, batch):
        if fails:
            raise KeyError("tokens")
        return {"accuracy": 1.0, "loss": 2.0}

    fails, made, snapshot = False, probe(metrics={"quiz": quiz}), pw.Snapshot.of(seeded(), 1)
    assert made(snapshot).metrics == {"quiz_accuracy": 1.0, "quiz_loss": 2.0}
    fails = True
    with pytest.warns(PhasewatchWarning, match="'quiz': ...}. failed and is recorded as NaN: KeyError"):
        scores = made(snapshot).metrics
    assert list(scores) == ["quiz_accuracy", "quiz_loss"]
    assert all(map(math.isnan, scores.values()))


def test_two_metrics_of_one_name_keep_the_first_and_say_so_once():
    def quiz(*_):
        if fails:
            raise KeyError("tokens")
        return {"accuracy": 2, "loss": 3}

    fails, made = False, probe(metrics={"quiz_accuracy": lambda *_: 1, "quiz": quiz})
    snapshot = pw.Snapshot.of(seeded(), 1)
    with pytest.warns(PhasewatchWarning, match="'quiz': ...}. gives 'quiz_accuracy', which another metric") as said:
        points = [made(snapshot), made(snapshot)]
    assert len(said) == 1
    assert [point.metrics for point in points] == [{"quiz_accuracy": 1.0, "quiz_loss": 3.0}] * 2
    fails = True
    with pytest.warns(PhasewatchWarning, match="'quiz': ...}. failed"):  # which is said beside the name
        made(snapshot)


def test_a_metric_that_raises_is_nan_and_says_so_once():
    def fails(model, batch):
        raise KeyError("tokens")

    made = probe(metrics={"fails": fails, "vector": lambda model, batch: model(batch[0]), "fine": lambda *_: 2})
    snapshot = pw.Snapshot.of(seeded(), 1)
    with pytest.warns(PhasewatchWarning) as said:
        points = [made(snapshot), made(snapshot)]
    assert [math.isnan(p.metrics["fails"]) and math.isnan(p.metrics["vector"]) for p in points] == [True, True]
    assert points[0].metrics["fine"] == 2.0
    words = [str(w.message) for w in said]
    assert len(words) == 2
    assert words[0] == "Probe(metrics={'fails': ...}) failed and is recorded as NaN: KeyError: 'tokens'"
    assert words[1].startswith("Probe(metrics={'vector': ...}) failed")


def test_weights_that_are_not_finite_make_a_point_with_a_verdict():
    broken = seeded()
    with torch.no_grad():
        broken.head.weight[0, 0] = math.nan
    made = probe()
    point = made(pw.Snapshot.of(broken, 3))
    assert point.step == 3
    assert point.llc.health is pw.Health.DIVERGED
    assert math.isnan(point.llc.value)
    assert math.isnan(point.loss)
    sound = pw.Snapshot.of(seeded(), 4)
    assert made(sound) == probe()(sound)


def test_chains_that_diverge_leave_the_loss_standing():
    made = probe(sampler=dataclasses.replace(SAMPLER, step_size=1e4, nbeta=1e4, localization=0, burn_in=20))
    point = made(pw.Snapshot.of(seeded(), 3))
    assert point.llc.health is pw.Health.DIVERGED
    assert point.loss == probe()(pw.Snapshot.of(seeded(), 3)).loss


# --- misuse, when the probe is made ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
            r"returned a tensor of shape \(8,\); it must return a scalar tensor.*perhaps \.mean\(\) is missing",
        ),
        (lambda model, batch: loss(model, batch).item(), "returned a float; it must return a scalar tensor"),
        (lambda model, batch: None, "returned a NoneType"),
        (lambda model, batch: loss(model, batch) * math.nan, "returned nan on a minibatch of data"),
        (lambda model, batch: loss(model, batch) / 0, "returned inf on a minibatch"),
        (lambda model, batch: loss(model, batch).detach(), r"needs no gradient.*without \.detach\(\)"),
    ],
)
def test_a_loss_that_cant_be_sampled(bad, words):
    bad.__name__ = "objective"
    with pytest.raises(PhasewatchError, match=rf"Probe\(loss=objective\): .*{words}"):
        probe(loss=bad)


def test_a_loss_that_uses_another_model():
    live = seeded().eval()
    with pytest.raises(PhasewatchError, match=r"reaches no parameter of the model it was given.*such as the one in"):
        probe(live, lambda model, batch: loss(live, batch))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta:x"])
def test_a_device_that_isnt_there(device):
    with pytest.raises(PhasewatchError, match=rf"Probe\(device='{device}'\) is not a device that torch can use here"):
        probe(device=device)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"seed": -1}, r"Probe\(seed=-1\) must be a whole number from 0"),
        ({"seed": 0.5}, r"Probe\(seed=0\.5\)"),
        ({"seed": 2**64}, r"Probe\(seed=18446744073709551616\)"),
        ({"threads": 0}, r"Probe\(threads=0\) must be a whole number from 1"),
        ({"threads": -2}, r"Probe\(threads=-2\)"),
        ({"model": 3}, r"Probe\(model=\.\.\.\) takes a module or a function that builds one; a int came"),
        ({"model": lambda: None}, "was called to build the model and returned a NoneType"),
        ({"model": nn.Dropout()}, "no parameters"),
        ({"model": lambda: Net().requires_grad_(False)}, "nothing to sample"),
        ({"model": lambda: Net().to("meta")}, "meta device"),
    ],
)
def test_other_misuse(more, words):
    with pytest.raises(PhasewatchError, match=words):
        probe(**more)


def test_a_monitor_of_another_model(tmp_path):
    with pytest.raises(PhasewatchError, match=r"PhaseMonitor\(model=\.\.\.\) is not the model of its probe: .*lacks"):
        pw.PhaseMonitor(nn.Linear(4, 3), probe(), run=tmp_path / "run", at=pw.every(1))


def test_a_monitor_of_a_model_on_meta(tmp_path):
    with pytest.raises(PhasewatchError, match=r"PhaseMonitor\(model=\.\.\.\).*meta"):
        pw.PhaseMonitor(Net().to("meta"), probe(), run=tmp_path / "run", at=pw.every(1))


def test_precision_set_for_one_backend(monkeypatch):
    def mixed():
        raise RuntimeError("mix of the legacy and new APIs")

    expected = probe()(pw.Snapshot.of(seeded(), 1))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert probe()(pw.Snapshot.of(seeded(), 1)) == expected


# --- another process ------------------------------------------------------------------------------------------------


def test_a_probe_that_holds_a_module_stays():
    with pytest.raises(PhasewatchError, match=r"Probe\(model=Net\(\.\.\.\)\) holds a module.*Probe\(make_model"):
        pickle.dumps(probe())


@pytest.mark.parametrize("send", [copy.deepcopy, lambda made: cloudpickle.loads(cloudpickle.dumps(made))])
def test_a_probe_that_builds_its_model_travels(send):
    before = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    torch.set_float32_matmul_precision("high")
    made = probe(Net, seed=4, metrics={"two": lambda model, batch: 2.0})
    torch.set_float32_matmul_precision(before[0])
    sent = send(made)
    assert (torch.get_float32_matmul_precision(), torch.get_default_dtype()) == before
    assert sent.settings == made.settings
    assert sent(pw.Snapshot.of(seeded(), 1)) == made(pw.Snapshot.of(seeded(), 1))


def test_a_loader_that_cant_be_sent_leaves_its_dataset():
    loader = DataLoader(Items(), batch_size=4)
    loader.lock = threading.Lock()
    made = cloudpickle.loads(cloudpickle.dumps(probe(Net, data=loader)))
    assert made(pw.Snapshot.of(seeded(), 1)) == probe()(pw.Snapshot.of(seeded(), 1))


def test_building_draws_from_no_stream():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    probe(Net)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_probe_built_in_inference_mode_can_be_used_outside():
    snapshot = pw.Snapshot.of(seeded(), 1)
    expected = probe()(snapshot)
    model = seeded()
    for make in (model, Net):
        with torch.inference_mode():
            made = probe(make)
        assert made(snapshot) == expected


def test_a_live_model_in_bfloat16_is_measured():
    model = seeded().bfloat16()
    made = probe(model, data=(X.bfloat16(), Y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point = made(pw.Snapshot.of(model, 1))
    assert math.isfinite(point.llc.value)


@pytest.mark.parametrize("batch_size", [8, 16, None])
def test_another_sampler_makes_the_probe_that_has_it_from_the_start(batch_size):
    sampler = dataclasses.replace(SAMPLER, step_size=2e-5, chains=3, draws=7, batch_size=batch_size)
    extras = {"metrics": {"two": lambda model, batch: 2.0}, "parts": {"head": "head.*"}, "seed": 3}
    made, snapshot = probe(**extras), pw.Snapshot.of(seeded(), 1)
    before = made(snapshot)
    other, expected = made.with_sampler(sampler), probe(**extras, sampler=sampler)
    assert other.settings == expected.settings
    assert other(snapshot) == expected(snapshot) != before
    assert len(other.subject.kept(sampler)) == len(expected.subject.kept(sampler))
    assert made(snapshot) == before
    assert made.sampler == SAMPLER


def test_a_probe_with_another_sampler_travels():
    made = probe(seeded).with_sampler(dataclasses.replace(SAMPLER, draws=9))
    sent = cloudpickle.loads(cloudpickle.dumps(made))
    assert sent.sampler.draws == 9
    assert sent(pw.Snapshot.of(seeded(), 1)) == made(pw.Snapshot.of(seeded(), 1))


def test_the_whole_alone_has_neither_metrics_nor_parts():
    def never(model, batch):
        raise AssertionError

    made, snapshot = probe(metrics={"never": never}, parts={"head": "head.*"}), pw.Snapshot.of(seeded(), 1)
    assert measure_whole(made, snapshot, SAMPLER) == probe()(snapshot)
    other = dataclasses.replace(SAMPLER, step_size=3e-5, draws=9)
    assert measure_whole(made, snapshot, other) == probe(sampler=other)(snapshot)
    head = probe(parts="head.*")
    assert measure_whole(head, snapshot, SAMPLER) == head(snapshot)


def test_a_probe_of_all_the_data_at_each_step_can_be_sent():
    sampler = dataclasses.replace(SAMPLER, batch_size=None)
    sent = cloudpickle.loads(cloudpickle.dumps(probe(Net, sampler=sampler)))
    assert sent(pw.Snapshot.of(seeded(), 1)) == probe(sampler=sampler)(pw.Snapshot.of(seeded(), 1))


def test_a_probe_knows_how_many_samples_there_are():
    assert probe().subject.samples == 32
    assert probe(data=lambda generator, size: (X[:size], Y[:size])).subject.samples is None


def test_another_sampler_with_more_samples_than_there_are_is_a_sentence():
    made = probe(sampler=dataclasses.replace(SAMPLER, batch_size=None))
    with pytest.raises(
        pw.PhasewatchError, match=rf"has {len(X)} samples, fewer than Langevin\(batch_size={len(X) + 1}\)"
    ):
        made.with_sampler(dataclasses.replace(SAMPLER, batch_size=len(X) + 1))


def test_the_settings_tell_parts_of_one_shape_apart():
    layers = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    square = (lambda model, x: model(x).square().mean(), torch.randn(200, 6))
    of = [pw.Probe(layers, *square, sampler=SAMPLER, parts=part).settings for part in ("0", "1", {"a": "1"}, None)]
    assert all(a["parts"] != b["parts"] for a, b in itertools.combinations(of, 2))


@pytest.mark.parametrize("kept", [False, True])
def test_a_large_model_that_was_built_is_copied_only_where_something_keeps_it(kept, monkeypatch):
    monkeypatch.setattr(copying, "LARGE", 1)
    built = []

    def make_model():
        built.append(model := Net())
        if not kept:
            built[:] = [weakref.ref(model)]
        return model

    own = probe(make_model).subject.model.module
    assert (own is (built[0] if kept else built[0]())) is not kept


@pytest.mark.parametrize("together", [True, False])
def test_a_choice_that_was_timed_elsewhere_is_taken_over(together):
    made = probe(Net)
    rebuild, (arguments, metrics) = made.__reduce__()
    assert arguments.path is None  # nothing is timed on a CPU
    other = rebuild(dataclasses.replace(arguments, path=(together, "As there.")), metrics)
    assert (other.subject.loss.vectorised, other.path) == (together, "As there.")
    assert other.with_sampler(dataclasses.replace(SAMPLER, batch_size=4)).path == "Chains run together."
    snapshot = pw.Snapshot.of(seeded(), 1)
    assert other(snapshot).llc.value == pytest.approx(made(snapshot).llc.value, rel=1e-3)
