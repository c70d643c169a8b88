"""How often all points of a growing run are searched, so that a point costs the same in a run of any length."""


class Pace:
    """Says when a search through all points is due: after each point, and from 200 points on after 1 % more.

    Example:
        >>> pace = Pace()
        >>> [points for points in range(1, 1000) if pace.is_due(points)][-3:]
        [978, 987, 996]
    """

    def __init__(self) -> None:
        self._next = 0

    def is_due(self, points: int) -> bool:
        """Whether to search now; if so, it counts as done.

        Args:
            points: how many there are.
        """
        if points < self._next:
            return False
        self._next = points + max(1, points // 100)
        return True
