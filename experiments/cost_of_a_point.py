"""What wins gradients for an error of λ̂, and what doesn't: chains on a toy task, one change at a time.

In-context regression at width 32 after 2,000 steps, nβ 71 and γ 60, minibatches of its endless data. A row is sampled
by 6 chains from w*, and says after how many steps λ̂ is within 5 % of its level (`settled`), how many draws are
worth an independent one (`2τ`), the standard deviation of a draw over λ̂, and what follows from these: the gradients
of all chains for a standard error of 2 % (their number chosen, Student's factor included), and the samples that go
through them. `heat` is what the minibatches' noise adds, ε·nβ²·tr Cov/8·(1 + a)/(1 − a) over λ̂.

Measured, one seed (results/cost_of_a_point.md), where λ̂'s level is 93:
- Momentum wins. At 0.9 chains settle in 40 steps, and 742 gradients have the error. Without it, they are at 69 after
  240 steps and still rise, so that their 1,944 to 2,382 gradients are too few. At one size of minibatch that saves
  samples too, 190,000 of 610,000; against minibatches of 64, it costs some.
- Momentum multiplies the minibatches' heat: at 0.95 it is 4 % with minibatches of 256, and 17 % with 64 by the same
  rule. Hence the larger minibatches that `calibrate` takes.
- A constant preconditioner from the Hessian's diagonal at w* takes λ̂ to 79 to 81 in 240 steps, and beside momentum
  saves a sixth of the gradients, less than the diagonal costs. `calibrate` has none.
- nβ and γ ten times as large is the same walk in a smaller region, where λ̂ is lower and the noise is larger: it loses.
- What `calibrate` makes of it on whole curves: experiments/cost_of_a_curve.py. Before, it took 3,123 gradients a point
  for λ̂ 20, 26, 19 at steps 200, 1,500 and 6,800.
- Stochastic Lanczos gives 999: many small curvatures at w* are negative, which no chain near w* feels. It is neither λ̂
  nor a control variate for it, and one probe vector costs 60 gradients.

Costs about a quarter of an hour on a core.

    python experiments/cost_of_a_point.py [--quick] [--output experiments/results/cost_of_a_point.md]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from bench_llc import target_of
from command_line import command_line
from tables import markdown
from torch import Generator, Tensor

from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.weights import SampledModel, Weights
from phasewatch.monitor.probing.lengths import student
from phasewatch.monitor.sampling.steps import baoab_step
from phasewatch.toy_tasks import in_context_regression as regression

NBETA, GAMMA, KAPPA, CHAINS, ERROR = 71.0, 60.0, 0.5, 6, 0.02
REACH = 0.02
"""Length over which Hessian products are taken by differences of gradients."""


@dataclass(frozen=True)
class Way:
    """A candidate: its name, samples in a minibatch, momentum, how often nβ is multiplied, and its preconditioner."""

    name: str
    batch: int
    momentum: float = 0.0
    larger: float = 1.0
    scale: str = "none"
    steps: int = 120


WAYS = [
    Way("as before", 64, steps=240),
    Way("larger minibatches", 256, steps=240),
    Way("nβ and γ 10 times", 256, larger=10.0, steps=240),
    Way("momentum 0.66", 64, 0.66),
    Way("momentum 0.8", 256, 0.8),
    Way("momentum 0.9", 256, 0.9),
    Way("momentum 0.95", 256, 0.95),
    Way("a scale for each tensor", 256, scale="tensor", steps=240),
    Way("a scale for each row", 256, scale="row", steps=240),
    Way("a scale for each weight", 256, scale="weight", steps=240),
    Way("momentum 0.9, a scale for each weight", 256, 0.9, scale="weight"),
]


class Surface:
    """The task's loss around a snapshot, on kept minibatches of some size."""

    def __init__(self, model: torch.nn.Module, batch: int, minibatches: int = 32) -> None:
        generator = Generator().manual_seed(1)
        data = regression.RegressionData()
        kept = Batches([data(generator, batch) for _ in range(minibatches)], whole=False)
        sampled = SampledModel(model)
        self.target: LossOnBatches = target_of(sampled, regression.loss, kept)
        self.anchor: Weights = [weight.detach().clone() for weight in sampled.weights()]
        self.reference = self.target.rows(self.anchor, torch.arange(minibatches)).detach()

    def gradients(self, rows: Weights, which: Tensor) -> tuple[Tensor, Weights]:
        """Losses of shape (row,) and gradients, each of shape (row, ...)."""
        losses, grads = self.target.rows_and_gradients(rows, which)
        return losses.detach(), [grad.detach() for grad in grads]

    def product(self, v: Weights, number: int) -> Weights:
        """The Hessian at w* times a vector, on a minibatch."""
        reach = REACH / length(v)
        ends = [
            self.gradients([(w + sign * reach * x)[None] for w, x in zip(self.anchor, v, strict=True)], which)[1]
            for sign, which in ((1, torch.tensor([number])), (-1, torch.tensor([number])))
        ]
        return [(there - back)[0] / (2 * reach) for there, back in zip(*ends, strict=True)]

    def noise(self) -> float:
        """The trace of the covariance of a minibatch's gradient at w*."""
        grads = [self.gradients([w[None] for w in self.anchor], torch.tensor([i]))[1] for i in range(8)]
        return sum(float(torch.stack(each).var(0).sum()) for each in zip(*grads, strict=True))

    def diagonal(self) -> Weights:
        """The Hessian's diagonal at w*, by 24 products with random signs (Bekas et al. 2007)."""
        generator, total = Generator().manual_seed(2), [torch.zeros_like(w) for w in self.anchor]
        for number in range(24):
            signs = [torch.randint(2, w.shape, generator=generator).to(w) * 2 - 1 for w in self.anchor]
            for entry, sign, product in zip(total, signs, self.product(signs, number), strict=True):
                entry += sign * product / 24
        return total


def length(v: Weights) -> float:
    """Euclidean."""
    return math.sqrt(sum(float(x.square().sum()) for x in v))


def scales(surface: Surface, way: Way) -> Weights:
    """The square root of the preconditioner of each weight."""
    if way.scale == "none":
        return [torch.ones_like(w) for w in surface.anchor]
    average: Callable[[Tensor], Tensor] = {
        "tensor": lambda h: h.mean().expand_as(h),
        "row": lambda h: h.flatten(1).mean(1).view(-1, *[1] * (h.ndim - 1)).expand_as(h) if h.ndim > 1 else h,
        "weight": lambda h: h,
    }[way.scale]
    return [(NBETA * average(h).clamp_min(0) + GAMMA).rsqrt() for h in surface.diagonal()]


def sample(surface: Surface, way: Way, steps: int) -> tuple[np.ndarray, float]:
    """nβ·(L_m(w) − L_m(w*)) along the chains, shape (chain, step), and what noise adds."""
    nbeta, gamma, scale = NBETA * way.larger, GAMMA * way.larger, scales(surface, way)
    v = [torch.randn(w.shape, generator=Generator().manual_seed(i)) for i, w in enumerate(surface.anchor)]
    stiffness = 0.0
    for number in range(10):
        u = [s * x / length(v) for s, x in zip(scale, v, strict=True)]
        v = [
            s * (nbeta * h + gamma * x)
            for s, h, x in zip(scale, surface.product(u, number), u, strict=True)
        ]  # fmt: skip
        stiffness = length(v)
    eps = [KAPPA / stiffness * s.square() for s in scale]
    generator = Generator().manual_seed(3)

    def draw() -> Weights:
        return [torch.randn(CHAINS, *w.shape, generator=generator) for w in surface.anchor]

    velocity = draw()
    w = [a + e.sqrt() / 2 * p for a, e, p in zip(surface.anchor, eps, velocity, strict=True)]
    trace = []
    for _ in range(steps):
        which = torch.randint(surface.target.minibatches, (CHAINS,), generator=generator)
        losses, grads = surface.gradients(w, which)
        trace.append(nbeta * (losses - surface.reference[which]))
        for k, noise in enumerate(draw()):
            w[k], velocity[k] = baoab_step(
                w[k], velocity[k], surface.anchor[k], grads[k], noise,
                nbeta=nbeta, gamma=gamma, eps=eps[k], momentum=way.momentum,
            )  # fmt: skip
    heat = KAPPA / stiffness * nbeta**2 * surface.noise() / 8 * (1 + way.momentum) / (1 - way.momentum)
    return torch.stack(trace, 1).double().numpy(), heat if way.scale == "none" else math.nan


def correlated(draws: np.ndarray) -> float:
    """2τ, how many draws are worth an independent one: Geyer's initial sequence, chains pooled."""
    around = draws - draws.mean(0)
    count = draws.shape[1]
    spectrum = np.fft.rfft(around, 2 * count, axis=1)
    rho = np.fft.irfft(spectrum * spectrum.conj(), axis=1)[:, :count].mean(0) / np.arange(count, 0, -1)
    rho /= rho[0]
    total = 1.0
    for k in range(1, count - 1, 2):
        if rho[k] + rho[k + 1] < 0:
            break
        total += 2 * float(rho[k] + rho[k + 1])
    return total


def row(name: str, way: Way, trace: np.ndarray, heat: float) -> dict[str, object]:
    """A line of the table."""
    late = trace[:, trace.shape[1] // 2 :]
    level, deviation, apart = float(late.mean()), float(late.std()), correlated(late)
    mean = np.convolve(trace.mean(0), np.ones(10) / 10, "valid")
    settled = int(np.argmax(mean > 0.95 * level)) + 5
    gradients, chains, draws = min(
        (chains * (settled + draws), chains, draws)
        for chains in range(2, 33)
        for draws in [max(10, math.ceil((deviation * student(chains) / ERROR / level) ** 2 * apart / chains))]
    )
    heated = "" if math.isnan(heat) else f"{heat / level:.1%}"
    return {
        "way": name, "minibatch": way.batch, "λ̂": f"{level:.1f}", "heat / λ̂": heated,
        "settled": settled, "deviation / λ̂": f"{deviation / level:.2f}", "2τ": f"{apart:.1f}",
        "chains × (burn-in + draws)": f"{chains} × ({settled} + {draws})", "gradients for 2 %": gradients,
        "samples, thousands": round(gradients * way.batch / 1000),
    }  # fmt: skip


def lanczos(surface: Surface, probes: int, products: int) -> tuple[float, float]:
    """λ̂ of the Hessian, ½ tr nβH(nβH + γ)⁻¹, by stochastic Lanczos quadrature, and its deviation between probes.

    Ubaru, Chen & Saad (2017).
    """
    found, sizes = [], [w.numel() for w in surface.anchor]
    size = sum(sizes)
    for probe in range(probes):
        signs = torch.randint(2, (size,), generator=Generator().manual_seed(100 + probe)).float() * 2 - 1
        basis, alphas, betas = [signs / math.sqrt(size)], [], []
        while len(alphas) < products:
            parts = zip(basis[-1].split(sizes), surface.anchor, strict=True)
            r = torch.cat([x.flatten() for x in surface.product([p.view_as(w) for p, w in parts], 0)])
            alphas.append(float(r @ basis[-1]))
            for other in (*basis, *basis):  # once leaves what rounding brings back
                r -= (r @ other) * other
            betas.append(float(r.norm()))
            basis.append(r / betas[-1])
        off = betas[:-1]
        values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(off, 1) + np.diag(off, -1))
        stiff = NBETA * values.clip(min=0)
        found.append(size / 2 * float((vectors[0] ** 2 * stiff / (stiff + GAMMA)).sum()))
    return float(np.mean(found)), float(np.std(found, ddof=1))


def main() -> None:
    """Train, sample, and print the table."""
    parser = command_line(__doc__, quick="a few steps of everything")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cost_of_a_point.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = regression.RegressionTransformer(width=32)
    for _ in islice(regression.training(model, regression.RegressionData()), 3 if options.quick else 2000):
        pass
    surfaces = {batch: Surface(model, batch) for batch in {way.batch for way in WAYS}}
    rows = []
    for way in WAYS:
        trace, heat = sample(surfaces[way.batch], way, 30 if options.quick else way.steps)
        rows.append(row(way.name, way, trace, heat))
        print(*rows[-1].values(), sep=" | ", flush=True)
    probes, products = (2, 3) if options.quick else (4, 30)
    level, deviation = lanczos(surfaces[256], probes, products)
    needed = math.ceil((deviation / ERROR / level) ** 2)
    rows.append(
        dict.fromkeys(rows[0], "")
        | {"way": f"Lanczos at w*, {products} products", "minibatch": 256, "λ̂": f"{level:.1f}"}
        | {"deviation / λ̂": f"{deviation / level:.2f}", "gradients for 2 %": 2 * products * needed}
        | {"samples, thousands": round(2 * products * needed * 256 / 1000)}
    )
    print(*rows[-1].values(), sep=" | ")
    if not options.quick:
        lines = ["# Output of `python experiments/cost_of_a_point.py`", "", *markdown(rows), ""]
        options.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
