"""An estimate's way to JSON and back, and what its verdicts say."""

import json
import math
import re
import struct
from dataclasses import fields, replace

import numpy as np
import pytest

from phasewatch.monitor.estimates.checks import Checks
from phasewatch.monitor.estimates.estimate import Estimate, Health, json_number
from phasewatch.monitor.sampling.settings import SGLD, Langevin

HARD = [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, -2.2250738585072014e-308, 1e22, math.nan, math.inf, -math.inf]


def bits(value: float) -> bytes:
    return b"nan" if math.isnan(value) else struct.pack("<d", value)


def estimate(number: float = 2.5, health: Health = Health.OK, trace=()) -> Estimate:
    """An estimate whose every field carries `number`."""
    return Estimate(number, number, (number, 1.25, number), number, number, number, health, trace, Checks(number, 2.5))


def through_json(found: Estimate) -> Estimate:
    text = json.dumps(found.as_json(), allow_nan=False)
    return Estimate.from_json(json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")))


@pytest.mark.parametrize("number", HARD)
@pytest.mark.parametrize("health", Health)
def test_round_trip_to_the_last_bit(number, health):
    found = estimate(number, health, trace=((number, 0.5), (1.5, number)))
    back = through_json(found)
    for field in fields(Estimate):
        before, after = getattr(found, field.name), getattr(back, field.name)
        if field.name == "health":
            assert after is before
        elif field.name == "checks":
            assert list(map(bits, after)) == list(map(bits, before))
        else:
            assert [bits(v) for v in np.ravel(after)] == [bits(v) for v in np.ravel(before)]
            assert np.shape(after) == np.shape(before)
    assert back.as_json() == found.as_json()


def test_round_trip_of_random_bits():
    numbers = np.random.default_rng(0).integers(0, 2**63, 2000, dtype=np.uint64).view(np.float64).tolist()
    back = through_json(replace(estimate(), per_chain=tuple(numbers)))
    assert [bits(v) for v in back.per_chain] == [bits(v) for v in numbers]


def test_finite_estimates_come_back_equal():
    found = estimate(0.1, trace=((1.0, 2.0), (3.0, 4.0)))
    assert through_json(found) == found
    assert isinstance(through_json(found).per_chain, tuple)
    assert isinstance(through_json(found).trace[0], tuple)


def test_the_record_is_plain_json():
    assert estimate(math.nan).as_json() == {
        "value": "nan",
        "error": "nan",
        "per_chain": ["nan", 1.25, "nan"],
        "nbeta": "nan",
        "rhat": "nan",
        "ess": "nan",
        "health": "OK",
        "checks": {
            "step_size": "nan", "kappa": 2.5, "unsettled": "nan", "descent": "nan", "descent_error": "nan",
            "drop": "nan", "drop_error": "nan", "overshoot": "nan", "overshoot_error": "nan",
            "noise": "nan", "noise_error": "nan", "held": "nan", "held_error": "nan", "memory": "nan", "short": "nan",
            "short_error": "nan", "below": "nan", "curvature": "nan",
        },
    }  # fmt: skip


def test_numpy_numbers_are_written_as_numbers():
    found = estimate(np.float64(0.1))
    assert through_json(found) == estimate(0.1)


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (0.5, 0.5)])
def test_json_number(value, word):
    assert json_number(value) == word


@pytest.mark.parametrize("missing", ["value", "per_chain", "health", "ess"])
def test_a_record_that_lacks_something_is_no_estimate(missing):
    record = estimate().as_json()
    del record[missing]
    with pytest.raises(KeyError, match=missing):
        Estimate.from_json(record)


@pytest.mark.parametrize("wrong", [{"per_chain": "123"}, {"trace": "12"}, {"trace": ["12"]}])
def test_the_digits_of_a_word_are_no_chains(wrong):
    with pytest.raises(TypeError, match="is not a list of numbers"):
        Estimate.from_json(estimate().as_json() | wrong)


def test_checks_that_an_older_version_did_not_know_are_nan_and_cost_nothing():
    record = replace(estimate(), checks=Checks()).as_json()
    whole, older = Estimate.from_json(record), Estimate.from_json(record | {"checks": {"kappa": "nan"}})
    assert whole.checks is older.checks  # of 200,000 points from a table
    known = Estimate.from_json(record | {"checks": {"kappa": 2.5}}).checks
    assert known.kappa == 2.5
    assert math.isnan(known.curvature)


def test_a_verdict_of_another_version_is_no_estimate():
    with pytest.raises(KeyError, match="SPLENDID"):
        Estimate.from_json(estimate().as_json() | {"health": "SPLENDID"})


def test_only_a_divergence_leaves_no_value():
    assert [health for health in Health if health.failed] == [Health.DIVERGED]


@pytest.mark.parametrize("health", [health for health in Health if health is not Health.OK])
def test_each_doubt_names_the_setting_to_change(health):
    settings = ("step_size", "localization", "draws", "batch_size", "burn_in")
    assert any(f"the sampler's {setting}" in health.value or f"more {setting}" in health.value for setting in settings)
    assert health.value.endswith(".")
    for typed in re.findall(r"(?:SGLD|Langevin)\(.*?\)", health.value):
        eval(typed, {"SGLD": SGLD, "Langevin": Langevin})  # what it tells to type can be typed
