"""The samplers' settings: what they refuse and in which words, what they take where one is left out, what they show."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.sampling.settings import SGLD, Langevin, Sampler
from phasewatch.monitor.sampling.steps import baoab_start, baoab_step, sgld_step

samplers = pytest.mark.parametrize("sampler", [SGLD, Langevin])


# What makes no sense


@samplers
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step_size", v) for v in (0, 0.0, -1e-4, math.nan, math.inf, -math.inf, "3", True, [1e-4], 1j)),
        *(("nbeta", v) for v in (0, -3.0, math.nan, math.inf, "66.7", False)),
        *(("localization", v) for v in (-0.1, math.nan, math.inf, "1", True, None)),
        *(("chains", v) for v in (1, 0, -4, 4.0, 2.5, "4", True, math.nan, None)),
        *(("draws", v) for v in (0, 3, -1, 100.0, "100", True)),
        *(("burn_in", v) for v in (-1, 50.0, "50", False, None)),
        *(("batch_size", v) for v in (0, -64, 64.0, "64", True)),
    ],
)
def test_settings_that_make_no_sense(sampler, field, value):
    with pytest.raises(PhasewatchError, match="must be a") as caught:
        sampler(**{field: value})
    assert str(caught.value).startswith(f"{sampler.__name__}({field}={value!r}) must be a")


@samplers
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"step_size": math.nan}, r"\(step_size=nan\) must be a finite number above 0\.$"),
        ({"localization": -1}, r"\(localization=-1\) must be a finite number at least 0\.$"),
        ({"nbeta": 0}, r"\(nbeta=0\) must be a finite number above 0\.$"),
        ({"draws": 0}, r"\(draws=0\) must be a whole number of at least 4\.$"),
        ({"burn_in": -1}, r"\(burn_in=-1\) must be a whole number of at least 0\.$"),
        ({"batch_size": 0}, r"\(batch_size=0\) must be a whole number of at least 1\.$"),
        ({"chains": 1}, r"\(chains=1\) must be a whole number of at least 2\. One chain has no spread"),
        ({"chains": "3"}, r"\(chains='3'\) must be a whole number"),
    ],
)
def test_the_sentence_says_what_to_do(sampler, settings, sentence):
    with pytest.raises(PhasewatchError, match=f"^{sampler.__name__}{sentence}"):
        sampler(**settings)


def test_sgld_takes_a_step_size():
    with pytest.raises(PhasewatchError, match=r"^SGLD\(step_size=None\) must be a finite number above 0\.$"):
        SGLD(step_size=None)


@pytest.mark.parametrize("option", ["method", "backend", "kappa", "momentum"])
def test_sgld_has_the_published_step_and_nothing_else(option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        SGLD(**{option: 0.5})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": 1.0}, r"Langevin\(momentum=1\.0\) must be a finite number at least 0 and below 1\.$"),
        ({"momentum": -0.1}, r"Langevin\(momentum=-0\.1\) must be a finite number at least 0 and below 1\.$"),
        ({"momentum": math.nan}, r"Langevin\(momentum=nan\) must be a finite number"),
        ({"momentum": "0.9"}, r"Langevin\(momentum='0\.9'\) must be a finite number"),
        ({"kappa": 4}, r"Langevin\(kappa=4\) must be a finite number above 0 and below 4.*0\.25 to 1 is usual"),
        ({"kappa": 0}, r"Langevin\(kappa=0\) must be a finite number above 0"),
        ({"kappa": math.inf}, r"Langevin\(kappa=inf\) must be a finite number above 0"),
        ({"kappa": True}, r"Langevin\(kappa=True\) must be a finite number above 0"),
        ({"step_size": 1e-3, "kappa": 0.5}, r"Langevin\(step_size=0\.001, kappa=0\.5\) says twice how large the steps"),
    ],
)
def test_what_langevin_refuses_beside_that(settings, words):
    with pytest.raises(PhasewatchError, match=words):
        Langevin(**settings)


@samplers
def test_a_pull_that_overshoots_is_refused(sampler):
    sentence = rf"^{sampler.__name__}\(step_size=0.05, localization=100\): their product must be below 4"
    with pytest.raises(PhasewatchError, match=sentence):
        sampler(step_size=0.05, localization=100)
    assert sampler(step_size=0.0399, localization=100).step_size == 0.0399


def test_a_pull_that_overshoots_with_the_default_step_size_is_refused_too():
    sentence = r"^Langevin\(step_size=0.0001, localization=50000\): their product must be below 4"
    with pytest.raises(PhasewatchError, match=sentence):
        Langevin(localization=5e4)
    assert Langevin(localization=5e4, kappa=0.5).localization == 5e4


# What is taken


@samplers
def test_settings_at_their_limits(sampler):
    found = sampler(step_size=1, localization=0, nbeta=1, chains=2, draws=4, burn_in=0, batch_size=1)
    record = {
        "sampler": sampler.__name__, "step_size": 1, "localization": 0, "nbeta": 1, "chains": 2, "draws": 4,
        "burn_in": 0, "batch_size": 1,
    }  # fmt: skip
    assert found.as_json() == record | ({} if sampler is SGLD else {"kappa": None, "momentum": 0.0})


@samplers
def test_numbers_of_other_libraries_are_numbers(sampler):
    found = sampler(step_size=np.float32(0.5), localization=1, chains=np.int64(3))
    assert (found.step_size, found.chains) == (0.5, 3)
    assert type(found.chains) is int
    assert type(found.step_size) is type(found.localization) is float


def test_a_step_is_given_once():
    assert SGLD().resolved() == SGLD(step_size=1e-4)
    assert Langevin().resolved().step_size == 1e-4
    assert Langevin(kappa=0.5).resolved().step_size is None
    assert replace(Langevin(), kappa=0.5) == Langevin(kappa=0.5)


def test_momentum_is_for_all_of_the_data():
    assert Langevin().resolved().momentum == 0
    assert Langevin(batch_size=None).resolved().momentum == 0.95
    assert Langevin(batch_size=None, momentum=0.3).resolved().momentum == 0.3
    assert replace(Langevin(batch_size=None), batch_size=64).resolved().momentum == 0
    assert Langevin().as_json() == Langevin(step_size=1e-4, momentum=0).as_json()
    assert SGLD(batch_size=None).velocity_kept is None


@pytest.mark.parametrize(("sampler", "gain"), [(SGLD(), 1.0), (Langevin(), 1.0), (Langevin(momentum=0.6), 4.0)])
def test_a_velocity_that_is_kept_takes_up_more_noise(sampler, gain):
    assert sampler.noise_gain == pytest.approx(gain, rel=1e-12)


@pytest.mark.parametrize(
    "sampler",
    [
        SGLD(),
        SGLD(step_size=3e-4, localization=6.67, nbeta=66.7, chains=10, draws=5000, burn_in=1000, batch_size=1024),
        SGLD(batch_size=None),
        Langevin(),
        Langevin(step_size=2e-5, nbeta=1 / 3),
        Langevin(kappa=0.5, batch_size=None, momentum=0.9),
        Langevin(momentum=0.0),
        Langevin(batch_size=None),
        Langevin(kappa=0.25, batch_size=None).resolved(),
    ],
)
def test_a_sampler_is_shown_as_it_is_typed(sampler):
    assert eval(str(sampler), {"SGLD": SGLD, "Langevin": Langevin}) == sampler


# Each class takes its own step


def test_each_sampler_takes_its_own_step():
    w, p, anchor, grad, noise = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = {"nbeta": 30.0, "gamma": 7.0, "eps": 0.02}
    settings = {"step_size": 0.5, "localization": 7.0, "nbeta": 30.0}  # the step size that is used is the argument
    plain, heavy = SGLD(**settings), Langevin(**settings, momentum=0.6)
    assert torch.equal(plain.start(anchor, noise, 0.02), anchor)
    assert torch.equal(heavy.start(anchor, noise, 0.02), baoab_start(anchor, noise, eps=0.02))
    after, velocity = plain.step(w, None, anchor, grad, noise, 0.02)
    assert torch.equal(after, sgld_step(w, anchor, grad, noise, **scale))
    assert velocity is None
    expected = baoab_step(w, p, anchor, grad, noise, **scale, momentum=0.6)
    assert all(map(torch.equal, heavy.step(w, p, anchor, grad, noise, 0.02), expected))
    assert plain.has_step_bias
    assert not heavy.has_step_bias


def test_both_samplers_have_the_same_settings_in_one_order():
    """So that both can be given by place."""
    shared = [field.name for field in fields(Sampler)]
    assert [field.name for field in fields(SGLD)] == shared
    assert [field.name for field in fields(Langevin)] == [*shared, "kappa", "momentum"]
