"""Where a calibration begins: the curvature at each snapshot, and the nβ that slopes and noise allow."""

import math
from dataclasses import replace

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.formatting import integer
from phasewatch.monitor.probing.attempts import Attempts
from phasewatch.monitor.probing.proposals import Proposals
from phasewatch.monitor.probing.trials import BIAS

NBETA = 1e4
"""nβ to start from: at a minimum, the larger it is, the less the localization and the minimum's surroundings count.
Noise and slope ask for less."""

NBETA_OF_A_CURVE = 100.0
"""Snapshots before the last one that aren't at a minimum lower nβ to this: the larger it is, the more of their λ̂ is
descent, which would hide the stages."""

LEAST_NBETA = 10.0
"""Where the last snapshot is not at a minimum, nβ may drop to this."""

DESCENT = 0.5
"""nβ to start from is such that the steepest direction falls at most so many nats at all snapshots but the first."""

PILOTS = 4
"""How often nβ is lowered by short chains at the last snapshot, at most, where their noise is too large."""


def survey(attempts: Attempts, proposals: Proposals) -> tuple[list[float], float]:
    """Look around each snapshot by chains too short to move.

    Args:
        attempts: what is spent.
        proposals: the settings that come next, without momentum where that is still to be chosen.

    Returns:
        The curvature at each snapshot, and the nβ that their slopes allow.

    Raises:
        PhasewatchError: if the budget has no room for a trial after it, or the loss is flat or not finite.
    """
    snapshots = attempts.snapshots
    still = replace(proposals.of(1e-12, 0.0, NBETA, 0), draws=4)
    least = len(snapshots) * (attempts.cost(still) + proposals.most(proposals.shortest))
    if attempts.budget < least:
        raise PhasewatchError(
            f"calibrate(budget={attempts.budget}) is too small: a look around {len(snapshots)} snapshots and one short "
            f"trial take {integer(least)} gradient evaluations."
        )
    curvatures, descents = [], []
    for snapshot in snapshots:
        checks = attempts.look(snapshot, still).checks
        if not math.isfinite(checks.curvature):
            raise PhasewatchError(
                f"calibrate(...): the loss or its gradient is not finite around the snapshot of step "
                f"{integer(snapshot.step)}. Give snapshots from before training diverged."
            )
        curvatures.append(checks.curvature)
        descents.append(checks.descent - checks.descent_error)
    if max(curvatures) == 0:
        raise PhasewatchError(
            "calibrate(...): the loss is flat around all of the snapshots, so nothing sets the length of a step. "
            "Check that it depends on the weights that are sampled."
        )
    of_curve = min((NBETA * DESCENT / max(DESCENT, descent) for descent in descents[1:-1]), default=NBETA)
    of_last = max(NBETA * DESCENT / max(DESCENT, descents[-1]), LEAST_NBETA)
    return curvatures, min(max(of_curve, NBETA_OF_A_CURVE), of_last)


def lowered_for_noise(nbeta: float, attempts: Attempts, proposals: Proposals, curvature: float) -> float:
    """Lower nβ where short chains at the last snapshot say that noise would add too much to λ̂.

    Args:
        nbeta: to start from.
        attempts: what is spent.
        proposals: the settings that come next.
        curvature: the largest at any snapshot.

    Returns:
        nβ.
    """
    for _ in range(PILOTS):
        sampler = proposals.of(proposals.kappa / (nbeta * curvature), 0.0, nbeta, proposals.shortest)
        kept_back = len(attempts.snapshots) * proposals.most(proposals.shortest)
        if attempts.cost(sampler) > min(attempts.left / 4, attempts.left - kept_back):
            break
        llc = attempts.look(attempts.snapshots[-1], sampler)
        if llc.health.failed and nbeta > LEAST_NBETA:
            nbeta = max(nbeta / 16, LEAST_NBETA)
            continue
        noise = llc.checks.noise
        bias = noise / max(llc.value - noise, noise) if noise > 0 else 0.0
        if not bias > BIAS or nbeta == LEAST_NBETA:
            break
        nbeta = max(nbeta * max(BIAS / 2 / bias, 1 / 16), LEAST_NBETA)
    return nbeta
