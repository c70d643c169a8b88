"""How to sample around a snapshot: one settings class for each sampler, whose steps are in `steps.py`."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError, real_number, whole_number
from phasewatch.monitor.sampling.steps import baoab_start, baoab_step, sgld_step

DEFAULT_STEP_SIZE = 1e-4
"""ε where neither a step size nor κ is given: a value to start from. `calibrate` finds one for a series."""

FULL_BATCH_MOMENTUM = 0.95
"""Share of the velocity that is kept with all of the data at each step: the best for the error on deep linear networks,
at trained and at the most singular points (experiments/samplers.py). Minibatches' noise would be multiplied by 39."""

UNSTABLE_KAPPA = 4.0
"""κ = ε·(nβ·h + γ) from which a direction of curvature h overshoots further at every step, for all samplers here."""


@dataclass(frozen=True)
class Sampler:
    """What all samplers have. λ̂ depends on all of it: use one setting for a whole trajectory.

    Attributes:
        step_size: ε. Too large and the chains diverge or overshoot, too small and they don't get anywhere.
        localization: γ, the strength of the pull back to the snapshot.
        nbeta: nβ, the inverse temperature times the number of samples; larger looks closer to the snapshot.
        chains: independent chains, at least 2.
        draws: steps of each chain that count, at least 4.
        burn_in: steps before them that don't.
        batch_size: samples in a minibatch; None for all of the data at each step.
    """

    step_size: float | None = DEFAULT_STEP_SIZE
    localization: float = 100.0
    nbeta: float = 100.0
    chains: int = 4
    draws: int = 100
    burn_in: int = 50
    batch_size: int | None = 64

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field, least in (("chains", 1), ("draws", 4), ("burn_in", 0)):
            self._set(field, whole_number(f"{name}({field}=...)", getattr(self, field), least=least))
        if self.chains == 1:
            raise PhasewatchError(
                f"{name}(chains=1) must be a whole number of at least 2. One chain has no spread to take an error from."
            )
        if self.batch_size is not None:
            self._set("batch_size", whole_number(f"{name}(batch_size=...)", self.batch_size, least=1))
        self._set("localization", real_number(f"{name}(localization=...)", self.localization, least=0))
        self._set("nbeta", real_number(f"{name}(nbeta=...)", self.nbeta, above=0))
        if self.step_size is not None:
            self._set("step_size", real_number(f"{name}(step_size=...)", self.step_size, above=0))
        eps = self.resolved().step_size
        if eps is not None and eps * self.localization >= UNSTABLE_KAPPA:
            raise PhasewatchError(
                f"{name}(step_size={eps:g}, localization={self.localization:g}): their product must be below "
                "4, or the pull back to the snapshot overshoots it further at every step. Lower one of them."
            )

    def _set(self, field: str, value: float) -> None:
        object.__setattr__(self, field, value)

    @property
    def velocity_kept(self) -> float | None:
        """Share of its velocity that a chain keeps at a step: None where it has none, 0 where it is the last noise."""
        return None

    @property
    def noise_gain(self) -> float:
        """How many times as much of the minibatches' noise the chains take up as chains that keep no velocity."""
        kept = self.velocity_kept or 0.0
        return (1 + kept) / (1 - kept)

    @property
    def target_kappa(self) -> float | None:
        """κ, where each snapshot gets the step size that it makes; None where the step size is given."""
        return None

    @property
    def has_step_bias(self) -> bool:
        """Whether the length of the steps adds to λ̂ on a quadratic."""
        return False

    def resolved(self) -> Self:
        """These settings with the values that are taken where one is None."""
        return self

    def start(self, anchor: Tensor, noise: Tensor, eps: float | Tensor) -> Tensor:
        """Where a chain first asks for a gradient, of the shape of `noise` or the anchor's.

        Args:
            anchor: w*, of a shape that broadcasts with `noise`.
            noise: the chain's first noise, which is also its first velocity where it has one.
            eps: ε, of a shape that broadcasts with `noise`.
        """
        raise NotImplementedError

    def step(
        self, w: Tensor, velocity: Tensor | None, anchor: Tensor, grad: Tensor, noise: Tensor, eps: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Where a chain goes from w with the gradient there, and its velocity, None without one.

        Args:
            w: of one parameter, any shape.
            velocity: of the shape of `w`, by `velocity_kept`.
            anchor: w*.
            grad: ∇L(w) on the step's minibatch.
            noise: standard normal.
            eps: ε.
        """
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """The sampler's name and its settings, resolved."""
        return {"sampler": type(self).__name__, **asdict(self.resolved())}

    def __str__(self) -> str:
        always = {field.name for field in fields(Sampler)}
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = {k: v for k, v in given.items() if v != getattr(type(self), k) or (k in always and v is not None)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


@dataclass(frozen=True)
class SGLD(Sampler):
    """Stochastic gradient Langevin dynamics, the published step and nothing else (see `steps.sgld_step`).

    On a quadratic it makes a direction's share of λ̂ too large by a quarter of its κ = ε·(nβ·h + γ).

    Attributes:
        step_size: ε. Too large and the chains diverge or overshoot, too small and they don't get anywhere.
        localization: γ, the strength of the pull back to the snapshot.
        nbeta: nβ, the inverse temperature times the number of samples; larger looks closer to the snapshot.
        chains: independent chains, at least 2.
        draws: steps of each chain that count, at least 4.
        burn_in: steps before them that don't.
        batch_size: samples in a minibatch; None for all of the data at each step.

    Raises:
        PhasewatchError: if a value makes no sense.

    Example:
        The setting that Hoogland et al. (2024) published for in-context linear regression:

        >>> import phasewatch as pw
        >>> pw.SGLD(step_size=3e-4, localization=6.67, nbeta=66.7, chains=10, draws=5000, burn_in=1000, batch_size=1024)
        SGLD(step_size=0.0003, localization=6.67, nbeta=66.7, chains=10, draws=5000, burn_in=1000, batch_size=1024)
    """

    def __post_init__(self) -> None:
        self._set("step_size", real_number("SGLD(step_size=...)", self.step_size, above=0))
        super().__post_init__()

    @property
    def has_step_bias(self) -> bool:
        """Whether the length of the steps adds to λ̂ on a quadratic: by a quarter of κ."""
        return True

    def start(self, anchor: Tensor, noise: Tensor, eps: float | Tensor) -> Tensor:
        """Where a chain first asks for a gradient: at w*."""
        return anchor

    def step(
        self, w: Tensor, velocity: Tensor | None, anchor: Tensor, grad: Tensor, noise: Tensor, eps: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Where a chain goes from w, and no velocity."""
        return sgld_step(w, anchor, grad, noise, nbeta=self.nbeta, gamma=self.localization, eps=eps), None


@dataclass(frozen=True)
class Langevin(Sampler):
    """Underdamped Langevin dynamics in the BAOAB splitting, the default (see `steps.baoab_step`).

    On a quadratic λ̂ has no error of the step size, where SGLD's is too large by a quarter of κ.

    Attributes:
        step_size: ε; 1e-4 if neither it nor `kappa` is given. Too large and the chains diverge, too small and they
            don't get anywhere.
        localization: γ, the strength of the pull back to the snapshot.
        nbeta: nβ, the inverse temperature times the number of samples; larger looks closer to the snapshot.
        chains: independent chains, at least 2.
        draws: steps of each chain that count, at least 4.
        burn_in: steps before them that don't.
        batch_size: samples in a minibatch; None for all of the data at each step.
        kappa: κ = ε·(nβ·h + γ), h the largest curvature of the loss, instead of a step size: each snapshot gets the ε
            that this makes, and each chain lowers it whenever it meets a larger curvature. 0.25 to 1 is usual.
        momentum: share of its velocity that a chain keeps from step to step. The more, the sooner chains settle where
            curvatures differ widely, and the more of the minibatches' noise they take up, (1 + momentum)/(1 − momentum)
            times: 0.95 with all of the data at each step and 0 with minibatches if not given.

    Raises:
        PhasewatchError: if a value makes no sense.

    Example:
        >>> import phasewatch as pw
        >>> pw.Langevin(kappa=0.5, batch_size=None).resolved().momentum
        0.95
    """

    step_size: float | None = None
    kappa: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        if self.step_size is not None and self.kappa is not None:
            raise PhasewatchError(
                f"Langevin(step_size={self.step_size!r}, kappa={self.kappa!r}) says twice how large the steps are. "
                "Give one of them."
            )
        if self.kappa is not None:
            hint = "or the chains overshoot further at every step; 0.25 to 1 is usual"
            self._set("kappa", real_number("Langevin(kappa=...)", self.kappa, above=0, below=UNSTABLE_KAPPA, hint=hint))
        if self.momentum is not None:
            self._set("momentum", real_number("Langevin(momentum=...)", self.momentum, least=0, below=1))
        super().__post_init__()

    @property
    def velocity_kept(self) -> float:
        """Share of its velocity that a chain keeps at a step."""
        if self.momentum is not None:
            return self.momentum
        return FULL_BATCH_MOMENTUM if self.batch_size is None else 0.0

    @property
    def target_kappa(self) -> float | None:
        """κ, where it is given instead of a step size."""
        return self.kappa

    def resolved(self) -> Self:
        """These settings with the step size (unless κ is given) and the momentum that are taken where they are None."""
        eps = DEFAULT_STEP_SIZE if self.step_size is None and self.kappa is None else self.step_size
        if (eps, self.velocity_kept) == (self.step_size, self.momentum):
            return self
        return replace(self, step_size=eps, momentum=self.velocity_kept)

    def start(self, anchor: Tensor, noise: Tensor, eps: float | Tensor) -> Tensor:
        """Where a chain first asks for a gradient, with the noise as its velocity."""
        return baoab_start(anchor, noise, eps=eps)

    def step(
        self, w: Tensor, velocity: Tensor | None, anchor: Tensor, grad: Tensor, noise: Tensor, eps: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Where a chain goes from w, and its velocity there."""
        assert velocity is not None
        scale: dict[str, Any] = {"nbeta": self.nbeta, "gamma": self.localization, "eps": eps}
        return baoab_step(w, velocity, anchor, grad, noise, **scale, momentum=self.velocity_kept)
