"""An estimate of the local learning coefficient, and whether to believe it. Plain numbers: no torch here."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from phasewatch.monitor.estimates.checks import Checks
from phasewatch.monitor.rim import rim


class Health(enum.Enum):
    """What the chains say about their own estimate; each member's value is the sentence that the user reads.

    Example:
        >>> print(Health.OK.value)
        The chains agree and have settled.
        >>> [health.name for health in Health if not health.has_level]
        ['DIVERGED', 'NEGATIVE', 'OFF_MINIMUM']
    """

    OK = "The chains agree and have settled."
    DIVERGED = (
        "The chains left the snapshot's surroundings for NaN or an impossibly high loss, so there is no estimate. "
        "If the snapshot's own loss is not finite, training has diverged; else lower the sampler's step_size."
    )
    UNMIXED = (
        "The chains disagree by more than each one moves, or are still on their way, so each has seen only a part of "
        "the surroundings. Use more draws or a larger step_size."
    )
    DRIFTING = (
        "The loss along the chains is still moving, so the estimate depends on how long they ran. "
        "Raise the sampler's burn_in."
    )
    NEGATIVE = (
        "The chains found lower loss than the snapshot's own: it is not at a minimum (normal early in training). "
        "Read the curve's shape, not this value; late in training, raise the sampler's localization."
    )
    OFF_MINIMUM = (
        "The loss still slopes at the snapshot: it is not at a minimum, and part of the estimate is descent (normal "
        "early in training). Read the curve's shape, not this value; late in training, measure averaged weights, or "
        "raise the sampler's localization."
    )
    OVERSTEPPING = (
        "The steps are too long for the curvature here, so the estimate is too large. "
        "Lower the sampler's step_size, or give Langevin(kappa=0.5) in its place."
    )
    NOISY = (
        "The minibatches' noise heats the chains, so the estimate is too large. "
        "Raise the sampler's batch_size, or lower its step_size."
    )
    CREEPING = (
        "The steps are so short that the chains hardly leave the snapshot, so the estimate is too small. "
        "Raise the sampler's step_size, or give Langevin(kappa=0.5) in its place."
    )
    LOCALIZED = (
        "The localization is as strong as the loss in many directions, so the estimate is smaller than without it. "
        "Compare points of one setting with each other; for the level, lower the sampler's localization or raise nbeta."
    )
    SHORT = (
        "The chains are too short for the loss's softer directions, so the estimate is smaller than with longer ones. "
        "Compare points of one setting with each other; for the level, raise the sampler's burn_in and draws."
    )

    @property
    def failed(self) -> bool:
        """Whether there is no usable value at all; the other doubts leave a value that can be compared."""
        return self is Health.DIVERGED

    @property
    def doubtful(self) -> bool:
        """Whether the value isn't what its setting defines, of which localization and length of chains are a part."""
        return self not in {Health.OK, Health.LOCALIZED, Health.SHORT}

    @property
    def has_level(self) -> bool:
        """Whether the value says how complex the model is, and isn't part descent."""
        return self not in {Health.DIVERGED, Health.NEGATIVE, Health.OFF_MINIMUM}


_NO_CHECKS = Checks()
_NONE_KNOWN = dict.fromkeys(Checks._fields, "nan")
_HEALTHS = dict(Health.__members__)  # found twice as fast as by Health[...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """λ̂ = nβ · (E_w[L(w)] − L(w*)) with its error and its verdict (Lau et al. 2023, eq. 7).

    Attributes:
        value: the mean over chains and draws; NaN if the chains diverged.
        error: `value ± 2 * error` holds the mean of `value` over seeds in 95 % of cases: a standard error, with
            Student's factor for the number of chains folded in. It knows nothing of that mean's own bias.
        per_chain: the mean of each chain, shape (chain,). Chain c of two points of one run shares its minibatches and
            its noise, so differences are taken chain by chain, by `difference`.
        nbeta: the inverse temperature nβ.
        rhat: split R-hat of the paired losses; 1 when the chains agree.
        ess: effective number of independent draws among all chains.
        health: the verdict.
        checks: what else it was judged by.
        trace: for a doubtful estimate, nβ · (L(w) − L(w*)) along each chain, at most 100 values a chain, evenly
            thinned; empty otherwise.

    Example:
        >>> found = Estimate(11.0, 2.0, (10.0, 12.0), nbeta=60.0, rhat=1.0, ess=50.0, health=Health.OK)
        >>> Estimate.from_json(found.as_json()) == found
        True
    """

    value: float
    error: float
    per_chain: tuple[float, ...]
    nbeta: float
    rhat: float
    ess: float
    health: Health
    trace: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    checks: Checks = field(default=_NO_CHECKS, repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """This estimate as plain JSON types; what isn't finite becomes a word, since JSON has no NaN."""
        record: dict[str, Any] = {
            "value": json_number(self.value),
            "error": json_number(self.error),
            "per_chain": [json_number(v) for v in self.per_chain],
            "nbeta": json_number(self.nbeta),
            "rhat": json_number(self.rhat),
            "ess": json_number(self.ess),
            "health": self.health.name,
            "checks": {name: json_number(value) for name, value in self.checks._asdict().items()},
        }
        if self.trace:
            record["trace"] = [[json_number(v) for v in chain] for chain in self.trace]
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Estimate":
        """The inverse of `as_json`, exact to the last bit; checks that it doesn't know are left out."""
        known = record.get("checks", _NONE_KNOWN)
        is_plain = known.items() <= _NONE_KNOWN.items()
        checks = _NO_CHECKS if is_plain else Checks._make(map(float, map(known.get, Checks._fields, repeat("nan"))))
        return cls(
            value=float(record["value"]),
            error=float(record["error"]),
            per_chain=_numbers(record["per_chain"]),
            nbeta=float(record["nbeta"]),
            rhat=float(record["rhat"]),
            ess=float(record["ess"]),
            health=_HEALTHS[record["health"]],
            checks=checks,
            trace=tuple(map(_numbers, record["trace"])) if "trace" in record else (),
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the value, its error and the verdict."""
        return rim("figures.notebook", "Estimate._repr_html_()").estimate_html(self)


def _numbers(values: Any) -> tuple[float, ...]:
    """A list as floats; not a word, whose letters may be digits."""
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list of numbers")
    return tuple(map(float, values))


def json_number(value: float) -> float | str:
    """A float as strict JSON: itself, or "nan", "inf", "-inf", which `float` reads back.

    Example:
        >>> json_number(0.5), json_number(float("-inf"))
        (0.5, '-inf')
    """
    return value if math.isfinite(value) else str(value)
