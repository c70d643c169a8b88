"""The report's section on a run's scores of questions and on its watched behaviours."""

from collections.abc import Sequence
from dataclasses import dataclass

from phasewatch.callbacks.figures.emergence import draw_emergence
from phasewatch.callbacks.figures.svg import svg_address
from phasewatch.monitor.emergence.overview import chain_overview
from phasewatch.monitor.emergence.watching import RedFlag, chains, red_flags, watched
from phasewatch.monitor.trajectories.trajectory import Trajectory

MOST_CHAINS = 8
"""The chains of at most this many sets of questions are drawn, to keep the page small."""


@dataclass(frozen=True)
class ChainPicture:
    """The scores of one set of questions.

    Attributes:
        name: of the questions.
        address: of the picture.
        remarks: sentences below it.
    """

    name: str
    address: str
    remarks: Sequence[str]


@dataclass(frozen=True)
class EmergenceSection:
    """What the section shows.

    Attributes:
        watched: the metrics that are log-likelihoods to watch.
        flags: those of them that have turned.
        pictures: one for each chain of scores.
    """

    watched: Sequence[str]
    flags: Sequence[RedFlag]
    pictures: Sequence[ChainPicture]


def emergence_section(trajectory: Trajectory) -> EmergenceSection | None:
    """The section of a run.

    Args:
        trajectory: the run's points.

    Returns:
        What to show, or None if the run has no such scores.
    """
    names = watched(trajectory)
    if not names:
        return None
    pictures = []
    for name in list(chains(trajectory))[:MOST_CHAINS]:
        overview = chain_overview(trajectory, name)
        if len(overview.steps) > 1:
            pictures.append(ChainPicture(name, svg_address(draw_emergence(overview)), overview.remarks))
    return EmergenceSection(names, red_flags(trajectory), pictures)
