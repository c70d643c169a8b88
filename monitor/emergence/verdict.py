"""Whether a jump is the metric's or the model's."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import softmax

from phasewatch.monitor.emergence.checks import (
    Axis,
    check_axis,
    check_chance,
    check_numbers,
    check_share,
    warn_below_chance,
)
from phasewatch.monitor.emergence.forecast import check_moves
from phasewatch.monitor.emergence.shape import features

Kind = Literal["metric", "model", "unseen by the smooth score", "none"]

KINDS: tuple[Kind, ...] = ("metric", "model", "unseen by the smooth score", "none")

FEWEST = 8
"""With fewer points a jump and a gradual rise look alike."""

REACH = 3.0
"""Features farther than this many standard deviations from those of the simulated cases count as this far."""

_MEANING: Mapping[Kind, str] = {
    "metric": (
        "The jump is the metric's: the smooth score moves gradually, and the sharp one is what its form makes of it"
    ),
    "model": "The jump is the model's: the smooth score jumps too",
    "unseen by the smooth score": (
        "The sharp score jumps and the smooth one doesn't show why: the model gained something that the smooth score "
        "doesn't measure, such as a format"
    ),
    "none": "Nothing jumps",
}


@dataclass(frozen=True)
class Verdict:
    """Whose a jump is.

    Attributes:
        kind: "metric", "model", "unseen by the smooth score" or "none".
        probability: that the kind is right. Of 400 simulated cases held back 96 % were right, and 99 % of those with
            a probability of 0.9 or more (experiments/verdict_cases.py); of 300 cases of other forms, with 8 to 300
            points, 94 % and 98 %.
        probabilities: of each kind.
        sharp_jump: the largest share of the sharp score's change within a tenth of the axis.
        smooth_jump: the same of the smooth score.
    """

    kind: Kind
    probability: float
    probabilities: Mapping[Kind, float]
    sharp_jump: float
    smooth_jump: float

    def __str__(self) -> str:
        return (
            f"{_MEANING[self.kind]} (probability {self.probability:.2f}). Within a tenth of the axis, the sharp score "
            f"makes {self.sharp_jump:.0%} of its change and the smooth score {self.smooth_jump:.0%}."
        )


def verdict(x: Any, sharp: Any, smooth: Any, *, chance: float | None = None) -> Verdict:
    """Tell a jump that the metric makes of a gradual change from one that the model makes.

    Both scores are fitted by monotone curves, and by a link from the smooth to the sharp one; `find_transitions` looks
    for transitions in each. How sudden each is, how much faster than a straight line its steepest transition goes,
    whether the smooth one moves where the sharp one does, how steep the link has to be (a conjunction of tokens or a
    threshold over items has a limited steepness) and how well it fits: these numbers are weighed as they best tell
    simulated cases apart whose kind is known by construction. It takes about 0.3 s for 40 points, 1 s for
    300.

    Args:
        x: a step, tokens, compute or a loss, shape (point,), rising or falling throughout.
        sharp: an accuracy or exact match, shape (point,).
        smooth: a smooth score of the same items, best their mean log-likelihood, shape (point,).
        chance: the sharp score of a guess.

    Returns:
        The likeliest kind with its probability.

    Raises:
        PhasewatchError: if the axis repeats or turns, there are fewer than eight points, chance is missing, or every
            score is at its top from the start.

    >>> import numpy as np
    >>> step = np.geomspace(100, 100_000, 40)
    >>> log_p = -4 * (1 - np.linspace(0, 1, 40)) - 0.01
    >>> verdict(step, np.exp(10 * log_p), log_p, chance=0.0).kind  # ten tokens, all right
    'metric'
    >>> jump = 1 / (1 + np.exp(-(np.linspace(0, 1, 40) - 0.5) / 0.01))
    >>> verdict(step, jump, log_p, chance=0.0).kind  # a format, learned at once
    'unseen by the smooth score'
    """
    call = "verdict"
    chance = check_chance(call, chance)
    values, _ = check_axis(call, x, least=FEWEST)
    score = check_share(call, "sharp", check_numbers(call, "sharp", sharp, shape=(len(values),)))
    check_moves(call, score)
    warn_below_chance(call, score, chance)
    guide = check_numbers(call, "smooth", smooth, shape=(len(values),))
    u = Axis.of(values, falling=bool(values[-1] < values[0])).position(values)
    seen = features(u, score, guide, chance)
    shares = softmax(_weights()[2] @ expanded(seen[None], *_weights()[:2])[0])
    best = int(np.argmax(shares))
    return Verdict(
        kind=KINDS[best],
        probability=float(shares[best]),
        probabilities={kind: float(share) for kind, share in zip(KINDS, shares, strict=True)},
        sharp_jump=float(seen[0]),
        smooth_jump=float(seen[3]),
    )


def expanded(x: np.ndarray, centre: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Features in units of their spread, their products in pairs, and a constant.

    Args:
        x: features, shape (case, feature).
        centre: their means over the simulated cases, shape (feature,).
        scale: their standard deviations, shape (feature,).

    Returns:
        Shape (case, 1 + feature + feature * (feature + 1) / 2).
    """
    z = np.clip((x - centre) / scale, -REACH, REACH)
    i, j = np.triu_indices(z.shape[1])
    return np.concatenate([np.ones((len(z), 1)), z, z[:, i] * z[:, j]], axis=1)


@functools.cache
def _weights() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, scale and weights, written by experiments/verdict_cases.py."""
    fit = json.loads(Path(__file__).with_name("verdict.json").read_text(encoding="utf-8"))
    return np.array(fit["centre"]), np.array(fit["scale"]), np.array(fit["weights"])
