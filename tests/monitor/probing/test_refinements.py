"""Which localization is kept, by what a weaker one shows."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from phasewatch.monitor.estimates.checks import Checks
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.probing.calibration import Trial
from phasewatch.monitor.probing.refinements import weaken
from phasewatch.monitor.sampling.settings import Langevin
from phasewatch.monitor.trajectories.points import Point

GIVEN = Langevin(step_size=1e-5, localization=100.0, nbeta=10_000.0, burn_in=200, draws=400)
PROPOSALS = SimpleNamespace(longest=200, gain=2.0)


class Scripted:
    """Trials whose λ̂ and curvature are functions of the localization."""

    def __init__(self, level, kappa):
        self.level, self.kappa = level, kappa
        self.snapshots, self.reasons, self.tried = [None], [], []

    def attempt(self, name, sampler, snapshots=None):
        gamma = sampler.localization
        self.tried.append(gamma)
        own = self.level(gamma) + np.array([-1.0, 0.0, 0.5, 0.5])
        checks = Checks(kappa=self.kappa(gamma), held=0.03, held_error=0.01)
        llc = Estimate(float(own.mean()), 0.5, tuple(own.tolist()), sampler.nbeta, 1.0, 400.0, Health.OK, checks=checks)
        return Trial(name, sampler, (Point(0, 1.0, llc),), 2000)


@pytest.mark.parametrize(
    ("rises", "tried", "kept"),
    [
        (0.08, [100.0, 10.0, 32.0], 32.0),  # what it held back is seen by the one between, and near the snapshot
        (0.02, [100.0, 10.0], 100.0),  # little was held back
    ],
)
def test_where_a_tenth_wanders_the_localization_between_is_tried_if_much_was_held_back(rises, tried, kept):
    script = Scripted(
        level=lambda gamma: 100 * (1 + rises * min(1.0, 2 * np.log10(100 / gamma))),
        kappa=lambda gamma: 0.5 if gamma > 20 else 1.0,
    )
    found = weaken(script, PROPOSALS, script.attempt("first", GIVEN))
    assert found.sampler.localization == kept
    assert script.tried[: len(tried)] == tried
    assert "much larger" in script.reasons[0]


def test_one_that_wanders_too_stays_out():
    script = Scripted(level=lambda gamma: 100 + 4 * np.log(100 / gamma), kappa=lambda gamma: 0.5 * (100 / gamma) ** 0.5)
    found = weaken(script, PROPOSALS, script.attempt("first", GIVEN))
    assert found.sampler == replace(GIVEN, localization=100.0)
    assert script.tried == [100.0, 10.0, 32.0]
    assert script.reasons[-1].endswith("so γ stays.")
