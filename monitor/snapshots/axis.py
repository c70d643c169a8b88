"""Whether the steps of a series belong on one axis: no epochs, one unit, and no second beginning."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.steps import Step, run_in_name, stage_in_name

SETTLE = "give step=lambda path: ... in Python, which returns the step of each path, or None to leave it out"


class Shown(Protocol):
    """A step under the name that is shown."""

    @property
    def shown(self) -> str:
        """The name."""
        ...

    @property
    def named(self) -> bool:
        """Whether the name carries a step."""
        ...

    @property
    def step(self) -> Step:
        """The step, and what is known of it."""
        ...


_Shown = TypeVar("_Shown", bound=Shown)


class Named(NamedTuple):
    """A step and the name that it comes from."""

    shown: str
    step: Step
    named: bool = True


def without_epochs(found: list[_Shown]) -> tuple[list[_Shown], list[str]]:
    """Leave out bare numbers that go with the epochs in the files, which are no steps.

    Args:
        found: checkpoints.

    Returns:
        The others, and the names that were left out.
    """
    bare = [f for f in found if not f.step.unit and f.step.epoch is not None]
    ahead = {int(f.step) - (f.step.epoch or 0) for f in bare}
    if len(ahead) != 1 or not ahead <= ({0} if len(bare) == 1 else {-1, 0, 1}):
        return found, []
    numbered = {id(f) for f in bare}
    return [f for f in found if id(f) not in numbered], [f.shown for f in bare]


def without_nameless(found: list[_Shown]) -> tuple[list[_Shown], list[str]]:
    """Leave out what has its step inside alone (`last.ckpt`) where another one carries that step in its name.

    Args:
        found: checkpoints.

    Returns:
        The others, and the names that were left out.
    """
    named = {f.step for f in found if f.named}
    copies = {id(f): f.shown for f in found if not f.named and f.step in named}
    return [f for f in found if id(f) not in copies], list(copies.values())


def check_units(kept: Sequence[Shown], call: str) -> None:
    """Refuse a series whose steps are counted in two units.

    Args:
        kept: its checkpoints.
        call: what the user typed.

    Raises:
        PhasewatchError: if there are two.
    """
    units = {one.step.unit: one for one in reversed(kept) if one.step.unit}
    if len(units) > 1:
        first, second = sorted(units.values(), key=lambda one: one.step)[:2]
        raise PhasewatchError(
            f"{call}: {first.shown} counts {first.step.unit} and {second.shown} counts {second.step.unit}, which don't "
            f"belong on one axis; choose by name with revisions=, or {SETTLE}."
        )


def check_runs(kept: Sequence[Shown], call: str) -> None:
    """Refuse a series whose names carry several seeds, folds, runs or trials.

    Args:
        kept: its checkpoints.
        call: what the user typed.

    Raises:
        PhasewatchError: if they do.
    """
    runs: dict[str, dict[str, str]] = {}
    for one in kept:
        for word, number in run_in_name(one.shown):
            runs.setdefault(word, {}).setdefault(number, one.shown)
    for word, shown in runs.items():
        if len(shown) > 1:
            first, second = [*shown.values()][:2]
            raise PhasewatchError(
                f"{call}: {first} and {second} are of two runs, by their {word}; choose one by name with revisions=, "
                f"or {SETTLE}."
            )


def check_stages(kept: Sequence[Shown], call: str) -> None:
    """Refuse a series that starts again: a later stage or epoch whose steps aren't all after an earlier one's.

    Args:
        kept: its checkpoints.
        call: what the user typed.

    Raises:
        PhasewatchError: if it does.
    """
    stages: dict[tuple[int, ...], list[Shown]] = {}
    for one in kept:
        if stage := stage_in_name(one.shown):
            stages.setdefault(stage, []).append(one)
    ordered = [sorted(stages[stage], key=lambda one: one.step) for stage in sorted(stages)]
    for before, after in pairwise(ordered):
        if after[0].step < before[-1].step:
            raise PhasewatchError(
                f"{call}: {after[0].shown} starts again after {before[-1].shown}, so their steps don't belong on one "
                f"axis; choose by name with revisions= (such as {pattern(before[0].shown)!r}), or {SETTLE}."
            )


def pattern(name: str) -> str:
    """A pattern of the names in the same stage.

    Args:
        name: of a checkpoint.
    """
    cut = name.lower().find("step")
    return f"{name[:cut]}*" if cut > 0 else f"{name.partition('-')[0]}*"
