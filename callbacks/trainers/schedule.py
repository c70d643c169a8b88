"""Which steps of a training run are measured, and how much of its time that may take."""

from collections.abc import Callable
from dataclasses import dataclass

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError, real_number, whole_number

MOST_STEPS = 10**7
"""No schedule names more steps one by one: as many take a gigabyte."""

Schedule = Callable[[int], bool]
"""Whether a snapshot is due at a training step."""


@dataclass(frozen=True)
class Every:
    """Due at every n-th step; made by `every`."""

    n: int

    def __call__(self, step: int) -> bool:
        """Whether the step is a multiple of n."""
        return step % self.n == 0


@dataclass(frozen=True)
class Steps:
    """Due at the steps named; made by `log_spaced`."""

    steps: frozenset[int]

    def __call__(self, step: int) -> bool:
        """Whether the step is among them."""
        return step in self.steps


def every(n: int) -> Every:
    """A snapshot every n steps.

    Args:
        n: at least 1.

    Returns:
        The schedule.

    Raises:
        PhasewatchError: if n is not a whole number of at least 1.

    Example:
        >>> at = every(100)
        >>> [step for step in range(1, 301) if at(step)]
        [100, 200, 300]
    """
    return Every(whole_number("every(n=...)", n, least=1, most=LARGEST_STEP))


def log_spaced(first: int, last: int, num: int, *, linear: int = 0) -> Steps:
    """Steps that crowd early, as changes do, with a linear grid beside them for the transitions that come late.

    Args:
        first: the first step, at least 1.
        last: the last step, at least `first`.
        num: how many steps evenly spaced in log step; those that round to one step are one.
        linear: how many evenly spaced steps to add.

    Returns:
        The schedule; its `steps` are the union of both grids.

    Raises:
        PhasewatchError: if the numbers make no schedule.

    Example:
        >>> sorted(log_spaced(1, 1000, num=4, linear=2).steps)
        [1, 10, 100, 500, 1000]
    """
    first, last, num = (
        whole_number(f"log_spaced({name}=...)", n, least=1, most=MOST_STEPS if name == "num" else LARGEST_STEP)
        for name, n in (("first", first), ("last", last), ("num", num))
    )
    linear = whole_number("log_spaced(linear=...)", linear, least=0, most=MOST_STEPS)
    if last < first:
        raise PhasewatchError(f"log_spaced(first={first}, last={last}): the last step must not come before the first.")
    ratio = last / first
    log_grid = {min(round(first * ratio ** (i / max(num - 1, 1))), last) for i in range(num)}
    linear_grid = {min(round(first + (last - first) * (i + 1) / linear), last) for i in range(linear)}
    return Steps(frozenset(log_grid | linear_grid))


@dataclass(frozen=True)
class Budget:
    """Holds measuring to a share of the run's own wall time, by leaving out the least useful of the scheduled steps.

    A snapshot is saved at each scheduled step, which is cheap. As time is earned, the one is measured that tells most
    about where transitions lie: the middle of the widest gap, where those that touch the interval of a boundary count
    most, as in a replay with a budget. What is never measured is named at the end, and a replay of the run can measure
    it. The first measurement is made at once, to learn what one costs, and paid back before the second.

    Attributes:
        fraction: seconds of measuring for each second of training, above 0.
        at: the steps to choose from.

    Raises:
        PhasewatchError: if the fraction is not above 0.

    Example:
        >>> at = Budget(0.1, at=log_spaced(1, 50_000, num=80))
        >>> at(1), at(7)
        (True, True)
    """

    fraction: float
    at: Schedule

    def __post_init__(self) -> None:
        real_number(
            "Budget(fraction=...)", self.fraction, above=0, hint="such as 0.1 for a tenth of the training's time"
        )
        if not callable(self.at):
            raise PhasewatchError(f"Budget(at={self.at!r}) must be a schedule such as log_spaced(1, 50_000, num=80).")

    def __call__(self, step: int) -> bool:
        """Whether the step is among those to choose from."""
        return self.at(step)
