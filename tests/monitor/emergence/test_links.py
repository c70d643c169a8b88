import numpy as np
import pytest
from scipy.special import expit, softmax

from phasewatch import PhasewatchError, emergence


@pytest.mark.parametrize(
    ("smooth", "perfect"),
    [
        (np.linspace(-4, -0.4, 30), 0.0),  # log p
        (np.linspace(2.5, 0.6, 30), 0.0),  # bits
        (np.linspace(0.24, 0.85, 30), 1.0),  # p
    ],
)
def test_a_link_finds_the_curve_that_made_the_points_and_goes_on_with_it(smooth, perfect):
    curve = lambda s: 0.2 + 0.8 * np.exp(-1.3 * np.abs(s - perfect) ** 1.7)  # noqa: E731
    link = emergence.Link.fit(smooth[:20], curve(smooth[:20]), chance=0.2)
    assert link.perfect == perfect
    np.testing.assert_allclose(link(smooth), curve(smooth), atol=1e-3)
    assert link(np.array([perfect]))[0] == pytest.approx(1, abs=1e-6)


def test_a_score_of_both_signs_gets_a_logistic_curve():
    odds = np.linspace(-2, 3, 20)
    link = emergence.Link.fit(odds, 0.25 + 0.75 * expit(1.4 * odds - 0.6), chance=0.25)
    assert link.perfect is None
    assert (link.scale, link.shape) == pytest.approx((-0.6, 1.4), abs=1e-3)
    assert "logistic" in str(link)


def test_the_mean_over_groups_is_taken_after_the_curve():
    groups = np.linspace(-6, -0.5, 25)[:, None] + np.array([-1.0, 0.0, 0.4])
    sharp = np.exp(-0.5 * (-groups) ** 1.5).mean(axis=1)
    link = emergence.Link.fit(groups, sharp, chance=0.0)
    assert (np.exp(link.scale), np.exp(link.shape)) == pytest.approx((0.5, 1.5), rel=1e-2)


def test_a_noisy_link_says_how_noisy_it_is():
    rng = np.random.default_rng(0)
    smooth = np.linspace(-5, -0.5, 400)
    link = emergence.Link.fit(smooth, np.clip(np.exp(0.5 * smooth) + 0.02 * rng.normal(size=400), 0, 1), chance=0.0)
    assert link.error == pytest.approx(0.02, rel=0.1)


def test_choice_accuracy_counts_the_right_items_and_half_of_the_ties():
    odds = np.random.default_rng(0).normal(0.3, 1, (5, 4000))
    np.testing.assert_array_equal(emergence.choice_accuracy(odds), (odds > 0).mean(axis=1))
    assert emergence.choice_accuracy([0.0, 0.0]) == 0.5


def calibrated(rng, items, sharpness):
    """Tokens of a calibrated model, the right one drawn from its distribution: log p, and whether it is the largest."""
    p = softmax(sharpness * rng.normal(size=(items, 4, 50)), axis=2)
    right = np.array([[rng.choice(50, p=own) for own in item] for item in p])
    return np.log(np.take_along_axis(p, right[:, :, None], axis=2)[:, :, 0]), right == p.argmax(axis=2)


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 3.0, 5.0, 12.0])
def test_exact_match_is_what_greedy_decoding_gives_for_a_calibrated_model(sharpness):
    log_p, greedy = calibrated(np.random.default_rng(0), 600, sharpness)
    assert emergence.exact_match(log_p) == pytest.approx(greedy.all(axis=1).mean(), abs=0.03)


def test_exact_match_takes_answers_of_different_lengths():
    none = np.nan
    log_p = np.log([[0.9, 0.9, 0.8], [0.9, 0.05, none], [0.7, none, none], [0.9, 0.8, 0.9], [0.9, 0.9, none]])
    assert emergence.exact_match(log_p) == pytest.approx(0.8, abs=0.03)


def test_bad_input_is_a_sentence():
    x = np.linspace(-3, -1, 6)
    with pytest.raises(PhasewatchError, match=r"chance isn't given\. Pass the score of a guess"):
        emergence.Link.fit(x, np.exp(x))
    with pytest.raises(PhasewatchError, match="has 3 points, and a link takes 4"):
        emergence.Link.fit(x[:3], np.exp(x[:3]), chance=0.0)
    with pytest.raises(PhasewatchError, match=r"value 48; it must lie between 0 and 1 \(divide percentages"):
        emergence.Link.fit(x, [0.1, 0.2, 48, 0.3, 0.4, 0.5], chance=0.0)
    with pytest.raises(PhasewatchError, match=r"exact_match\(token_log_p=...\) has the value 0.2; a log probability"):
        emergence.exact_match([[-0.1, 0.2]])
    with pytest.raises(PhasewatchError, match=r"shape \(item, token\)"):
        emergence.exact_match([-0.1, -0.2])
    with pytest.raises(PhasewatchError, match="1 values that are NaN"):
        emergence.choice_accuracy([0.1, np.nan])
