"""Is λ̂ right where the learning coefficient is known?

One table: case, truth, λ̂, its standard error, relative error, verdict and the one that is meant, condition number,
gradient evaluations, seconds, all by `estimate_llc` with all of the data at each step and κ = 0.5 (0.25 for degenerate
potentials, where 0.5 is unstable). A line marks by (!) a verdict that isn't meant.

Claims: regular models within 1 %; converged deep linear networks, none of a condition number above 1e6, within 5 % and
their median within 1 %, on truths, weights and noise that experiments/samplers.py, where the sampler was chosen, never
saw; the same up to a million parameters in short chains, the largest called UNMIXED, and a hundred million parameters
(on a GPU) within 5 %; most singular points within 5 %; the plateaus of the toy model of superposition and degenerate
potentials within 2 %. Where no number is promised none passes as OK: what γ holds back is called LOCALIZED, and a model
off its minimum NEGATIVE, which comes before the OFF_MINIMUM that it is meant to show.

Degenerate potentials are judged against quadrature of the tempered local posterior, and a quadratic with a wide
spectrum against ½ Σ nβ·h/(nβ·h + γ), what γ leaves of it. Trained networks: nβ 1e9 and γ 1e4, so that chains stay
near w*; most singular points: nβ 7e4 and γ 0.1.

`--calibrated` asks `calibrate` for the setting, with nothing but a snapshot and the data: fresh deep linear networks as
trained and at most singular points, six of them with minibatches that a function draws, and regressions, of 100 to
2,400 parameters, whose inputs are drawn. Claims: every network within 5 %, the median within 2 %, for at most 5,000
gradient evaluations, 2,500 in the median. Of eight more, drawn later, two aren't within 5 %, one of them called
LOCALIZED, and the other, of condition 10,000,000, OK. Of 44 whose widths, depth and rank are drawn, 39 are within 5 %,
two have a verdict, and three pass as OK, 13 % and 10 % too low and 6 % too high. It takes ten minutes on a core.

    python experiments/truth.py [--quick] [--only PART] [--calibrated]
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from command_line import command_line
from tables import keep
from torch import Generator, Tensor, nn

import phasewatch as pw
from phasewatch.toy_tasks import deep_linear, superposition

RESULTS = Path(__file__).parent / "results" / "truth.csv"
CALIBRATED = RESULTS.with_name("truth_calibrated.csv")


@dataclass(frozen=True)
class Case:
    """A model at a known point, how it is sampled there, and the verdict that it is meant to get."""

    part: str
    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    data: Any
    truth: float
    settings: dict[str, Any]
    condition: float = 1.0
    seed: int = 0
    meant: str = "OK"


def measure(case: Case) -> dict[str, Any]:
    """A row of the table."""
    start = time.perf_counter()
    if case.settings:
        sampler = pw.Langevin(**({"kappa": 0.5, "batch_size": None} | case.settings))
    else:
        probe = pw.Probe(case.model, case.loss, case.data)
        sampler = pw.calibrate([pw.Snapshot.of(case.model, step=0)], probe, show=None)
    estimate = pw.estimate_llc(case.model, case.loss, case.data, sampler=sampler, seed=case.seed)
    return {
        "part": case.part,
        "case": case.name,
        "parameters": sum(p.numel() for p in case.model.parameters()),
        "truth": case.truth,
        "estimate": estimate.value,
        "error": estimate.error,
        "relative": estimate.value / case.truth - 1,
        "verdict": estimate.health.name,
        "meant": case.meant,
        "condition": case.condition,
        "gradients": sampler.chains * (sampler.burn_in + sampler.draws),
        "seconds": time.perf_counter() - start,
    }


def whitened(samples: int) -> Tensor:
    """Inputs whose second moments are exactly the identity, shape (sample, sample)."""
    return math.sqrt(samples) * torch.eye(samples, dtype=torch.float64)


def regressions(quick: bool) -> Iterator[Case]:
    """Linear regression at the minimiser of noisy data: λ = d/2."""
    for d in (10, 100) if quick else (10, 100, 1000):
        settings = {"nbeta": 1e5, "localization": 1.0, "chains": 4, "burn_in": 300, "draws": 1500}
        yield regression(100 + d, d, settings)


def regression(seed: int, d: int, settings: dict[str, Any], seed_of_chains: int = 0) -> Case:
    """A linear regression of d parameters at the minimiser of noisy data."""
    generator = Generator().manual_seed(seed)
    x = torch.randn(4 * d, d, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(d, 1, generator=generator, dtype=torch.float64)
    y += 0.5 * torch.randn(4 * d, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(d, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return Case(
        "regular", f"regression, d = {d}", model, deep_linear.loss, (x, y), d / 2, settings, seed=seed_of_chains
    )


def quadratics(quick: bool) -> Iterator[Case]:
    """Diagonal regression with a known spectrum: the chains' own truth is ½ Σ nβ·h/(nβ·h + γ)."""
    for low, gamma, meant in (
        (0.1, 1.0, "OK"),
        (1e-2, 1.0, "OK"),
        (1e-4, 10.0, "LOCALIZED"),
        (1e-4, 100.0, "LOCALIZED"),
    ):
        d, nbeta = 200, 1086.0
        h = torch.logspace(math.log10(low), 0, d, dtype=torch.float64)
        model = nn.Linear(d, 1, bias=False, dtype=torch.float64)
        x = whitened(d) * h.sqrt()
        truth = (nbeta * h / (nbeta * h + gamma)).sum().item() / 2
        data = (x, (x @ model.weight.detach().T))
        settings = {"nbeta": nbeta, "localization": gamma, "chains": 4, "burn_in": 500, "draws": 1500}
        name = f"spectrum {low:g} to 1, γ {gamma:g}"
        yield Case("quadratic", name, model, deep_linear.loss, data, truth, settings, 1 / low, meant=meant)


NETWORKS = [
    ((2, 2, 2), 1), ((3, 2, 3), 2), ((5, 3, 5), 2), ((5, 5, 5), 3), ((4, 6, 4), 3), ((10, 10, 10), 4), ((8, 12, 8), 5),
    ((6, 6, 6, 6), 3), ((8, 6, 6, 8), 4), ((10, 8, 8, 8, 10), 5), ((20, 20, 20), 5), ((30, 20, 30), 8),
    ((16, 16, 16, 16), 6), ((40, 30, 40), 10), ((25, 25, 25, 25), 8),
]  # fmt: skip
LARGE = [((100, 120, 100), 10), ((300, 300, 300), 12), ((700, 720, 700), 20)]
"""Of 24,000, 180,000 and 1,008,000 parameters."""


def networks(quick: bool) -> Iterator[Case]:
    """Deep linear networks where training took them: λ there is rank(J)/2."""
    yield from trained(NETWORKS[:4] if quick else NETWORKS, burn_in=2000, draws=6000)


def large_networks(quick: bool) -> Iterator[Case]:
    """The same, up to a million parameters."""
    yield from trained([] if quick else LARGE, burn_in=150, draws=250)


def trained(networks: list[tuple[tuple[int, ...], int]], **steps: int) -> Iterator[Case]:
    """Deep linear networks, trained on a truth of their rank."""
    for number, (widths, rank) in enumerate(networks):
        generator = Generator().manual_seed(5000 + number)
        truth = deep_linear.low_rank_matrix(widths[-1], widths[0], rank, generator)
        x = whitened(widths[0])
        torch.manual_seed(6000 + number)
        model = deep_linear.DeepLinear(widths, dtype=torch.float64)
        deep_linear.train(model, (x, x @ truth.T))
        data = (x, x @ truth.T)
        condition = math.nan
        if sum(p.numel() for p in model.parameters()) <= 4000:
            h = deep_linear.curvatures(model)
            condition = (h[-1] / h[0]).item()
        name = f"{widths} rank {rank}"
        settings = {"nbeta": 1e9, "localization": 1e4, "chains": 4, **steps}
        part = "large" if networks is LARGE else "trained"
        yield Case(
            part, name, model, deep_linear.loss, data, deep_linear.local_llc(model), settings,
            condition, number,
        )  # fmt: skip


SINGULAR = [((3, 3, 3), 1), ((5, 3, 5), 0), ((6, 4, 6), 2), ((5, 5, 5, 5), 2), ((8, 8, 8), 2), ((7, 7, 7, 7), 3)]


def singular_points(quick: bool) -> Iterator[Case]:
    """Deep linear networks where λ is smallest: every factor has the true rank."""
    for number, (widths, rank) in enumerate(SINGULAR[:1] if quick else SINGULAR):
        generator = Generator().manual_seed(7000 + number)
        truth = deep_linear.low_rank_matrix(widths[-1], widths[0], rank, generator)
        model = deep_linear.most_singular_point(widths, truth, generator)
        x = whitened(widths[0])
        settings = {"nbeta": 72_382.0, "localization": 0.1, "chains": 8, "burn_in": 6000, "draws": 12000}
        llc = deep_linear.most_singular_llc(widths, rank)
        name = f"{widths} rank {rank}"
        yield Case("most singular", name, model, deep_linear.loss, (x, x @ truth.T), llc, settings, seed=number)


def plateaus(quick: bool) -> Iterator[Case]:
    """The toy model of superposition at its known critical points."""
    for features, k, positive in ((5, 5, 0), (6, 6, 0), (6, 5, 1))[: 1 if quick else 3]:
        model = superposition.polygon(features, k, positive=positive)
        # Every input in turn, of every size: midpoints, of which 400 are the uniform distribution to 1e-6
        sizes = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
        x = (sizes[:, None, None] * torch.eye(features, dtype=torch.float64)).flatten(0, 1)
        settings = {"nbeta": 1e5, "localization": 1.0, "chains": 4, "burn_in": 1000, "draws": 4000}
        name = f"superposition, {features} features, {k}-gon{'+' * positive}"
        yield Case("superposition", name, model, superposition.loss, x, superposition.local_llc(model), settings)


class Product(nn.Module):
    """w₁ᵃ·w₂ᵇ, as many independent pairs as columns, at 0."""

    def __init__(self, a: int, b: int, pairs: int) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.w = nn.Parameter(torch.zeros(2, pairs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (sample, pair) in, (sample, 1) out."""
        return x @ (self.w[0] ** self.a * self.w[1] ** self.b).unsqueeze(-1)


def potentials(quick: bool) -> Iterator[Case]:
    """Potentials w₁^2a·w₂^2b/2, against quadrature."""
    pairs, nbeta, gamma = 16, 1086.0, 1.0
    for a, b in ((1, 1),) if quick else ((1, 1), (1, 2), (2, 2)):
        reach = np.concatenate([-np.logspace(1, -6, 1500), np.logspace(-6, 1, 1500)])
        u, v = np.meshgrid(reach, reach)
        excess = nbeta * (u**a * v**b) ** 2 / 2
        density = np.exp(-excess - gamma / 2 * (u**2 + v**2))
        total = [np.trapezoid(np.trapezoid(f, reach), reach) for f in (excess * density, density)]
        x, model = whitened(pairs), Product(a, b, pairs)
        data = (x, torch.zeros(pairs, 1, dtype=torch.float64))
        settings = {"nbeta": nbeta, "localization": gamma, "chains": 8, "burn_in": 2000, "draws": 8000, "kappa": 0.25}
        name = f"w₁^{2 * a}·w₂^{2 * b}, {pairs} times"
        yield Case(
            "degenerate",
            name,
            model,
            deep_linear.loss,
            data,
            float(pairs * total[0] / total[1]),
            settings,
            meant="LOCALIZED",
        )


def hopeless(quick: bool) -> Iterator[Case]:
    """Where no number is promised: a verdict is."""
    generator = Generator().manual_seed(1)
    x = torch.randn(400, 50, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(50, 1, generator=generator, dtype=torch.float64)
    best = torch.linalg.lstsq(x, y).solution.T
    settings = {"nbeta": 1e4, "localization": 1.0, "chains": 4, "burn_in": 200, "draws": 400}
    for name, shift, changed, meant in (
        ("off the minimum", 0.1, {}, "OFF_MINIMUM"),
        ("γ of the order of nβ·h", 0.0, {"localization": 1e4}, "LOCALIZED"),
    ):
        model = nn.Linear(50, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(best + shift)
        yield Case("hopeless", name, model, deep_linear.loss, (x, y), 25.0, settings | changed, meant=meant)


Network: TypeAlias = tuple[tuple[int, ...], int]
"""Widths and rank."""

FRESH: list[Network] = [
    ((10, 10, 10), 4), ((8, 12, 8), 5), ((6, 6, 6, 6), 3), ((20, 20, 20), 5), ((30, 20, 30), 8), ((16, 16, 16, 16), 6),
    ((25, 20, 25, 20), 6), ((40, 30, 40), 10),
]  # fmt: skip
FRESH_SINGULAR: list[Network] = [
    ((8, 8, 8), 2),
    ((7, 7, 7, 7), 3),
    ((10, 6, 10), 3),
    ((12, 12, 12), 4),
    ((20, 10, 20), 4),
]
LATER: list[Network] = [
    ((16, 16, 16, 16), 6), ((12, 14, 12, 14), 5), ((9, 9, 9, 9, 9), 4), ((18, 12, 12, 18), 7), ((10, 10, 10, 10), 5),
]  # fmt: skip
LATER_SINGULAR: list[Network] = [((9, 9, 9), 3), ((8, 8, 8, 8), 3), ((14, 10, 14), 4)]
FRESH_DRAWN = [
    (91_000, ((10, 10, 10), 4), False), (91_001, ((8, 12, 8), 5), False), (91_003, ((20, 20, 20), 5), False),
    (91_005, ((16, 16, 16, 16), 6), False), (93_000, ((8, 8, 8), 2), True), (93_003, ((12, 12, 12), 4), True),
]  # fmt: skip


def from_minibatches(seed: int, widths: tuple[int, ...], rank: int, *, singular: bool) -> Case:
    """A network whose data a function draws, so that there is no end of them."""
    truth, model, _ = drawn(seed, widths, rank)
    llc, condition = deep_linear.most_singular_llc(widths, rank), 1.0
    if singular:
        model = deep_linear.most_singular_point(widths, truth, Generator().manual_seed(seed + 1000))
    else:
        x = torch.randn(20_000, widths[0], dtype=torch.float64, generator=Generator().manual_seed(1))
        deep_linear.train(model, (x, x @ truth.T))
        h = deep_linear.curvatures(model)
        llc, condition = deep_linear.local_llc(model), (h[-1] / h[0]).item()

    def draw(generator: Generator, batch_size: int) -> deep_linear.Batch:
        x = torch.randn(batch_size, widths[0], dtype=torch.float64, generator=generator)
        return x, x @ truth.T

    return Case("minibatches", f"{widths} rank {rank}", model, deep_linear.loss, draw, llc, {}, condition, seed=5)


def fresh(quick: bool) -> Iterator[Case]:
    """Networks that are calibrated, with inputs x ~ N(0, I)."""
    yield from networks_from(91_000, FRESH[:2] if quick else FRESH, FRESH_SINGULAR[:1] if quick else FRESH_SINGULAR)
    for number, (widths, rank), singular in FRESH_DRAWN[:1] if quick else FRESH_DRAWN:
        yield from_minibatches(number, widths, rank, singular=singular)
    for d in (100,) if quick else (100, 300, 1000):
        yield regression(95_000 + d, d, {}, seed_of_chains=5)


def later(quick: bool) -> Iterator[Case]:
    """Networks that were drawn when the rules of `calibrate` stood."""
    if not quick:
        yield from networks_from(191_000, LATER, LATER_SINGULAR, "later: ")


def shapes(quick: bool) -> Iterator[Case]:
    """Networks of two to four layers whose widths and ranks are drawn."""
    draw, networks = random.Random(15), list[Network]()
    while len(networks) < (2 if quick else 44):
        layers = draw.choice((2, 2, 3, 3, 4))
        widths = tuple(draw.choice((3, 4, 5, 6, 8, 10, 12, 16, 20, 24)) for _ in range(layers + 1))
        if 100 <= sum(a * b for a, b in pairwise(widths)) <= 3000:
            networks.append((widths, draw.randint(1, min(widths))))
    yield from networks_from(35_000, networks[::2], networks[1::2], "drawn: ")


def networks_from(
    seed: int, as_trained: list[Network], at_singular_points: list[Network], prefix: str = ""
) -> Iterator[Case]:
    """Deep linear networks as trained, and at most singular points."""
    for number, (widths, rank) in enumerate(as_trained):
        _, model, data = drawn(seed + number, widths, rank)
        deep_linear.train(model, data)
        h = deep_linear.curvatures(model)
        yield Case(
            f"{prefix}trained", f"{widths} rank {rank}", model, deep_linear.loss, data, deep_linear.local_llc(model),
            {}, (h[-1] / h[0]).item(), seed=5,
        )  # fmt: skip
    for number, (widths, rank) in enumerate(at_singular_points):
        truth, _, data = drawn(seed + 2000 + number, widths, rank)
        model = deep_linear.most_singular_point(widths, truth, Generator().manual_seed(seed + 3000 + number))
        llc = deep_linear.most_singular_llc(widths, rank)
        yield Case(f"{prefix}most singular", f"{widths} rank {rank}", model, deep_linear.loss, data, llc, {}, seed=5)


def drawn(seed: int, widths: tuple[int, ...], rank: int) -> tuple[Tensor, deep_linear.DeepLinear, deep_linear.Batch]:
    """A truth of this rank, an untrained network, and data."""
    generator = Generator().manual_seed(seed)
    truth = deep_linear.low_rank_matrix(widths[-1], widths[0], rank, generator)
    torch.manual_seed(seed + 1000)
    model = deep_linear.DeepLinear(widths, dtype=torch.float64)
    return truth, model, deep_linear.regression_data(truth, max(500, 6 * widths[0]), generator)


def hundred_million(quick: bool) -> Iterator[Case]:
    """A deep linear network of 97 million parameters, on a GPU; with factors of full rank λ = r·(H₁ + H₄ − r)/2."""
    if quick or not torch.cuda.is_available():
        return
    torch.manual_seed(0)
    outer, inner = 8500, 4500
    model = deep_linear.DeepLinear((outer, inner, inner, outer)).cuda()
    with torch.no_grad():
        for factor in model.parameters():
            nn.init.orthogonal_(factor)
            factor.mul_(1 + torch.rand(factor.shape[0], 1, device="cuda"))
        x = math.sqrt(outer) * torch.eye(outer, device="cuda")
        y = model(x)
    llc = inner * (2 * outer - inner) / 2
    settings = {"nbeta": 1e9, "localization": 1e4, "chains": 2, "burn_in": 100, "draws": 100}
    name = f"{outer, inner, inner, outer} rank {inner}"
    yield Case("100M", name, model, deep_linear.loss, (x, y), llc, settings, condition=math.nan)


PARTS = {
    "regular": regressions, "quadratic": quadratics, "trained": networks, "large": large_networks,
    "singular": singular_points, "superposition": plateaus, "degenerate": potentials, "hopeless": hopeless,
    "100M": hundred_million,
}  # fmt: skip

CALIBRATED_PARTS = {"fresh": fresh, "later": later, "shapes": shapes}


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Median and worst relative error of each part."""
    for part in dict.fromkeys(row["part"] for row in rows if row["part"] != "hopeless"):
        some = [abs(row["relative"]) for row in rows if row["part"] == part and not row["condition"] > 1e6]
        yield f"{part:14} {len(some):2} cases, median {statistics.median(some):6.1%}, worst {max(some):6.1%}"


def main() -> None:
    """Measure, print and keep the table."""
    parser = command_line(__doc__, quick="the smallest cases, in a minute")
    parser.add_argument("--only", choices=[*PARTS, *CALIBRATED_PARTS], help="measure one part of the table again")
    parser.add_argument("--calibrated", action="store_true", help="the networks whose setting calibrate chooses")
    parser.add_argument("--output", type=Path, help="the table; cases that this run leaves out stay")
    options = parser.parse_args()
    rows = []
    parts = CALIBRATED_PARTS if options.calibrated else PARTS
    for part, cases in parts.items():
        for case in cases(options.quick) if options.only in {None, part} else ():
            row = measure(case)
            rows.append(row)
            verdict = row["verdict"] + ("" if row["verdict"] == row["meant"] else " (!)")
            print(
                f"{row['part']:14} {row['case']:34} truth {row['truth']:12.3f}  λ̂ {row['estimate']:12.3f} ± "
                f"{row['error']:9.3f}  {row['relative']:+7.1%}  {verdict:16} condition {row['condition']:8.1e}  "
                f"{row['gradients']:7} gradients  {row['seconds']:6.1f} s",
                flush=True,
            )
    print(*summary(rows), sep="\n")
    if rows and not options.quick:
        keep(options.output or (CALIBRATED if options.calibrated else RESULTS), rows, by=("part", "case"))


if __name__ == "__main__":
    main()
