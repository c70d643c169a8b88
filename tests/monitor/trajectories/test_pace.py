"""How often a growing run is searched."""

import numpy as np

from phasewatch.monitor.trajectories.pace import Pace


def test_each_point_is_due_up_to_200_and_a_hundredth_more_from_then_on():
    pace = Pace()
    due = np.array([points for points in range(1, 100_001) if pace.is_due(points)])
    assert due[:200].tolist() == list(range(1, 201))
    assert (np.diff(due[200:]) <= 0.01 * due[200:-1]).all()
    assert len(due) < 200 + 1.2 * 100 * np.log(500)
