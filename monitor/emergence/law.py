"""The emergence law: finetuning on more data moves the loss at which a skill emerges (Snell et al. 2024)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from phasewatch.monitor.emergence.checks import check_chance, check_numbers, check_share
from phasewatch.monitor.emergence.forecast import check_moves
from phasewatch.monitor.emergence.onset import Onset
from phasewatch.monitor.errors import PhasewatchError, real_number

FEWEST_CHECKPOINTS = 5
"""With fewer checkpoints the published fits are off by more than 0.1 nats."""

FEWEST_AMOUNTS = 3
"""With fewer amounts of finetuning data there is no curve of elbows to extend."""

CLEARLY = 2.5
"""An amount shows its elbow if its best score is above chance by this many standard deviations of the noise."""

OUT_OF_REACH = 1.0
"""A 90 % interval wider than this, in nats, says nothing about when; the law then refuses to answer."""

ALPHA_SPREAD = 0.3
"""Prior standard deviation of log(alpha). A smaller one sharpens extrapolations to few examples, and misses curved
laws; chosen by the coverage on simulated laws with alpha from 0.6 to 1.6."""

WALKERS = 96
"""Chains of the sampler, each a set of parameters."""

STEPS = 1200
"""Steps of every chain; the first third is left out. More moves no interval by more than a tenth of its width."""

STUCK = 15.0
"""A walker whose log posterior is this far below the best after a sixth of the steps is in a mode without mass, and
goes on from another's place. Of five parameters, one draw in 10,000 lies there. Steep scores trap some walkers."""


@dataclass(frozen=True)
class EmergenceLaw:
    """A score as a hinge in pretraining loss, whose elbow moves with the logarithm of the finetuning data.

    score = chance + slope * max(elbow - loss, 0), at most 1, with elbow = k * log(amount)**alpha + C. The untuned
    model's point of emergence is the elbow at a few examples.

    Attributes:
        slope: draws of the score per nat, shape (draw,).
        k: draws, in nats, shape (draw,).
        alpha: draws, shape (draw,).
        C: draws, in nats, shape (draw,).
        noise: draws of the standard deviation of a score, shape (draw,).
        chance: the score of a guess.
        losses: the lowest and the highest loss of the checkpoints.
    """

    slope: np.ndarray
    k: np.ndarray
    alpha: np.ndarray
    C: np.ndarray
    noise: np.ndarray
    chance: float
    losses: tuple[float, float]

    @classmethod
    def fit(cls, loss: Any, amount: Any, score: Any, *, chance: float | None = None) -> "EmergenceLaw":
        """Sample the law's posterior, by an ensemble of chains (Goodman & Weare 2010) with a fixed seed.

        Args:
            loss: pretraining loss of each finetuned checkpoint in nats, shape (run,).
            amount: the number of its finetuning examples, above 1, shape (run,).
            score: its score on held-out items, between 0 and 1, shape (run,).
            chance: the score of a guess.

        Returns:
            The law with 5,000 or more draws.

        Raises:
            PhasewatchError: if there are fewer than five checkpoints or three amounts, or too few of them are above
                chance for an elbow to be seen.

        >>> import numpy as np
        >>> loss, amount = (a.ravel() for a in np.meshgrid(np.linspace(3.2, 2.5, 8), [300, 3000, 30_000]))
        >>> elbow = 2.1 + 0.1 * np.log(amount)
        >>> noise = 0.01 * np.random.default_rng(1).normal(size=24)
        >>> law = EmergenceLaw.fit(loss, amount, 0.25 + 0.4 * np.maximum(elbow - loss, 0) + noise, chance=0.25)
        >>> few = law.onset(amount=10)
        >>> bool(few.high < 2.1 + 0.1 * np.log(10) < few.low)  # a loss falls: high is later and smaller
        True
        """
        call = "EmergenceLaw.fit"
        chance = check_chance(call, chance)
        loss = check_numbers(call, "loss", loss, shape=(None,))
        amount = check_numbers(call, "amount", amount, shape=(len(loss),))
        score = check_share(call, "score", check_numbers(call, "score", score, shape=(len(loss),)))
        check_moves(call, score, "score")
        if (amount <= 1).any():
            raise PhasewatchError(f"{call}(amount=...) has {amount.min():g}; the law takes log(amount), so above 1.")
        _check_told(loss, amount, score, chance)
        draws = _sample(_Posterior(loss, np.log(amount), score, chance))
        return cls(*draws, chance=chance, losses=(float(loss.min()), float(loss.max())))

    def onset(self, *, amount: float) -> Onset:
        """The loss at which a model finetuned on so little data leaves chance.

        Args:
            amount: examples; for the untuned model's few-shot score, a number up to ten times that of the shots.

        Returns:
            Median and 90 % interval in nats. `low` is the earlier end, which for a loss is the larger number.

        Raises:
            PhasewatchError: if the interval is wider than a nat, so that the elbow is out of reach of these data.
        """
        log_amount = np.log(real_number("onset(amount=...)", amount, above=1))
        elbow = self.k * log_amount**self.alpha + self.C
        late, median, early = (float(q) for q in np.quantile(elbow, [0.05, 0.5, 0.95]))
        if early - late > OUT_OF_REACH:
            raise PhasewatchError(
                f"onset(amount={amount:g}) lies between losses of {late:.2f} and {early:.2f} with 90 % probability, "
                "which says nothing: the elbow is out of reach. Finetune later checkpoints, or on amounts nearer to "
                "this one."
            )
        return Onset(median, early, late)

    def __str__(self) -> str:
        k, alpha, base, slope = (float(np.median(v)) for v in (self.k, self.alpha, self.C, self.slope))
        return (
            f"The elbow lies at a loss of {base:.3f} + {k:.3g} log(amount)^{alpha:.2f}; below it the score rises by "
            f"{slope:.3f} per nat. Fitted on losses from {self.losses[1]:.2f} to {self.losses[0]:.2f}."
        )


def _check_told(loss: np.ndarray, amount: np.ndarray, score: np.ndarray, chance: float) -> None:
    """Refuse data that can't tell where the elbows are."""
    checkpoints, amounts = len(np.unique(loss)), len(np.unique(amount))
    if checkpoints < FEWEST_CHECKPOINTS:
        raise PhasewatchError(
            f"EmergenceLaw.fit(loss=...) has {checkpoints} checkpoints and takes {FEWEST_CHECKPOINTS}: with fewer, "
            "published fits miss the point of emergence by more than 0.1 nats."
        )
    if amounts < FEWEST_AMOUNTS:
        raise PhasewatchError(
            f"EmergenceLaw.fit(amount=...) has {amounts} amounts of finetuning data and takes {FEWEST_AMOUNTS}: with "
            "fewer, how the elbow moves is a guess."
        )
    bends = [np.diff(score[amount == a][np.argsort(loss[amount == a])], n=2) for a in np.unique(amount)]
    if not np.concatenate(bends).size:
        raise PhasewatchError(
            "EmergenceLaw.fit(amount=...): no amount of data has three checkpoints, so no elbow can be seen. "
            "Finetune the same checkpoints on each amount."
        )
    noise = max(float(np.median(np.abs(np.concatenate(bends)))) / 0.6745 / 6**0.5, 1e-3)
    emerged = [a for a in np.unique(amount) if score[amount == a].max() > chance + CLEARLY * noise]
    if not emerged:
        raise PhasewatchError(
            f"EmergenceLaw.fit(score=...): the scores of {len(emerged)} of {amounts} amounts leave chance "
            f"({chance:g}). The elbow is out of reach: finetune later checkpoints, or on more data."
        )


class _Posterior:
    """The log posterior of (log slope, elbow of the largest amount, log of the elbows' span, log alpha, log noise).

    Priors, weak against five checkpoints: the slope around 0.5 per nat within a factor e; the largest amount's elbow
    within the losses; the elbows' span around 0.3 nats within a factor e; alpha around 1 by `ALPHA_SPREAD`; the noise
    around 0.02 within a factor e.
    """

    def __init__(self, loss: np.ndarray, log_amount: np.ndarray, score: np.ndarray, chance: float) -> None:
        self.loss, self.log_amount, self.score, self.chance = loss, log_amount, score, chance
        self.centre, self.width = float(loss.mean()), max(float(np.ptp(loss)), 0.05)
        self.least, self.most = float(log_amount.min()), float(log_amount.max())

    def start(self, rng: np.random.Generator) -> np.ndarray:
        """Starting points from the prior, shape (walker, parameter): the best of many."""
        z = rng.normal(size=(40 * WALKERS, 5))
        many = np.array([np.log(0.5), self.centre, np.log(0.3), 0.0, np.log(0.02)]) + z * np.array(
            [1.0, self.width / 2, 1.0, ALPHA_SPREAD, 0.7]
        )
        return many[np.argsort(-self(many))[:WALKERS]]

    def elbows(self, free: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """k, alpha and C of parameters, each of shape (walker,)."""
        alpha = np.exp(np.clip(free[:, 3], -3, 1.5))
        k = np.exp(free[:, 2]) / (self.most**alpha - self.least**alpha)
        return k, alpha, free[:, 1] - k * self.most**alpha

    def __call__(self, free: np.ndarray) -> np.ndarray:
        """Shape (walker, parameter) to (walker,)."""
        k, alpha, base = self.elbows(free)
        elbow = k[:, None] * self.log_amount ** alpha[:, None] + base[:, None]
        mean = np.minimum(self.chance + np.exp(free[:, :1]) * np.maximum(elbow - self.loss, 0), 1)
        noise = np.exp(free[:, 4])
        fit = -0.5 * (((self.score - mean) / noise[:, None]) ** 2).sum(axis=1) - len(self.loss) * free[:, 4]
        prior = -0.5 * (
            (free[:, 0] - np.log(0.5)) ** 2
            + ((free[:, 1] - self.centre) / self.width) ** 2
            + (free[:, 2] - np.log(0.3)) ** 2
            + (free[:, 3] / ALPHA_SPREAD) ** 2
            + (free[:, 4] - np.log(0.02)) ** 2
        )
        return fit + prior


def _sample(posterior: _Posterior) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws of slope, k, alpha, C and noise, by the affine-invariant stretch move on two halves of the walkers."""
    rng = np.random.default_rng(0)
    walkers = posterior.start(rng)
    value = posterior(walkers)
    half, count = WALKERS // 2, walkers.shape[1]
    kept = []
    for step in range(STEPS):
        for own in (slice(None, half), slice(half, None)):
            others = walkers[half:] if own.start is None else walkers[:half]
            stretch = (1 + rng.random(half)) ** 2 / 2  # between 1/2 and 2, with density ~ 1 / sqrt(stretch)
            partner = others[rng.integers(half, size=half)]
            proposal = partner + stretch[:, None] * (walkers[own] - partner)
            proposed = posterior(proposal)
            accept = np.log(rng.random(half)) < (count - 1) * np.log(stretch) + proposed - value[own]
            walkers[own] = np.where(accept[:, None], proposal, walkers[own])
            value[own] = np.where(accept, proposed, value[own])
        if step == STEPS // 6:
            stuck = np.flatnonzero(value < value.max() - STUCK)
            there = rng.choice(np.flatnonzero(value >= value.max() - STUCK), size=len(stuck))
            walkers[stuck], value[stuck] = walkers[there], value[there]
        if step >= STEPS // 3 and step % 10 == 0:
            kept.append(walkers.copy())
    draws = np.concatenate(kept)
    k, alpha, base = posterior.elbows(draws)
    return np.exp(draws[:, 0]), k, alpha, base, np.exp(draws[:, 4])
