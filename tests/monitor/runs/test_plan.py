from types import SimpleNamespace

import numpy as np
import pytest

from phasewatch.monitor.runs import plan
from phasewatch.monitor.runs.plan import affords, most_useful


@pytest.mark.parametrize(
    ("training", "measuring", "measured", "fits"),
    [
        (0.0, 0.0, 0, True),  # the first is made at once, to learn what one costs
        (79.9, 4.0, 1, False),  # 4 spent and 4 more is a tenth of 80
        (80.0, 4.0, 1, True),
        (119.9, 8.0, 2, False),
        (120.0, 8.0, 2, True),
    ],
)
def test_one_more_measurement_must_fit_into_the_share(training, measuring, measured, fits):
    assert affords(0.1, training=training, measuring=measuring, measured=measured) is fits


def test_the_most_useful_step_has_the_widest_gap_in_log_step():
    assert most_useful([5, 3, 9], []) == 3
    assert most_useful([2, 10, 90], [1, 100]) == 10


@pytest.mark.parametrize("seed", range(5))
def test_most_useful_against_the_obvious_search(seed):
    rng = np.random.default_rng(seed)
    steps = rng.permutation(1000)[:40].tolist()
    candidates, measured = steps[:25], steps[25:]
    gaps = np.abs(np.log1p(candidates)[:, None] - np.log1p(measured)).min(axis=1)
    assert most_useful(candidates, measured) == candidates[int(gaps.argmax())]


def test_most_useful_takes_each_logarithm_once(monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "math", SimpleNamespace(log1p=lambda step: asked.append(step) or np.log1p(step)))
    most_useful(range(1, 2000, 2), range(0, 2000, 2))
    assert len(asked) == 2000
