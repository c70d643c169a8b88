"""Does devinterp get the same λ̂ with the same settings, and which of its samplers sample what they say?

The first table runs devinterp's samplers on quadratics, where the stationary mean of nβ·(L − L*) is known: for SGLD
exactly, with its step size; for any sampler, ½ a weight in the limit of small steps. Claims: `SGMCMC.sgld` has the
exact value. `SGMCMC.rmsprop_sgld` goes away from ½ as its steps shrink: its preconditioner follows the gradient of
where it stands, and the term that corrects for that isn't implemented. `SGMCMC.sgnht` samples at a temperature of twice
its `diffusion_factor`. `SGMCMC.sgld` has two limits of its own: a weight whose gradient is None stays where it is, and
small steps are lost in weights of half precision.

The second table has λ̂ by our chains, by devinterp's optimizer with noise of its own, and by `devinterp.slt.llc.llc`
with its burn-in cut off and as it comes. Claim: the first three agree within their errors. For `llc()` to be
comparable, the burn-in must be cut from its `loss_trace`, since it averages it in; L(w*) must be taken on the
minibatches that the chains go through, so `num_init_loss_batches`, the burn-in and the draws are whole numbers of
epochs; and there must be no dropout, since it samples in training mode. It takes token ids alone, so other models are
given to it as a loss of sample numbers. Costs about three minutes on one core.

    python experiments/second_opinion.py [--quick]
"""

import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from command_line import command_line
from devinterp.optim import SGMCMC
from torch import Tensor, nn
from torch.nn import functional as F

from phasewatch.monitor.model.copying import own_copy
from phasewatch.monitor.model.isolation import untouched_randomness
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.weights import SampledModel
from phasewatch.monitor.probing.second_opinion import run_devinterp_chains
from phasewatch.monitor.sampling.chains import run_chains
from phasewatch.monitor.sampling.settings import SGLD
from phasewatch.toy_tasks.induction import make_model, token_losses


def stationary(optimizer: Callable[[list[Tensor]], SGMCMC], kappa: float, dtype: torch.dtype = torch.float32) -> float:
    """nβ·E[L − L*] of each of 2,000 weights with L = ½ Σ h·(w − 1)², h = 0.5, nβ = 40, no localization."""
    h, nbeta, weights = 0.5, 40.0, 2000
    generator = torch.Generator().manual_seed(0)
    w = (1 + torch.randn(weights, generator=generator) / math.sqrt(nbeta * h)).to(dtype)
    chains, total, steps = optimizer([w]), 0.0, round(30 / kappa)
    for step in range(2 * steps):
        if step >= steps:
            total += nbeta * h * (w.float() - 1).square().mean().item() / 2
        w.grad = h * (w - 1)
        chains.step(noise_generator=generator)
    return total / steps


def print_samplers(kappas: list[float]) -> None:
    """A line for each sampler and step size κ = ε·nβ·h, with ε times the preconditioner's typical value."""
    h, nbeta = 0.5, 40.0
    typical = h / math.sqrt(nbeta * h)  # of a gradient

    def rmsprop(eps: float) -> Callable[[float], Callable[[list[Tensor]], SGMCMC]]:
        scale = 1 / (typical + eps)
        return lambda kappa: lambda w: SGMCMC.rmsprop_sgld(w, lr=kappa / (nbeta * h * scale), nbeta=nbeta, eps=eps)

    samplers: dict[str, Callable[[float], Callable[[list[Tensor]], SGMCMC]]] = {
        "sgld": lambda kappa: lambda w: SGMCMC.sgld(w, lr=kappa / (nbeta * h), nbeta=nbeta),
        "rmsprop_sgld(eps=0.1)": rmsprop(0.1),
        "rmsprop_sgld(eps=0.001)": rmsprop(0.001),
        "sgnht(diffusion_factor=0.01)": lambda kappa: lambda w: SGMCMC.sgnht(w, lr=kappa / (nbeta * h), nbeta=nbeta),
    }
    print("nβ·E[L − L*] of a weight on quadratics: 0.5 for small steps")
    print(f"{'':30}" + "".join(f"  κ = {kappa:<6g}" for kappa in kappas))
    print(f"{'SGLD, exactly':30}" + "".join(f"  {0.5 / (1 - kappa / 4):<10.3f}" for kappa in kappas))
    for name, at in samplers.items():
        print(f"{name:30}" + "".join(f"  {stationary(at(kappa), kappa):<10.3f}" for kappa in kappas), flush=True)
    found = [stationary(samplers["sgld"](kappa), kappa, torch.bfloat16) for kappa in kappas]
    print(f"{'sgld of bfloat16 weights':30}" + "".join(f"  {value:<10.3f}" for value in found))
    w = torch.ones(3)
    SGMCMC.sgld([w], nbeta=nbeta, localization=1.0).step()
    print(f"sgld of weights without a gradient: {'still' if (w == 1).all() else 'moved'} after a step\n")


@dataclass(frozen=True)
class Case:
    """A model at w*, its loss as `llc()` takes it, and λ̂'s exact expectation where there is one."""

    name: str
    model: nn.Module
    losses: Callable[[nn.Module, Tensor], Tensor]
    """Of token ids of shape (sequence, token), or sample numbers of shape (sample, 2); shape (sample, token − 1)."""
    ids: Tensor
    sampler: SGLD
    truth: float = math.nan


def stationary_mean(curvatures: Tensor, sampler: SGLD) -> float:
    """½ Σ nβ·h / (a·(1 − ε·a/4)), a = nβ·h + γ: exact for SGLD on a quadratic without minibatch noise."""
    pulled = sampler.nbeta * curvatures
    a = pulled + sampler.localization
    return (pulled / (a * (1 - cast(float, sampler.step_size) * a / 4))).sum().item() / 2


def numbered(samples: int) -> Tensor:
    """Sample numbers as `llc()` takes token ids, which must come in twos or more."""
    return torch.arange(samples)[:, None].repeat(1, 2)


def squared_error(x: Tensor, y: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    """Half the squared error of each numbered sample."""
    return lambda model, ids: (model(x[ids[:, 0]]) - y[ids[:, 0]]).square().sum(-1, keepdim=True) / 2


def quadratic(steps: dict[str, Any]) -> Case:
    """100 weights and their curvatures."""
    sampler = SGLD(step_size=2e-3, localization=10.0, nbeta=100.0, batch_size=1, **steps)
    h, model = torch.linspace(0.5, 5.0, 100), nn.Linear(100, 1, bias=False)
    centre = model.weight.detach().clone()

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        away = cast(nn.Linear, model).weight - centre
        return (h * away.square()).sum() / 2 + torch.zeros(len(ids), 1)

    return Case("quadratic, 100 weights", model, losses, numbered(1), sampler, stationary_mean(h, sampler))


def regression(steps: dict[str, Any]) -> Case:
    """Linear regression on all of its noisy data at once, at the least squares."""
    sampler = SGLD(step_size=2e-3, localization=5.0, nbeta=100.0, batch_size=256, **steps)
    x, model = torch.randn(256, 50), nn.Linear(50, 1, bias=False)
    y = x.sum(-1, keepdim=True) + torch.randn(256, 1)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.mT)
    truth = stationary_mean(torch.linalg.eigvalsh(x.mT @ x / 256), sampler)
    return Case("linear regression, 50 weights", model, squared_error(x, y), numbered(256), sampler, truth)


def deep_linear(steps: dict[str, Any]) -> Case:
    """Widths (5, 3, 5) at the most singular product of rank 1."""
    sampler = SGLD(step_size=1e-3, localization=5.0, nbeta=100.0, batch_size=64, **steps)
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 5, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()[0, 0] = 1
    x = torch.randn(256, 5)
    return Case("deep linear (5, 3, 5)", model, squared_error(x, model(x).detach()), numbered(256), sampler)


def perceptron(steps: dict[str, Any]) -> Case:
    """A perceptron on data of its own making."""
    sampler = SGLD(step_size=1e-3, localization=5.0, nbeta=100.0, batch_size=64, **steps)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(256, 8)
    return Case("perceptron (8, 16, 4)", model, squared_error(x, model(x).detach()), numbered(256), sampler)


def bigrams(vocabulary: int, sequences: int, length: int) -> Tensor:
    """Sequences of one random Markov chain."""
    rows = torch.softmax(2 * torch.randn(vocabulary, vocabulary), dim=-1)
    tokens = torch.randint(vocabulary, (sequences, 1))
    for _ in range(length - 1):
        tokens = torch.cat([tokens, torch.multinomial(rows[tokens[:, -1]], 1)], dim=1)
    return tokens


def train(model: nn.Module, losses: Callable[[nn.Module, Tensor], Tensor], ids: Tensor) -> None:
    """Adam on all of the data, until next to nothing changes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=500)
    for _ in range(500):
        optimizer.zero_grad()
        losses(model, ids).mean().backward()
        optimizer.step()
        schedule.step()
    model.zero_grad()


def gpt2(steps: dict[str, Any]) -> Case:
    """GPT-2 of one layer, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sampler = SGLD(step_size=1e-4, localization=100.0, nbeta=100.0, batch_size=16, **steps)
    config = GPT2Config(
        vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)

    def losses(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")

    tokens = bigrams(8, 64, 8)
    train(model, losses, tokens)
    return Case("GPT-2, 1 layer", model, losses, tokens, sampler)


def attention(steps: dict[str, Any]) -> Case:
    """An attention-only model of TransformerLens."""
    sampler = SGLD(step_size=3e-4, localization=50.0, nbeta=100.0, batch_size=16, **steps)
    model = make_model(3, heads=2, width=8, vocabulary=8, context=8)
    tokens = bigrams(8, 64, 8)
    train(model, token_losses, tokens)
    return Case("attention only, 2 layers", model, token_losses, tokens, sampler)


def value_and_error(per_chain: np.ndarray) -> tuple[float, float]:
    """The mean over chains and its standard error."""
    return float(per_chain.mean()), float(per_chain.std(ddof=1) / math.sqrt(len(per_chain)))


def by_llc(case: Case, batches: int) -> tuple[np.ndarray, np.ndarray]:
    """λ̂ of each chain by `llc()`, its burn-in left out and as it comes."""
    from datasets import Dataset
    from devinterp.slt.llc import llc

    sampler = case.sampler
    with untouched_randomness(0), tempfile.TemporaryDirectory() as folder:  # it seeds the global streams
        found: Any = llc(
            own_copy(case.model),  # without its hooks, since it can't copy a TransformerBridge that has them
            Dataset.from_dict({"input_ids": case.ids.tolist()}).with_format("torch"),
            {},
            lr=cast(float, sampler.step_size),
            n_beta=sampler.nbeta,
            localization=sampler.localization,
            num_chains=sampler.chains,
            num_draws=sampler.draws,
            num_burnin_steps=sampler.burn_in,
            batch_size=sampler.batch_size,
            num_init_loss_batches=batches,
            shuffle=False,
            device="cpu",
            loss_fn=case.losses,
            output_path=Path(folder) / "samples",
        ).load()
    settled = found.loss_trace.values[:, sampler.burn_in :].astype(float).mean(axis=1)
    return sampler.nbeta * (settled - found.init_loss.item()), found.llc_per_chain.values


def print_case(case: Case) -> None:
    """A line of the second table."""
    sampler = case.sampler
    pool = Batches(case.ids.split(sampler.batch_size))
    model = SampledModel(own_copy(case.model))
    target, anchor = (
        LossOnBatches(ModelLoss(model, lambda model, ids: case.losses(model, ids).mean()), pool),
        model.weights(),
    )

    def per_chain(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return sampler.nbeta * (losses - reference).mean(axis=1)

    (chains,) = run_chains(target, [anchor], sampler, seed=1)
    ours = per_chain(chains.losses, chains.reference)
    through = per_chain(*run_devinterp_chains(target, anchor, sampler, seed=2))
    settled, as_it_comes = by_llc(case, len(pool))
    row = [value_and_error(found) for found in (ours, through, settled, as_it_comes)]
    cells = "".join(f"{value:8.2f} ± {error:<5.2f}" for value, error in row)
    apart = [(row[i][0] - row[0][0]) / math.hypot(row[i][1], row[0][1]) for i in (1, 2)]
    truth = "" if math.isnan(case.truth) else f"{case.truth:.2f}"
    print(f"{case.name:30}{truth:>8}{cells}{apart[0]:7.1f}{apart[1]:7.1f}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = command_line(__doc__, quick="fewer chains, and no small steps in the first table")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", message="There is a performance drop")
    torch.manual_seed(0)
    print_samplers([1.0, 0.1] if quick else [1.0, 0.1, 0.01, 0.001])
    titles = "ours", "its optimizer", "llc, settled", "llc as it is"
    print(f"{'λ̂ by':31}{'exactly':>8}" + "".join(f"{title:>16}" for title in titles) + "  standard errors from ours")
    steps = {"chains": 4 if quick else 20, "draws": 200, "burn_in": 100}
    for make in (quadratic, regression, deep_linear, perceptron, gpt2, attention):
        torch.manual_seed(0)
        print_case(make(steps))


if __name__ == "__main__":
    main()
