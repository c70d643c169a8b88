"""A share of the training's time is spent while it trains, not when it is over."""

import time

from made_points import a_point

from phasewatch.callbacks.trainers.measuring import Background


class Waiting:
    """A backlog with something to measure whenever enough time has passed."""

    disk_seconds = 0.0

    def __init__(self):
        self.began = time.monotonic()
        self.measured = []

    @property
    def seconds_to_next(self):
        return max(0.0, 0.2 * len(self.measured) - (time.monotonic() - self.began))

    def take(self, snapshot):
        pass

    def measure_next(self):
        if self.seconds_to_next > 0:
            return False
        self.measured.append(time.monotonic() - self.began)
        return True


def test_time_that_is_earned_between_two_snapshots_is_spent_before_the_second():
    backlog = Waiting()
    background = Background(backlog)
    background.take(a_point(1))
    deadline = time.monotonic() + 30
    while len(backlog.measured) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    background.finish()
    assert len(backlog.measured) >= 4
