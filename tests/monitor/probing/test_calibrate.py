"""Calibration where the right answer is known, where there is none, and what it costs."""

import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Generator, nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.vectorised import VectorisedLoss
from phasewatch.monitor.probing import attempts
from phasewatch.monitor.probing.calibrate import calibrate
from phasewatch.monitor.probing.calibration import Calibration, Trial
from phasewatch.monitor.probing.lengths import FEWEST_DRAWS
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.sampling import start
from phasewatch.monitor.sampling.settings import SGLD, Langevin
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.toy_tasks import deep_linear

calibrate_module = sys.modules[calibrate.__module__]
D = 40
NO_NOISE = torch.zeros(256, D, dtype=torch.float64)


class Bowl(nn.Module):
    """Weights in a bowl whose curvatures and centre are buffers, so that each snapshot has its own."""

    def __init__(self, curvatures=1.0, centre=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(D, dtype=torch.float64))
        self.register_buffer("curvatures", curvatures * torch.ones(D, dtype=torch.float64))
        self.register_buffer("centre", centre * torch.ones(D, dtype=torch.float64))


def loss(model, batch):
    away = model.w - model.centre
    return (model.curvatures * away.square()).sum() / 2 + batch.mean(0) @ model.w


def quartic(model, batch):
    return model.w.pow(4).sum() + 0 * batch.sum()


def brittle(model, batch):
    return torch.where(model.w.abs().max() > 1e-9, torch.nan, 1.0) + 0 * model.w.sum() + 0 * batch.sum()


def unwilling(model, batch):
    return 0 * model.w.sum() + 0 * batch.sum()


def make_probe(loss=loss, data=NO_NOISE, sampler=Langevin, **changes):
    return Probe(Bowl(), loss, data, sampler=sampler(**{"batch_size": 32, **changes}), threads=1)


def series(*curvatures):
    return [Snapshot.of(Bowl(h), step) for step, h in enumerate(curvatures, start=1)]


def noise():
    """Samples whose minibatches tilt the bowl, and whose mean doesn't."""
    x = torch.randn(2048, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 0.7 * (x - x.mean(0))


def calibrated(snapshots, probe, **options) -> Calibration:
    found = []
    sampler = calibrate(snapshots, probe, show=found.append, **options)
    (calibration,) = found
    assert calibration.sampler == sampler
    return calibration


@cache
def of_one_bowl() -> Calibration:
    """With the budget that is meant where none is given, which several tests look at."""
    return calibrated(series(1.0), make_probe())


QUICK = 2_500
"""A budget for a few trials, where what is tested isn't how well they find it."""

# The truth


def test_a_bowl_is_measured_right():
    spread = torch.linspace(0.5, 2, D, dtype=torch.float64)
    snapshots, probe = series(spread, spread, spread), make_probe()
    sampler = calibrate(snapshots, probe, show=None)
    assert sampler.batch_size is None
    assert 0.4 < sampler.step_size * (sampler.nbeta * 2 + sampler.localization) < 0.6
    estimate = probe.with_sampler(sampler)(snapshots[-1]).llc
    stiffness = sampler.nbeta * spread
    exact = (stiffness / (stiffness + sampler.localization)).sum().item() / 2
    assert estimate.health is Health.OK
    assert abs(estimate.value - exact) < 4 * estimate.error
    assert estimate.error < 0.07 * estimate.value
    assert exact > 0.99 * D / 2


def test_momentum_lets_a_weaker_localization_settle():
    """Steps on all of the data keep their speed: soft directions settle (1 + 0.95)/(1 − 0.95) times sooner."""
    spread = torch.logspace(-3, 0, D, dtype=torch.float64)
    snapshots, found = series(spread), {}
    for momentum in (0.0, 0.95):
        probe = make_probe(batch_size=None, momentum=momentum)
        sampler = calibrate(snapshots, probe, budget=20_000, show=None)
        estimate = probe.with_sampler(sampler)(snapshots[-1]).llc
        stiffness = sampler.nbeta * spread
        exact = (stiffness / (stiffness + sampler.localization)).sum().item() / 2
        if momentum:
            assert abs(estimate.value - exact) < 4 * estimate.error + 0.02 * exact
            assert estimate.error < 0.05 * exact
        found[momentum] = sampler.localization / sampler.nbeta, exact
    assert found[0.95][0] < 0.6 * found[0.0][0]
    assert found[0.95][1] > 0.95 * D / 2


@pytest.mark.parametrize("large", [False, True])
def test_what_short_chains_lack_is_told_where_it_is_known(monkeypatch, large):
    """Of a large model's chains no sums are kept that would tell it."""
    if large:
        monkeypatch.setattr(start, "LARGE", 1)
    found = calibrated(series(1.0), make_probe(), budget=QUICK)
    assert any("By what they remember" in reason for reason in found.reasons) is not large


def test_the_sharpest_snapshot_decides_the_step_size_wherever_it_stands():
    probe, orders = make_probe(), [(1.0, 10.0, 100.0), (100.0, 1.0, 10.0)]
    for curvatures in orders:
        calibration = calibrated(series(*curvatures), probe)
        sampler = calibration.sampler
        assert 0.4 < sampler.step_size * (100 * sampler.nbeta + sampler.localization) < 0.6
        sharpest = calibration.chosen.points[curvatures.index(100.0)].llc
        assert sharpest.health is Health.OK
        exact = D / 2 / (1 + sampler.localization / (100 * sampler.nbeta))
        assert abs(sharpest.value - exact) < 4 * sharpest.error
        assert sharpest.error < 0.05 * exact
        assert exact > 0.9 * D / 2
        assert {point.llc.health for point in calibration.chosen.points} <= {Health.OK, Health.LOCALIZED}


@pytest.fixture
def minibatches(monkeypatch):
    """No data is so small that all of it, or more than is asked for, is taken at each step."""
    monkeypatch.setattr(calibrate_module, "ALL_OF_THE_DATA", 0)
    monkeypatch.setattr(calibrate_module, "OF_A_MINIBATCH", 0)


@pytest.mark.usefixtures("minibatches")
def test_noise_is_taken_out_by_a_lower_nbeta():
    calibration = calibrated(series(1.0), make_probe(data=noise()), budget=10_000)
    chosen = calibration.chosen.points[0].llc
    assert chosen.health is Health.OK
    assert abs(chosen.value - D / 2) < 0.08 * D / 2
    assert chosen.error < 0.04 * chosen.value
    assert calibration.sampler.batch_size == 32
    assert 4 < calibration.sampler.nbeta < 100
    chosen = calibration.sampler
    louder = replace(chosen, nbeta=10 * chosen.nbeta, step_size=chosen.step_size / 10)
    spoilt = make_probe(data=noise()).with_sampler(louder)
    assert spoilt(series(1.0)[0]).llc.health is Health.NOISY


def test_all_of_the_data_is_taken_where_it_is_small():
    calibration = calibrated(series(1.0), make_probe(data=noise()), budget=8_000)
    assert calibration.sampler.batch_size is None
    assert abs(calibration.chosen.points[0].llc.value - D / 2) < 0.05 * D / 2
    drawn = calibrated(series(1.0), make_probe(data=lambda generator, size: NO_NOISE[:size]), budget=QUICK)
    assert drawn.sampler.batch_size == 8 * 32


def test_sgld_gets_steps_so_short_that_its_own_error_is_small():
    found = {}
    for sampler in (SGLD, Langevin):
        calibration = calibrated(series(1.0), make_probe(sampler=sampler), budget=10_000)
        found[sampler] = calibration
        assert type(calibration.sampler) is sampler
        assert abs(calibration.chosen.points[0].llc.value - D / 2) < 0.1 * D / 2
    assert found[SGLD].trials[0].points[0].llc.value > 1.2 * D / 2
    assert found[SGLD].sampler.step_size < found[Langevin].sampler.step_size


def test_single_precision_and_a_loss_far_from_zero():
    def far(model, batch):
        return loss(model, batch) + 1000

    model = Bowl().float()
    probe = Probe(model, far, NO_NOISE.float(), sampler=Langevin(batch_size=32), threads=1)
    calibration = calibrated([Snapshot.of(model, 1)], probe)
    estimate = calibration.chosen.points[0].llc
    assert estimate.health is Health.OK
    assert abs(estimate.value - D / 2) < 0.08 * D / 2
    assert "narrower" not in {trial.name for trial in calibration.trials}


def test_single_precision_is_left_room_for_its_rounding():
    """A linear regression, whose λ is half of its weights at any nβ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 10, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(400, 1, generator=generator) / 2
    model = nn.Linear(10, 1)
    with torch.no_grad():
        found = torch.linalg.lstsq(torch.cat([x, torch.ones(400, 1)], 1).double(), y.double()).solution.float()
        model.weight.copy_(found[:10].T)
        model.bias.copy_(found[10])
    probe = Probe(model, lambda model, batch: (model(batch[0]) - batch[1]).square().mean() / 2, (x, y), threads=1)
    calibration = calibrated([Snapshot.of(model, 1)], probe)
    estimate = calibration.chosen.points[0].llc
    (narrower,) = (trial for trial in calibration.trials if trial.name == "narrower")
    assert narrower.points[0].llc.value == pytest.approx(5.5, rel=0.1)
    assert estimate.value == pytest.approx(5.5, rel=0.1)


def test_chains_that_go_where_the_loss_is_flatter_are_kept_near():
    """At nβ = 1e4, λ̂ of this network is 18 % too small: its zero directions lead to where others are flatter."""
    generator = Generator().manual_seed(3)
    truth = deep_linear.low_rank_matrix(20, 4, 2, generator)
    torch.manual_seed(4)
    model = deep_linear.DeepLinear((4, 12, 20), dtype=torch.float64)
    data = deep_linear.regression_data(truth, 500, generator)
    deep_linear.train(model, data)
    calibration = calibrated([Snapshot.of(model, 1)], Probe(model, deep_linear.loss, data, threads=1))
    estimate = calibration.chosen.points[0].llc
    assert calibration.sampler.nbeta > 1e5
    assert estimate.value == pytest.approx(deep_linear.local_llc(model), rel=0.06)
    first = calibration.trials[0].points[0].llc.value
    assert first < 0.9 * deep_linear.local_llc(model)


def test_curvature_that_only_the_chains_meet():
    """Of w⁴ λ is ¼ a weight, and less by the localization, which a flat minimum never outgrows."""
    calibration = calibrated(series(1.0), make_probe(quartic), budget=10_000)
    sampler, estimate = calibration.sampler, calibration.chosen.points[0].llc
    w = np.linspace(-6, 6, 20_001)
    weight = np.exp(-sampler.nbeta * w**4 - sampler.localization / 2 * w**2)
    exact = D * (sampler.nbeta * w**4 * weight).sum() / weight.sum()
    assert estimate.health is Health.OK
    assert abs(estimate.value - exact) < 4 * estimate.error
    assert estimate.error < 0.07 * exact
    assert 0.6 * D / 4 < exact < D / 4
    assert estimate.checks.kappa < 3


def test_an_early_snapshot_at_no_minimum_stands_in_nobodys_way():
    early = Snapshot.of(Bowl(1.0, centre=3.0), 0)
    calibration = calibrated([early, *series(1.0, 1.0)], make_probe())
    healths = [point.llc.health for point in calibration.chosen.points]
    assert healths == [Health.NEGATIVE, Health.OK, Health.OK]
    assert any(reason.startswith("What remains is NEGATIVE at step 0.") for reason in calibration.reasons)


# Where nothing works


def test_a_last_snapshot_at_no_minimum_is_refused_and_the_trials_are_shown():
    found = []
    with pytest.raises(
        PhasewatchError, match=r"no setting whose estimate at step 7 .* NEGATIVE.*What may help: .*minimum"
    ):
        calibrate([*series(1.0), Snapshot.of(Bowl(1.0, centre=300.0), 7)], make_probe(), show=found.append)
    (calibration,) = found
    assert calibration.sampler is None
    assert calibration.chosen is None
    assert calibration.trials
    assert "negative" in str(calibration)
    assert "Langevin(" not in str(calibration)


def test_a_loss_that_is_nowhere_finite_but_at_the_snapshot():
    with pytest.raises(PhasewatchError, match=r"not finite around the snapshot of step 1\. Give snapshots from before"):
        calibrate(series(1.0), make_probe(brittle), show=None)


def test_a_loss_without_curvature():
    with pytest.raises(PhasewatchError, match="flat around all of the snapshots"):
        calibrate(series(1.0), make_probe(unwilling), show=None)


# What it costs


@pytest.mark.usefixtures("minibatches")
@pytest.mark.parametrize("budget", [QUICK, 8_000])
@pytest.mark.parametrize(
    ("data", "vectorised"),
    [(NO_NOISE, True), (noise(), True), (noise(), False)],
    ids=["no noise", "noise", "in place"],
)
def test_the_budget_is_kept_and_the_count_is_honest(monkeypatch, budget, data, vectorised):
    probe, snapshots = make_probe(data=data), series(1.0, 2.0, 3.0)
    probe.subject.loss.vectorised = vectorised
    rows = counted(monkeypatch, VectorisedLoss, "rows")
    values, backward = counted(monkeypatch, ModelLoss, "value"), counted(monkeypatch, ModelLoss, "add_gradient")
    at_rows = counted(monkeypatch, VectorisedLoss, "rows_and_gradients")
    calibration = calibrated(snapshots, probe, budget=budget)
    points = sum(len(trial.points) for trial in calibration.trials) + len(snapshots)
    gradients = sum(backward) + sum(at_rows)
    losses = sum(rows) + sum(values) - sum(backward) - points  # a point's own loss isn't one of the sampler's
    evaluations = losses / 3 + gradients
    assert evaluations - 1e-6 <= calibration.spent < evaluations + points  # each rounds its losses up
    assert calibration.spent <= budget
    assert sum(trial.cost for trial in calibration.trials) < calibration.spent


def counted(monkeypatch, owner, name) -> list[int]:
    """Each call of a method, by the rows that it takes, 1 where it takes one minibatch."""
    calls, method = [], getattr(owner, name)

    def wrapped(self, *arguments, **more):
        calls.append(len(arguments[1]) if owner is VectorisedLoss else 1)
        return method(self, *arguments, **more)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def test_a_larger_budget_sees_softer_directions():
    small, large = calibrated(series(1.0), make_probe(), budget=2_000).sampler, of_one_bowl().sampler
    assert large.localization < small.localization / 4
    assert large.draws > 4 * small.draws


def test_a_point_costs_no_more_than_its_error_asks_for():
    few, some, many = (calibrated(series(1.0), make_probe(), error=e, budget=10_000) for e in (0.2, 0.05, 0.02))
    steps = [c.sampler.chains * (c.sampler.burn_in + c.sampler.draws) for c in (few, some, many)]
    assert steps == sorted(set(steps))
    assert steps[0] < 500
    for calibration, error in ((few, 0.2), (some, 0.05), (many, 0.02)):
        estimate = calibration.chosen.points[0].llc
        assert estimate.error < 2 * error * estimate.value
        assert abs(estimate.value - D / 2) < 4 * estimate.error


def test_a_level_is_measured_as_well_as_the_budget_allows_where_no_error_is_asked_for():
    whole, asked = of_one_bowl().sampler, calibrated(series(1.0), make_probe(), error=0.06).sampler
    assert whole.burn_in == asked.burn_in
    assert whole.draws == 2 * whole.burn_in > 2 * asked.draws


def test_a_point_of_a_curve_is_cheap_and_still_right():
    spread = torch.logspace(-1, 0, D, dtype=torch.float64)
    curve = calibrated(series(spread, spread, spread), make_probe())
    sampler, estimate = curve.sampler, curve.chosen.points[-1].llc
    stiffness = sampler.nbeta * spread
    exact = (stiffness / (stiffness + sampler.localization)).sum().item() / 2
    assert sampler.chains * (sampler.burn_in + sampler.draws) < 2000
    assert abs(estimate.value - exact) < 4 * estimate.error
    assert estimate.error < 0.03 * exact
    assert exact > 0.97 * D / 2


@pytest.mark.usefixtures("minibatches")
def test_minibatches_keep_as_much_momentum_as_their_noise_allows():
    spread = torch.logspace(-2, 0, D, dtype=torch.float64)
    found = {}
    for name, data, momentum in (("quiet", NO_NOISE, None), ("noisy", noise(), None), ("none", NO_NOISE, 0.0)):
        calibration = calibrated(series(spread, spread), make_probe(data=data, momentum=momentum), budget=8_000)
        sampler, estimate = calibration.sampler, calibration.chosen.points[0].llc
        stiffness = sampler.nbeta * spread
        exact = (stiffness / (stiffness + sampler.localization)).sum().item() / 2
        assert estimate.checks.noise < 0.06 * estimate.value
        assert abs(estimate.value - exact) < 4 * estimate.error + 0.06 * exact
        found[name] = sampler.velocity_kept, exact
    assert found["quiet"][0] == 0.9
    assert found["noisy"][0] < 0.9
    assert found["none"][0] == 0.0
    assert found["quiet"][1] > found["none"][1]


# What it leaves alone


def test_it_is_repeatable_and_touches_no_random_stream():
    before = torch.get_rng_state()
    found = {calibrate(series(1.0, 2.0), make_probe(data=noise()), budget=QUICK, show=None) for _ in range(2)}
    assert len(found) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_the_probes_sampler_matters_by_class_and_batch_size_and_momentum_alone():
    options = {"budget": QUICK, "show": None}
    probe = make_probe(step_size=1.0, localization=3.0, nbeta=7.0, chains=2, draws=5, burn_in=0)
    assert calibrate(series(1.0), probe, **options) == calibrate(series(1.0), make_probe(), **options)
    assert calibrate(series(1.0), make_probe(batch_size=None), **options).batch_size is None
    assert type(calibrate(series(1.0), make_probe(sampler=SGLD), **options)) is SGLD
    assert calibrate(series(1.0), make_probe(batch_size=None, momentum=0.3), **options).momentum == 0.3
    assert calibrate(series(1.0), make_probe(kappa=0.5), **options).kappa is None


def test_metrics_and_estimates_of_parts_are_not_taken_in_trials():
    def never(model, batch):
        raise AssertionError

    probe = Probe(Bowl(), loss, NO_NOISE, metrics={"never": never}, parts={"some": "w"}, threads=1)
    calibration = calibrated(series(1.0), probe, budget=QUICK)
    assert all(not point.metrics and not point.parts for trial in calibration.trials for point in trial.points)


# What it says


def test_it_prints_a_table_and_reasons(capsys):
    sampler = calibrate(series(1.0, 2.0, 5.0), make_probe())
    printed = capsys.readouterr().out
    header, *rows = printed.split("\n\n")[0].splitlines()
    assert header.split()[:4] == ["trial", "ε", "γ", "nβ"]
    assert all(f"step {step}" in header for step in (1, 2, 3))
    assert [row[0] for row in rows].count("*") == 1
    assert "The sharpest snapshot is that of step 3, with curvature 5.000." in printed
    assert "with twice the step size, λ̂ changes by" in printed
    assert "With nβ and γ 10 times smaller, λ̂ at step 3 changes by" in printed
    assert eval(printed.splitlines()[-1], {"Langevin": Langevin}) == sampler
    assert all(line == line.rstrip() for line in printed.splitlines())


def test_it_is_silent_if_asked_to_be(capsys):
    calibrate(series(1.0), make_probe(), budget=QUICK, show=None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([], make_probe()), {}, r"calibrate\(snapshots=\[\], \.\.\.\) needs snapshots"),
        ((["a.pt"], make_probe()), {}, r"takes a list of Snapshots; a str came\. `open_series"),
        ((series(1.0) * 2, make_probe()), {}, r"two of one step: \[1, 1\]"),
        ((series(1.0), Langevin()), {}, r"takes a Probe; a Langevin came"),
        ((series(1.0), make_probe()), {"budget": 100}, r"calibrate\(budget=100\) is too small: .* take \d+ gradient"),
        ((series(1.0), make_probe()), {"budget": 1e4}, r"calibrate\(budget=10000\.0\) must be a whole number"),
        (
            (series(1.0), make_probe()),
            {"error": 3},
            r"calibrate\(error=3\) must be a finite number above 0 and below 1, a share of λ̂",
        ),
        (([Snapshot.of(nn.Linear(2, 2), 5)], make_probe()), {}, r"The snapshot of step 5 lacks"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_sentence(arguments, options, words):
    with pytest.raises(PhasewatchError, match=words):
        calibrate(*arguments, show=None, **options)


def test_the_least_budget_it_names_is_enough():
    with pytest.raises(PhasewatchError) as told:
        calibrate(series(1.0, 2.0), make_probe(), budget=1, show=None)
    least = int(str(told.value).split("take ")[1].removesuffix(" gradient evaluations.").replace(" ", ""))
    with pytest.raises(PhasewatchError, match="too small"):
        calibrate(series(1.0, 2.0), make_probe(), budget=least - 1, show=None)
    assert calibrated(series(1.0, 2.0), make_probe(), budget=least).spent <= least


def test_a_curve_that_comes_down_to_its_minimum_is_measured_at_a_lower_nbeta():
    """Of a middle snapshot that still descends, a larger nβ would show nothing else."""
    end = series(1.0)[0]
    curve = [Snapshot.of(Bowl(1.0, centre=centre), step) for step, centre in ((-2, 3.0), (-1, 0.1))]
    assert of_one_bowl().sampler.nbeta == 1e4
    assert calibrate([*curve, end], make_probe(), show=None).nbeta == 100


def test_short_chains_that_find_lower_losses_have_no_noise_to_divide_by(monkeypatch):
    measured = attempts.measure_whole

    def lower(probe, snapshot, sampler):
        point = measured(probe, snapshot, sampler)
        return replace(point, llc=replace(point.llc, value=-3.0)) if sampler.localization == 0 else point

    monkeypatch.setattr(attempts, "measure_whole", lower)
    assert calibrate(series(1.0), make_probe(), budget=QUICK, show=None).nbeta == 1e4


@cache
def first_of_two_bowls() -> Trial:
    return calibrated(series(1.0, 2.0), make_probe(), error=0.5).trials[0]


@pytest.mark.parametrize("halfway_is_enough", [True, False])
def test_chains_that_are_too_short_for_a_sound_verdict_are_tried_halfway(monkeypatch, halfway_is_enough):
    """And are as long as the trial's where that isn't enough either."""
    measured, first = attempts.measure_whole, first_of_two_bowls().sampler
    halfway = (FEWEST_DRAWS + first.draws) // 2
    enough = halfway if halfway_is_enough else first.draws

    def drifting(probe, snapshot, sampler):
        point = measured(probe, snapshot, sampler)
        if sampler.localization == 0 or sampler.draws >= enough:  # before the first trial there is none
            return point
        return replace(point, llc=replace(point.llc, health=Health.DRIFTING))

    monkeypatch.setattr(attempts, "measure_whole", drifting)
    calibration = calibrated(series(1.0, 2.0), make_probe(), error=0.5)
    assert [trial.sampler.draws for trial in calibration.trials[-2:]] == [FEWEST_DRAWS, halfway]
    assert calibration.sampler == replace(first, draws=enough)
