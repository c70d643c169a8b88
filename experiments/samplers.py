"""Which sampler wins where the learning coefficient is known.

Claim: with full gradients it is underdamped Langevin dynamics in the BAOAB splitting, one gradient a step, which keeps
0.95 of its momentum from step to step, at κ = 1. Its limit without momentum, the Leimkuhler-Matthews step (LM), comes
second; both are exact on quadratics and cost what SGLD does. Median and worst relative error, one seed, 4 chains:

    case                                        underdamped 0.95, κ 1    LM, κ 1       SGLD, κ 0.25   MALA
    10 trained networks, which chose                    0.5 %,  4.0 %   1.5 %, 12 %   3.7 %, 17 %    2.6 %,  7.6 %
    10 fresh trained networks                           0.6 %,  5.6 %   1.5 %, 13 %   2.0 %, 14 %    1.4 %, 13 %
    ... without the one of condition number 1e7         0.6 %,  3.5 %   1.3 %, 12 %   1.3 %, 14 %    1.0 %,  7.6 %
    3 of 20,000 to 189,000 parameters, short chains     0.2 %,  0.5 %   5.0 %, 10 %
    6 most singular points, which chose                 1.8 %,  2.7 %   6.4 %, 13 %   6.3 %, 31 %    6.7 %, 17 %
    6 fresh most singular points                        0.9 %,  6.1 %   4.8 %, 29 %   8.3 %, 33 %    4.3 %, 29 %

Where λ is small one such table is noisy: the standard error is about 1/√(λ·ESS) of it, 2 % for λ = 2.
Not claimed: that momentum helps with minibatches of noisy labels. They heat the chains by κ·(nβ/m)·σ²/4, and momentum
by (1 + keep)/(1 − keep) times that: at an equal excess it moves no faster. A scale for each coordinate (RMSProp) helps
where curvatures differ along the axes, and on networks not beyond the noise of this table.

All sample exp(−U), U(w) = nβ·L(w) + γ/2·‖w − w*‖², with full gradients unless a case says otherwise, and estimate
λ̂ = nβ·(E[L(w)] − L(w*)). In the table κ = ε·h with h the largest curvature of U, found by power iteration at w*, then
followed along the chains while they burn in and frozen; for MALA, whose step is adapted to acceptance 0.574, it is what
came out. Temperature and localization matter as much as the sampler: at nβ 72,382 and γ 10 chains leave the
neighbourhood of a trained w* for more singular ones (median 1.8 %, worst 11 %, nearly all low); nβ 1e9 and γ 1e4 stay.

    python experiments/samplers.py [--quick] [--only PART] [--output experiments/results/samplers.csv]
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arviz_stats.base.array import array_stats
from command_line import command_line
from tables import keep
from torch import Generator, Tensor

from phasewatch.monitor.sampling.steps import baoab_step, sgld_step
from phasewatch.toy_tasks import deep_linear

Loss = Callable[..., tuple[Tensor, Tensor]]
"""Weights of shape (chain, parameter) to losses of shape (chain,) and their gradients."""


@dataclass(frozen=True)
class Method:
    """A candidate and its settings.

    Attributes:
        name: as in the table.
        kappa: κ = ε·h.
        keep: share of the momentum kept by BAOAB.
        rule: "baoab", which is LM where it keeps nothing, "sgld" or "mala".
        rmsprop: scale the coordinates by (√v + 0.01·max √v)^(−1/2), v the mean square gradient of the first half of the
            burn-in, frozen for what follows.
    """

    name: str
    kappa: float
    keep: float = 0.0
    rule: str = "baoab"
    rmsprop: bool = False


METHODS = [
    Method("SGLD", 0.25, rule="sgld"),
    Method("SGLD", 1.0, rule="sgld"),
    Method("LM", 0.5),
    Method("LM", 1.0),
    Method("RMSProp LM", 1.0, rmsprop=True),
    Method("underdamped 0.9", 1.0, keep=0.9),
    Method("underdamped 0.95", 0.5, keep=0.95),
    Method("underdamped 0.95", 1.0, keep=0.95),
    Method("underdamped 0.98", 1.0, keep=0.98),
    Method("RMSProp underdamped 0.95", 1.0, keep=0.95, rmsprop=True),
    Method("MALA", 1.0, rule="mala"),
]


NOISY = (
    Method("SGLD", 0.05, rule="sgld"),
    Method("SGLD", 0.25, rule="sgld"),
    Method("LM", 0.05),
    Method("LM", 0.25),
    Method("underdamped 0.9", 0.25, keep=0.9),
    Method("underdamped 0.9", 0.25 / 19, keep=0.9),
)
"""With minibatches. The last moves as far as LM at 0.25 does: momentum multiplies that by (1 + keep)/(1 − keep)."""


@dataclass(frozen=True)
class Case:
    """Something to sample whose answer is known.

    Attributes:
        part: the part of the study it belongs to.
        name: what it is.
        loss: full losses and gradients.
        anchor: w*, shape (parameter,).
        truth: what a perfect sampler and an infinitely long chain give, or λ.
        nbeta: nβ.
        gamma: γ.
        burn_in: steps of each chain that don't count.
        draws: steps that do.
        minibatch: losses and gradients of fresh minibatches, which drive the chains where there is one; what is
            averaged is the full loss all the same.
        condition: the largest over the least curvature of L that isn't 0, where it is known.
        methods: those that run; all where it is empty.
        chains: how many.
    """

    part: str
    name: str
    loss: Loss
    anchor: Tensor
    truth: float
    nbeta: float
    gamma: float
    burn_in: int = 2000
    draws: int = 6000
    minibatch: Callable[[Tensor, Generator], Tensor] | None = None
    condition: float = math.nan
    methods: tuple[Method, ...] = ()
    chains: int = 4


class Sampler:
    """Chains on one case. They live in coordinates u with w = w* + scale·u, where every rule has the unit metric."""

    def __init__(self, case: Case, method: Method, seed: int) -> None:
        self.case, self.method = case, method
        self.generator = Generator().manual_seed(seed)
        self.scale = torch.ones_like(case.anchor)
        self.evaluations = 0
        self.accepted: list[float] = []
        self.start()
        self.direction = self.noise()
        self.current: tuple[Tensor, Tensor] | None = None  # MALA's loss and force at u
        self.curvature(self.u, 30)
        self.eps = method.kappa / self.curvature(self.u, 1)
        # Where w* is degenerate the curvature there says nothing of the curvature a step away
        while self.eps * self.curvature(math.sqrt(self.eps) * self.noise(), 3) > 2 * method.kappa:
            self.eps /= 4

    def start(self) -> None:
        """Put the chains at w*, at rest."""
        self.u = torch.zeros(self.case.chains, len(self.case.anchor), dtype=self.case.anchor.dtype)
        self.momentum = torch.zeros_like(self.u)

    def noise(self) -> Tensor:
        """Standard normal, in the chains' shape."""
        return torch.randn(self.u.shape, generator=self.generator, dtype=self.u.dtype)

    def loss_and_force(self, u: Tensor, full: bool = True) -> tuple[Tensor, Tensor]:
        """L, shape (chain,), and −∇U with respect to u, shape (chain, parameter)."""
        self.evaluations += 1
        displacement = self.scale * u
        w = self.case.anchor + displacement
        loss, gradient = self.case.loss(w)
        if self.case.minibatch is not None and not full:
            gradient = self.case.minibatch(w, self.generator)
        return loss, -self.scale * (self.case.nbeta * gradient + self.case.gamma * displacement)

    def curvature(self, u: Tensor, iterations: int) -> float:
        """The largest curvature of U over the chains, by power iteration from where the last one ended."""
        for _ in range(iterations):
            v = 1e-4 * self.direction / (self.scale * self.direction).norm(dim=1, keepdim=True)
            self.direction = (self.loss_and_force(u - v)[1] - self.loss_and_force(u + v)[1]) / 2
            self.largest = (self.direction.norm(dim=1) / v.norm(dim=1)).max().item()
        return self.largest

    def step(self) -> Tensor:
        """Move the chains, and return the losses of their draws, shape (chain,)."""
        if self.method.rule == "mala":
            return self.mala_step()
        noise = self.noise()
        loss, force = self.loss_and_force(self.u, full=False)
        if self.method.rule == "sgld":
            self.u = self.proposal(force, noise)
        else:
            self.u, self.momentum = baoab_step(
                self.u, self.momentum, torch.zeros_like(self.u), -force, noise,
                nbeta=1.0, gamma=0.0, eps=self.eps, momentum=self.method.keep,
            )  # fmt: skip
        return loss

    def proposal(self, force: Tensor, noise: Tensor) -> Tensor:
        """Where SGLD goes by a force that has the localization in it."""
        return sgld_step(self.u, torch.zeros_like(self.u), -force, noise, nbeta=1.0, gamma=0.0, eps=self.eps)

    def mala_step(self) -> Tensor:
        """Propose a step, take it or stay, and return the losses of where the chains are, shape (chain,)."""
        loss, force = self.current or self.loss_and_force(self.u)
        to = self.proposal(force, self.noise())
        to_loss, to_force = self.loss_and_force(to)
        log_ratio = self.potential(loss, self.u) - self.potential(to_loss, to)
        log_ratio += self.log_density(to, to_force, self.u) - self.log_density(self.u, force, to)
        probability = log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)
        accept = torch.rand(len(to), generator=self.generator, dtype=torch.float64) < probability
        self.u = torch.where(accept[:, None], to, self.u)
        self.current = torch.where(accept, to_loss, loss), torch.where(accept[:, None], to_force, force)
        self.accepted.append(probability.mean().item())
        return self.current[0]

    def log_density(self, u: Tensor, force: Tensor, to: Tensor) -> Tensor:
        """Of a proposal from u to another place, but for a constant, shape (chain,), float64."""
        away = to.double() - u.double() - self.eps / 2 * force.double()
        return -away.square().sum(1) / (2 * self.eps)

    def potential(self, loss: Tensor, u: Tensor) -> Tensor:
        """U where the loss is known, shape (chain,), float64."""
        return self.case.nbeta * loss.double() + self.case.gamma / 2 * (self.scale * u).double().square().sum(1)

    def burn_in(self) -> None:
        """Follow the curvature (MALA: the acceptance), and find the scales in the first half where they're asked for.

        Near a degenerate w* the curvature grows with every step at first. Chains that leave start again, slower.
        """
        squares = torch.zeros_like(self.scale)
        for t in range(self.case.burn_in):
            self.step()
            if self.method.rule == "mala":
                self.eps *= math.exp((self.accepted[-1] - 0.574) / math.sqrt(t + 1))
            elif t < 50 or t % 20 == 19:
                self.eps = min(self.eps, self.method.kappa / self.curvature(self.u, 2))
                if not math.isfinite(self.largest):
                    self.start()
                    self.direction = self.noise()
                    self.eps /= 4
            if self.method.rmsprop and t < self.case.burn_in // 2:
                squares += self.loss_and_force(self.u)[1].square().mean(0)
                if t == self.case.burn_in // 2 - 1:
                    roots = squares.sqrt()
                    scale = (roots + 0.01 * roots.max()).rsqrt()
                    self.u, self.scale = self.u * self.scale / scale, scale
                    self.eps = self.method.kappa / self.curvature(self.u, 30)
        self.accepted.clear()


@torch.no_grad()
def run(case: Case, method: Method, seed: int) -> dict[str, Any]:
    """Sample a case with a method, and compare it with the truth."""
    start = time.perf_counter()
    sampler = Sampler(case, method, seed)
    sampler.burn_in()
    losses = torch.stack([sampler.step() for _ in range(case.draws)], dim=1).double()
    seconds = time.perf_counter() - start
    excess = (case.nbeta * (losses - case.loss(case.anchor[None])[0].double())).numpy()
    finite = bool(np.isfinite(excess).all() and excess.mean() < 1000 * case.truth)
    ess = np.asarray(array_stats.ess(excess, chain_axis=0, draw_axis=1, method="mean")).item() if finite else math.nan
    estimate = float(excess.mean()) if finite else math.nan
    kappa = sampler.eps * sampler.curvature(sampler.u, 10) if finite else math.nan
    return {
        "part": case.part,
        "case": case.name,
        "parameters": len(case.anchor),
        "condition": f"{case.condition:.1e}",
        "nbeta": f"{case.nbeta:.4g}",
        "gamma": f"{case.gamma:g}",
        "method": method.name,
        "kappa": round(method.kappa, 4) if method.rule != "mala" else f"{kappa:.2f}",
        "kappa_at_the_end": f"{kappa:.2f}",
        "truth": round(case.truth, 5),
        "estimate": round(estimate, 5),
        "standard_error": round(float(excess.std()) / math.sqrt(ess), 5) if finite else math.nan,
        "relative_error": round(estimate / case.truth - 1, 5),
        "ess": round(ess) if finite else 0,
        "acceptance": f"{np.mean(sampler.accepted):.2f}" if sampler.accepted else "",
        "evaluations": sampler.evaluations,
        "seconds": round(seconds, 2),
    }


# What is sampled


def quadratics(quick: bool) -> Iterator[Case]:
    """L = ½ Σ h w²: λ̂ is ½ Σ nβ·h/(nβ·h + γ), and SGLD's ½ Σ nβ·h/(a·(1 − ε·a/4)) with a = nβ·h + γ."""
    spectra = {
        "isotropic, d = 50": torch.ones(50),
        "h from 1 to 1e-2, d = 100": torch.logspace(0, -2, 100),
        "h from 1 to 1e-4, d = 100": torch.logspace(0, -4, 100),
    }
    for name, h in spectra.items():
        h = h.double()
        nbeta, gamma = 1086.0, 1.0

        def loss(w: Tensor, h: Tensor = h) -> tuple[Tensor, Tensor]:
            return (h * w.square()).sum(1) / 2, h * w

        truth = (nbeta * h / (nbeta * h + gamma)).sum().item() / 2
        condition = (h.max() / h.min()).item()
        yield Case("quadratic", name, loss, torch.zeros_like(h), truth, nbeta, gamma, condition=condition)


def regressions(quick: bool) -> Iterator[Case]:
    """Linear regression with unit label noise, at the minimum of its data, where λ is d/2."""
    for d, samples in [(10, 10_000), (100, 10_000), (1000, 20_000)][: 2 if quick else 3]:
        generator = Generator().manual_seed(d)
        truth = torch.randn(1, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
        x, y = deep_linear.regression_data(truth, samples, generator, noise=1.0)
        y, gram = y[:, 0], x.mT @ x / samples
        moment = x.mT @ y / samples
        anchor = torch.linalg.solve(gram, moment)
        floor = (y - x @ anchor).square().mean() / 2

        def loss(
            w: Tensor, gram: Tensor = gram, anchor: Tensor = anchor, floor: Tensor = floor
        ) -> tuple[Tensor, Tensor]:
            gradient = (w - anchor) @ gram
            return floor + ((w - anchor) * gradient).sum(1) / 2, gradient

        nbeta = samples / math.log(samples)
        values = torch.linalg.eigvalsh(gram)
        case = Case(
            "regression", f"d = {d}", loss, anchor, d / 2, nbeta, 1.0, condition=(values[-1] / values[0]).item()
        )
        yield case if d < 1000 else replace(case, burn_in=500, draws=2000)
        if d != 100:
            continue
        for m in [64] if quick else [1024, 64]:

            def minibatch(w: Tensor, generator: Generator, x: Tensor = x, y: Tensor = y, m: int = m) -> Tensor:
                rows = torch.randint(len(x), (len(w), m), generator=generator)
                inputs = x[rows]
                errors = torch.einsum("cmd,cd->cm", inputs, w) - y[rows]
                return torch.einsum("cm,cmd->cd", errors, inputs) / m

            name = f"d = {d}, minibatches of {m} (nβ/m = {nbeta / m:.1f})"
            yield replace(
                case, part="minibatch", name=name, minibatch=minibatch, methods=NOISY, burn_in=1000, draws=3000
            )


def network_loss(model: deep_linear.DeepLinear, batch: deep_linear.Batch, dtype: torch.dtype) -> tuple[Loss, Tensor]:
    """A network's loss above its minimum on a batch, from the inputs' second moments, and its flat weights.

    The targets must be free of noise, so that the minimum is 0. Other moments than the whole batch's, of shape
    (chain, input, input), give the losses of minibatches.
    """
    weights = model.factors()
    x, y = batch
    target = torch.linalg.lstsq(x, y).solution.mT.to(dtype)
    whole = (x.mT @ x / len(x)).to(dtype)
    sizes, shapes = [w.numel() for w in weights], [w.shape for w in weights]

    def loss(flat: Tensor, gram: Tensor = whole) -> tuple[Tensor, Tensor]:
        layers = [part.reshape(-1, *shape) for part, shape in zip(flat.split(sizes, dim=1), shapes, strict=True)]
        products = [layers[0]]
        for layer in layers[1:]:
            products.append(layer @ products[-1])
        residual = products[-1] - target
        back = residual @ gram
        losses = (residual * back).sum((1, 2)) / 2
        gradients = []
        for layer, below in zip(layers[:0:-1], products[-2::-1], strict=True):
            gradients.append((back @ below.mT).flatten(1))
            back = layer.mT @ back
        return losses, torch.cat([back.flatten(1), *gradients[::-1]], dim=1)

    return loss, torch.cat([w.flatten() for w in weights]).to(dtype)


def condition_number(model: deep_linear.DeepLinear) -> float:
    """The largest over the least nonzero curvature of the population loss; NaN for a large network."""
    weights = model.factors()
    if weights[0].shape[1] * len(weights[-1]) > 1000 or sum(w.numel() for w in weights) > 5000:
        return math.nan
    h = deep_linear.curvatures(model)
    return (h[-1] / h[0]).item()


CHOOSE = [
    ((2, 2, 2), 1), ((4, 3, 5), 2), ((5, 4, 3, 4, 5), 2), ((6, 12, 12, 6), 3), ((8, 8, 8, 8, 8), 2),
    ((10, 10, 10, 10), 5), ((20, 20, 20), 5), ((30, 10, 30), 3), ((16, 16, 16, 16), 4), ((40, 40, 40), 6),
]  # fmt: skip
FRESH = [
    ((2, 3, 2), 1), ((3, 5, 4), 1), ((6, 5, 4, 6), 3), ((9, 9, 9), 4), ((12, 8, 6, 8, 12), 3), ((7, 7, 7, 7, 7), 3),
    ((14, 14, 14, 14), 5), ((25, 15, 25), 6), ((32, 32, 32, 32), 4), ((60, 60, 60), 8),
]  # fmt: skip
LARGE = [((100, 100, 100), 10), ((100, 900, 110), 10), ((300, 300, 300), 12)]
SHORT_LIST = tuple(m for m in METHODS if (m.name, m.kappa) not in {("SGLD", 1.0), ("LM", 0.5), ("RMSProp LM", 1.0)})
FINALISTS = tuple(m for m in METHODS if (m.name, m.kappa) in {("LM", 1.0), ("underdamped 0.95", 1.0)})


def trained_networks(
    part: str, networks: list[tuple[tuple[int, ...], int]], seed: int, m: int = 0, **settings: Any
) -> Iterator[Case]:
    """Deep linear networks where training ended, against half the rank of their Jacobian; minibatches of m, if any."""
    for number, (widths, rank) in enumerate(networks):
        generator = Generator().manual_seed(seed + number)
        truth = deep_linear.low_rank_matrix(widths[-1], widths[0], rank, generator)
        x, y = deep_linear.regression_data(truth, 4000, generator)
        torch.manual_seed(seed + number)
        model = deep_linear.DeepLinear(widths, dtype=torch.float64)
        with torch.enable_grad():
            deep_linear.train(model, (x, y))
        large = sum(w.numel() for w in model.factors()) > 20_000
        loss, anchor = network_loss(model, (x, y), torch.float32 if large else torch.float64)
        llc, condition = deep_linear.local_llc(model), condition_number(model)
        name = f"{'-'.join(map(str, widths))} rank {rank}"
        case = Case(part, name, loss, anchor, llc, condition=condition, **settings)
        if m:

            def minibatch(w: Tensor, generator: Generator, x: Tensor = x, loss: Loss = loss) -> Tensor:
                inputs = x[torch.randint(len(x), (len(w), m), generator=generator)]
                return loss(w, inputs.mT @ inputs / m)[1]

            case = replace(case, name=f"{name}, minibatches of {m}, no label noise", minibatch=minibatch)
        yield case


SINGULAR = [((4, 4, 4), 0), ((5, 4, 5), 2), ((10, 10, 10), 3), ((6, 6, 6, 6), 2), ((5, 4, 3, 4, 5), 2), ((12,) * 4, 4)]
SINGULAR_FRESH = [
    ((9, 9, 9), 0), ((8, 6, 8), 2), ((16, 16, 16), 6), ((7, 5, 6, 7), 3), ((4, 4, 4, 4), 0), ((9,) * 5, 3),
]  # fmt: skip


def most_singular_points(
    part: str, networks: list[tuple[tuple[int, ...], int]], seed: int, **settings: Any
) -> Iterator[Case]:
    """Deep linear networks whose every factor has the rank of the truth, against Aoyagi's λ."""
    for number, (widths, rank) in enumerate(networks):
        generator = Generator().manual_seed(seed + number)
        truth = deep_linear.low_rank_matrix(widths[-1], widths[0], rank, generator)
        batch = deep_linear.regression_data(truth, 4000, generator)
        loss, anchor = network_loss(deep_linear.most_singular_point(widths, truth, generator), batch, torch.float64)
        llc = deep_linear.most_singular_llc(widths, rank)
        name = f"{'-'.join(map(str, widths))} rank {rank}"
        for nbeta, gamma in [(1086.0, 1.0), (72_382.0, 0.1)]:
            where = f"{part}, nβ {nbeta:.0f}, γ {gamma}"
            yield Case(where, name, loss, anchor, llc, nbeta, gamma, burn_in=4000, draws=8000, **settings)


def degenerate_potentials(quick: bool) -> Iterator[Case]:
    """L = w₁^a w₂^b from 0, against quadrature of exp(−U)."""
    for a, b in [(2, 2), (2, 4), (4, 4)][: 1 if quick else None]:
        nbeta, gamma = 1086.0, 1.0

        def loss(w: Tensor, a: int = a, b: int = b) -> tuple[Tensor, Tensor]:
            x, y = w.unbind(1)
            return x**a * y**b, torch.stack((a * x ** (a - 1) * y**b, b * x**a * y ** (b - 1)), dim=1)

        s = torch.linspace(-25, math.log(8 / math.sqrt(gamma)), 4000, dtype=torch.float64)
        x, y = s.exp()[:, None], s.exp()[None]
        energy = nbeta * x**a * y**b
        weight = (-energy - gamma / 2 * (x**2 + y**2) + s[:, None] + s[None]).exp()
        truth = ((weight * energy).sum() / weight.sum()).item()
        anchor = torch.zeros(2, dtype=torch.float64)
        yield Case("degenerate", f"w1^{a} w2^{b}", loss, anchor, truth, nbeta, gamma, 2000, 8000, chains=16)


def cases(quick: bool) -> dict[str, Callable[[], Iterator[Case]]]:
    """The parts of the study, none of which runs before it is asked for."""
    near: dict[str, Any] = {"nbeta": 1e9, "gamma": 1e4}
    wide: dict[str, Any] = {"nbeta": 72_382.0, "gamma": 10.0}
    quick_networks = CHOOSE[1:3]
    parts: dict[str, Callable[[], Iterator[Case]]] = {
        "quadratic": lambda: quadratics(quick),
        "regression": lambda: regressions(quick),
        "trained": lambda: trained_networks("trained, to choose", quick_networks if quick else CHOOSE, 0, **near),
        "singular": lambda: most_singular_points("most singular, to choose", SINGULAR[: 2 if quick else None], 0),
        "degenerate": lambda: degenerate_potentials(quick),
    }
    if not quick:
        short: dict[str, Any] = {"burn_in": 400, "draws": 600, "methods": FINALISTS}
        parts["wide"] = lambda: trained_networks("trained, n = 1e6", CHOOSE, 0, **wide, methods=FINALISTS)
        parts["fresh"] = lambda: trained_networks("trained, fresh", FRESH, 1000, **near, methods=SHORT_LIST)
        parts["singular-fresh"] = lambda: most_singular_points(
            "most singular, fresh", SINGULAR_FRESH, 1000, methods=SHORT_LIST
        )
        parts["minibatch"] = lambda: trained_networks(
            "minibatch, network", [((20, 20, 20), 5)], 0, m=256, **near, methods=NOISY, burn_in=1000, draws=3000
        )
        parts["large"] = lambda: trained_networks("trained, large", LARGE, 2000, **near, **short)
    return parts


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Median and worst size of the relative error for each method in each part, with and without the ill-conditioned.

    Ill-conditioned are networks with a condition number above 1e6, whose flattest directions γ = 1e-5·nβ takes away.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kappa = "adapted" if row["method"] == "MALA" else str(row["kappa"])
        groups.setdefault((row["part"], row["method"], kappa), []).append(row)
    lines = [f"{'part':44} {'method':26} {'κ':>8} {'cases':>5} {'median':>8} {'worst':>8} {'well-c.':>8}  worst case"]
    for (part, method, kappa), members in groups.items():
        errors = [abs(float(row["relative_error"])) for row in members]
        errors = [math.inf if math.isnan(error) else error for error in errors]
        well = max(e for e, row in zip(errors, members, strict=True) if not float(row["condition"]) > 1e6)
        worst = members[int(np.argmax(errors))]["case"]
        figures = f"{np.median(errors):8.2%} {max(errors):8.2%} {well:8.2%}"
        lines.append(f"{part:44} {method:26} {kappa:>8} {len(errors):5} {figures}  {worst}")
    return lines


def main() -> None:
    """Run the cases that are asked for, print each as it ends, and write the table."""
    parser = command_line(__doc__, quick="the smallest cases and short chains, under a minute")
    parser.add_argument("--only", nargs="+", help="parts to run")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/samplers.csv"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for part, make in cases(arguments.quick).items():
        if arguments.only and part not in arguments.only:
            continue
        for case in make():
            if arguments.quick:
                case = replace(case, burn_in=500, draws=1000, chains=4)
            for method in case.methods or METHODS:
                rows.append(run(case, method, arguments.seed))
                row = rows[-1]
                print(
                    f"{row['part']:20} {row['case']:28} {row['condition']} {row['method']:26} κ {row['kappa']:<5} "
                    f"(ends {row['kappa_at_the_end']:>5}) {row['truth']:9.3f} {row['estimate']:9.3f} "
                    f"± {row['standard_error']:.3f} {row['relative_error']:+8.2%}  {row['evaluations']:6} "
                    f"{row['seconds']:6.1f} s",
                    flush=True,
                )
    if not arguments.quick:
        keep(arguments.output, rows, by=("part", "case"))
    print(*summary(rows), sep="\n")


if __name__ == "__main__":
    main()
