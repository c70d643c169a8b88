"""Labelled curves of a sharp and a smooth score, and the weights of the verdict fitted to them.

    python experiments/verdict_cases.py --out monitor/emergence/verdict.json    # a quarter of an hour on two cores

With `--after monitor/emergence/verdict.json` fewer, other cases mend the weights. The ones kept were fitted to 400
cases of each kind, and then, with `--cases 160`, to those that this file draws now, which have jumps after which all
items are right.

The labels hold by construction. "metric": per-token or per-item scores move gradually, and the sharp score is what its
form makes of them. "model": a part of the model jumps, and both scores show it. "unseen by the smooth score": the sharp
score jumps with something that the smooth one doesn't hold. "none": nothing jumps.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, ndtr

from phasewatch.monitor.emergence.shape import features
from phasewatch.monitor.emergence.verdict import KINDS, expanded

RIDGE = 1e-3
"""The penalty on the squares of the weights; of 0.0003 to 0.01, about the best on cases held back."""

NEAR = 0.03
"""The penalty on the squares of the distances from an earlier fit's weights; of 0.001 to 0.03, the best."""


def gradual(rng: np.random.Generator, z: np.ndarray) -> np.ndarray:
    """A course from 0 to 1 without a jump: a line, the logarithm of one, a wide sigmoid, or a decaying gap."""
    form = rng.integers(4)
    if form == 0:
        return z
    if form == 1:
        course = np.log(rng.uniform(0.03, 0.3) + z)
    elif form == 2:
        course = expit((z - rng.uniform(0.2, 0.8)) / rng.uniform(0.15, 0.4))
    else:
        course = 1 - np.exp(-z * rng.uniform(0.5, 3.0))
    return (course - course[0]) / (course[-1] - course[0])


def sudden(rng: np.random.Generator, z: np.ndarray) -> np.ndarray:
    """A course from 0 to 1 that jumps somewhere inside."""
    return expit((z - rng.uniform(0.2, 0.8)) / rng.uniform(0.003, 0.022))


def observed(rng: np.random.Generator, log_p: np.ndarray, noise: float) -> np.ndarray:
    """A smooth score of a mean log p per token as one of the usual ones: log p, bits, Brier, or p among the choices."""
    form = rng.integers(4)
    noisy = log_p + noise * rng.normal(size=len(log_p))
    if form == 0:
        return np.minimum(noisy, -1e-3)
    if form == 1:
        return np.maximum(-noisy, 1e-3) * rng.uniform(0.2, 1.5)
    if form == 2:
        return (1 - np.exp(np.minimum(noisy, -1e-3))) ** 2
    return np.exp(np.minimum(noisy, -1e-3))


def case(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """One case: positions, the sharp score, the smooth score, and chance."""
    n = int(np.exp(rng.uniform(np.log(8), np.log(200))))
    z = np.linspace(0, 1, n) if rng.random() < 0.6 else np.sort(rng.random(n))
    chance = float(rng.choice([0.0, 0.0, 0.2, 0.25, 0.5]))
    first, last = -rng.uniform(1.5, 8.0), -rng.uniform(0.02, 0.8)
    items = int(np.exp(rng.uniform(np.log(100), np.log(1e5))))
    noise = np.exp(rng.uniform(np.log(1e-4), np.log(0.04))) * (last - first)
    if kind == "metric":
        log_p = first + (last - first) * gradual(rng, z)
        form = rng.integers(3)
        if form == 0:
            log_p = first + (-rng.uniform(0.002, 0.06) - first) * gradual(rng, z)
            level = np.exp(rng.uniform(4, 30) * log_p)
        elif form == 1:
            spread = rng.uniform(0.06, 0.15) * (last - first)
            level = ndtr((log_p - (first + rng.uniform(0.35, 0.75) * (last - first))) / spread)
        else:
            level = np.exp(-((log_p / (rng.uniform(0.2, 0.5) * first)) ** rng.uniform(1.5, 5.0)))
        share = level
    elif kind == "model":
        part = rng.uniform(0.35, 1.0)
        both = part * sudden(rng, z) + (1 - part) * gradual(rng, z)
        log_p = first + (last - first) * both
        form = rng.integers(3)
        if form == 0:
            share = np.exp(rng.uniform(1, 8) * (log_p - last * 0.8))
        elif form == 1:
            share = ndtr((both - rng.uniform(0.4, 0.6)) / rng.uniform(0.1, 0.3))
        else:
            share = both
        share = np.clip(share, 0, 1)
        i = int(np.argmax(np.diff(both)))
        near = np.abs(z - z[i]) < 0.08
        if np.ptp(share[near]) < 0.5 * np.ptp(share):
            share = both  # else the sharp score would rise elsewhere, and not by the model's jump
    elif kind == "none":
        log_p = first + (last - first) * gradual(rng, z) * rng.uniform(0.0, 1.0)
        form = rng.integers(3)
        share = np.zeros(n) if form == 0 else rng.uniform(0.1, 0.9) * gradual(rng, z)
        if form == 2:
            share = np.exp((log_p - log_p.max()) * rng.uniform(0.3, 0.8))
    else:
        log_p = first + (last - first) * gradual(rng, z) * rng.uniform(0.3, 1.0)
        share = sudden(rng, z)
        if rng.random() < 0.7:  # else all items are right after the jump
            share = rng.uniform(0.3, 1.0) * share * (1 - rng.uniform(0, 0.4) * (1 - gradual(rng, z)))
    truth = chance + (1 - chance) * share
    exact = rng.random() < 0.15
    sharp = np.clip(truth, 0, 1) if exact else rng.binomial(items, np.clip(truth, 0, 1)) / items
    return z, sharp, observed(rng, log_p, 0.0 if exact else noise), chance


def table(cases: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of as many cases of each kind, shape (case, feature) and (case,)."""
    rng = np.random.default_rng(seed)
    drawn = [case(rng, kind) for _ in range(cases) for kind in KINDS]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(_features, drawn, chunksize=8))
    return np.array(rows), np.tile(np.arange(len(KINDS)), cases)


def _features(drawn: tuple[np.ndarray, np.ndarray, np.ndarray, float]) -> np.ndarray:
    return features(*drawn)


def fitted(
    x: np.ndarray, labels: np.ndarray, earlier: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, scale and weights of a softmax over the expanded features, near 0 or near those of an earlier fit."""
    centre, scale, start = earlier or (x.mean(axis=0), x.std(axis=0), None)
    z = expanded(x, centre, scale)
    right = np.eye(len(KINDS))[labels]
    origin = np.zeros((len(KINDS), z.shape[1])) if start is None else start
    ridge = RIDGE if start is None else NEAR

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(origin.shape)
        log_p = log_softmax(z @ w.T, axis=1)
        value = -float((right * log_p).sum()) / len(z) + ridge * float(((w - origin) ** 2).sum())
        return value, ((np.exp(log_p) - right).T @ z / len(z) + 2 * ridge * (w - origin)).ravel()

    found = minimize(loss, origin.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return centre, scale, found.x.reshape(origin.shape)


def main() -> None:
    """Fit the weights, and say how right they are on cases held back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases", type=int, default=400, help="of each kind, to fit to; a quarter as many are held back"
    )
    parser.add_argument("--after", type=Path, help="weights of an earlier fit to other cases, to stay near")
    parser.add_argument("--out", type=Path, help="where to write the weights: monitor/emergence/verdict.json")
    options = parser.parse_args()
    x, labels = table(options.cases, seed=0)
    earlier = None
    if options.after:
        fit = json.loads(options.after.read_text(encoding="utf-8"))
        earlier = np.array(fit["centre"]), np.array(fit["scale"]), np.array(fit["weights"])
    centre, scale, weights = fitted(x, labels, earlier)
    other, truth = table(options.cases // 4, seed=1)
    p = np.exp(log_softmax(expanded(other, centre, scale) @ weights.T, axis=1))
    called = p.argmax(axis=1)
    print(f"right on cases held back: {np.mean(called == truth):.3f}")
    for i, kind in enumerate(KINDS):
        mine = truth == i
        print(f"  {kind:28s} right {np.mean(called[mine] == i):.3f}", np.bincount(called[mine], minlength=4))
    sure = p.max(axis=1) >= 0.9
    print(f"called at 90 %: {sure.mean():.2f} of all, right {np.mean((called == truth)[sure]):.3f}")
    if options.out:
        fit = {
            "centre": centre.round(3).tolist(),
            "scale": scale.round(3).tolist(),
            "weights": weights.round(3).tolist(),
        }
        options.out.write_text(json.dumps(fit) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
