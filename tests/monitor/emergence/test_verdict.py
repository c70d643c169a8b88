import numpy as np
import pytest
from scipy.special import expit, ndtr

from phasewatch import PhasewatchError, emergence

STEP = np.geomspace(100, 1e5, 40)
Z = np.linspace(0, 1, 40)


def drawn(p, seed):
    return np.random.default_rng(seed).binomial(800, np.clip(p, 0, 1)) / 800


def smooth(log_p, seed):
    return np.minimum(log_p + 0.02 * np.random.default_rng(seed + 100).normal(size=40), -1e-3)


CASES = {
    "all of twelve tokens": ("metric", -4 + 3.98 * Z, lambda s: np.exp(12 * s), 0.0),
    "a threshold over items": ("metric", -4 + 3.5 * Z, lambda s: ndtr((s + 1.5) / 0.4), 0.25),
    "the smooth score jumps too": ("model", -4 + 0.6 * Z + 3 * expit((Z - 0.55) / 0.01), np.exp, 0.0),
    "a format": ("unseen by the smooth score", -4 + 3 * Z, lambda s: 0.8 * expit((Z - 0.6) / 0.008), 0.25),
    "a gradual rise": ("none", -4 + 3 * Z, lambda s: 0.6 * Z, 0.25),
    "chance": ("none", -4 + 3 * Z, lambda s: 0 * Z, 0.25),
}


@pytest.mark.parametrize("name", CASES)
def test_cases_that_are_certain_are_told_apart(name):
    kind, log_p, link, chance = CASES[name]
    found = [
        emergence.verdict(STEP, drawn(chance + (1 - chance) * link(log_p), seed), smooth(log_p, seed), chance=chance)
        for seed in range(5)
    ]
    assert sum(one.kind == kind for one in found) >= 4
    assert np.mean([one.probabilities[kind] for one in found]) > 0.7


def test_a_step_beside_an_exact_line_is_unseen_by_it():
    for width, centre in ((0.003, 0.3), (0.003, 0.7), (0.01, 0.5)):
        found = emergence.verdict(STEP, expit((Z - centre) / width), -4 * (1 - Z) - 0.01, chance=0.0)
        assert found.kind == "unseen by the smooth score"
        assert found.probability > 0.9


def test_probabilities_add_up_and_the_kind_has_the_largest():
    found = emergence.verdict(STEP, drawn(Z**3, 0), smooth(-4 + 3 * Z, 0), chance=0.0)
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert found.probability == max(found.probabilities.values()) == found.probabilities[found.kind]
    assert f"{found.probability:.2f}" in str(found)


def test_scale_of_the_axis_and_its_direction_change_nothing():
    sharp, guide = drawn(np.exp(12 * (-4 + 3.98 * Z)), 0), smooth(-4 + 3.98 * Z, 0)
    plain = emergence.verdict(STEP, sharp, guide, chance=0.0)
    assert emergence.verdict(STEP * 1e6, sharp, guide, chance=0.0).probability == pytest.approx(plain.probability)
    assert emergence.verdict(5 - np.log10(STEP), sharp, guide, chance=0.0).probability == pytest.approx(
        plain.probability
    )


def test_scores_below_chance_are_told_of():
    log_p = np.linspace(-4, -0.1, 30)
    with pytest.warns(UserWarning, match=r"chance=0\.25.* half of the scores are below"):
        emergence.verdict(np.arange(1, 31), 0.1 * np.exp(5 * log_p), log_p, chance=0.25)


def test_bad_input_is_a_sentence():
    with pytest.raises(PhasewatchError, match="chance isn't given"):
        emergence.verdict(STEP, Z, Z)
    with pytest.raises(PhasewatchError, match="has 3 points, and this takes at least 8"):
        emergence.verdict(STEP[:3], Z[:3], Z[:3], chance=0)
    with pytest.raises(PhasewatchError, match="right from the start"):
        emergence.verdict(STEP, np.ones(40), Z, chance=0)
    with pytest.raises(PhasewatchError, match="An axis may not repeat"):
        emergence.verdict(np.ones(40), Z, Z, chance=0)
