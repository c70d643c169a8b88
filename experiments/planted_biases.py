"""How often is a bias of λ̂ called, and how often is a good estimate accused?

On quadratics everything about a chain is known in closed form, so a setting can be chosen whose λ̂ is off by a given
share for one reason alone: the length of the steps (`SGLD`), the minibatches' noise, the localization, or chains too
short to reach the softer directions, after a burn-in or without one. Each is measured with many seeds; `called` is the
share of them with a verdict other than OK, `right` the share with a verdict that is meant.

Measured with 40 seeds, 21000 and on: of 10, 15 and 25 % by the localization or by steps, and of the 17 to 39 % that
planted noise of as much comes to, all are called, for the reason that is meant; of 0 and 2 % by any of them none. And
with 60 seeds, 8000 to 8029 and 12000 to 12029: of 10 % by few steps 97 %, of 2 % one; with 30 of them, of 15 and 25 %
all, of 0 % none. Without burn-in, of 10 % 20 of 20, of 0 and 2 % none of 60. Curvatures are evenly spread in their
logarithm over a factor 32 here, about as the check takes them to be. Costs half an hour on a core.

    python experiments/planted_biases.py [--seeds 100] [--first-seed 0] [--only REASON] [--quick]
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from command_line import command_line
from scipy.optimize import brentq
from torch import Tensor, nn

import phasewatch as pw
from phasewatch.toy_tasks import deep_linear

NBETA, DIRECTIONS, SAMPLES, BATCH = 100.0, 60, 3000, 60
CURVATURES = torch.logspace(-1.5, 0, DIRECTIONS, dtype=torch.float64)
CHAINS = {"chains": 4, "burn_in": 150, "draws": 450}
SHARES = 0.0, 0.02, 0.1, 0.15, 0.25
KAPPA, GAMMA = 0.3, 0.002
REASONS = "steps", "noise", "localization", "few steps", "no burn-in"
TOO_SHORT = "SHORT DRIFTING UNMIXED CREEPING"


def quadratic(noise: float) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A linear regression with these curvatures at the minimum of its data, whose residuals are of this size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(SAMPLES, DIRECTIONS, generator=generator, dtype=torch.float64)).Q
    x = math.sqrt(SAMPLES) * x * CURVATURES.sqrt()
    signs = torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64).sign()
    residual = signs - x @ torch.linalg.lstsq(x, signs).solution
    model = nn.Linear(DIRECTIONS, 1, bias=False, dtype=torch.float64)
    return model, (x, x @ model.weight.detach().T + noise * residual)


def lacking(eps: float, burn_in: int) -> float:
    """The share of λ̂ that the softer directions lack, on average over the draws of chains that start at 0."""
    steps = torch.arange(burn_in, CHAINS["burn_in"] + CHAINS["draws"], dtype=torch.float64)
    rate = -2 * torch.log1p(-eps * (NBETA * CURVATURES + GAMMA) / 2)
    return float((-rate * steps[:, None]).exp().mean())


def settings(share: float) -> dict[str, tuple[str, pw.Langevin | pw.SGLD, float]]:
    """Reason to the verdicts that are meant, the sampler, and the residuals' size, for a bias of this share."""
    a = NBETA * CURVATURES
    full = {"nbeta": NBETA, "batch_size": None, **CHAINS}
    eps = KAPPA / NBETA

    def solved(bias: Callable[[float], float], low: float, high: float) -> float:
        return low if share <= bias(low) else cast(float, brentq(lambda x: bias(x) - share, low, high))

    overstep = solved(lambda e: float((1 / (1 - e * a / 4)).mean()) - 1, 1e-5 / NBETA, 3 / NBETA)
    short = 0.1 / NBETA
    longer = {"burn_in": 4 * CHAINS["burn_in"], "draws": 4 * CHAINS["draws"]} if overstep < short else {}
    gamma = solved(lambda g: float((g / (a + g)).mean()), GAMMA, 1e4)

    def too_short(burn_in: int, longest: float) -> pw.Langevin:
        most = share <= lacking(longest, burn_in)
        slow = longest if most else cast(float, brentq(lambda e: lacking(e, burn_in) - share, 1e-7, longest))
        steps = {"burn_in": burn_in, "draws": CHAINS["burn_in"] + CHAINS["draws"] - burn_in}
        return pw.Langevin(step_size=slow, localization=GAMMA, momentum=0.0, **(full | steps))

    _, (x, y) = quadratic(1.0)
    size = float((y - x @ torch.linalg.lstsq(x, y).solution).square().mean())
    # λ̂'s excess is ε·nβ²·tr Cov/8, and tr Cov of a minibatch's gradient is tr H · size / batch.
    each = eps * NBETA**2 * float(CURVATURES.sum()) * size / BATCH / 8 / (DIRECTIONS / 2)
    return {
        "steps": ("OVERSTEPPING", pw.SGLD(step_size=max(overstep, short), localization=GAMMA, **(full | longer)), 0.0),
        "noise": (
            "NOISY",
            pw.Langevin(step_size=eps, localization=GAMMA, momentum=0.0, **(full | {"batch_size": BATCH})),
            math.sqrt(share / each),
        ),
        "localization": (
            "LOCALIZED",
            pw.Langevin(step_size=KAPPA / (NBETA + gamma), localization=gamma, momentum=0.9, **full),
            0.0,
        ),
        "few steps": (TOO_SHORT, too_short(CHAINS["burn_in"], eps), 0.0),
        "no burn-in": (TOO_SHORT, too_short(0, 1 / NBETA), 0.0),
    }


def main() -> None:
    """Measure and print a line for each reason and share."""
    parser = command_line(__doc__, quick="5 seeds")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=REASONS, action="append", help="a reason; all if not given")
    options = parser.parse_args()
    seeds = 5 if options.quick else options.seeds
    numbers = range(options.first_seed, options.first_seed + seeds)
    for reason in options.only or REASONS:
        for share in SHARES:
            meant, sampler, noise = settings(share)[reason]
            model, data = quadratic(noise)
            found = [pw.estimate_llc(model, deep_linear.loss, data, sampler=sampler, seed=seed) for seed in numbers]
            verdicts = [estimate.health.name for estimate in found]
            bias = sum(estimate.value for estimate in found) / seeds / (DIRECTIONS / 2) - 1
            print(
                f"{reason:12} planted {share:4.0%}  measured {bias:+6.1%}  "
                f"called {1 - verdicts.count('OK') / seeds:4.0%}  "
                f"right {sum(verdict in meant.split() for verdict in verdicts) / seeds:4.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
