"""The scores of arXiv 2402.02364 for `toy_tasks.language`, taken once for each set of weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from phasewatch.toy_tasks.english import EnglishData
from phasewatch.toy_tasks.head_scores import attention_to_match, attention_to_previous, tokens_with_one_repeat
from phasewatch.toy_tasks.language import LanguageModel, token_losses

EARLY, LATE = 50, 500
"""The positions whose losses make the in-context score, late minus early; in a short context the same shares of it."""

SIDE = 25
"""Positions to each side of those that count too, so that the score isn't the noise of two tokens."""

AT_ONCE = 8
"""Sequences that are looked at together: the attention of 16 heads over 1,024 tokens takes 0.5 GB."""


@dataclass(eq=False)
class LanguageScores:
    """Scores of a model on fixed tokens.

    `metrics` are for `Probe(metrics=...)`:

    - `icl_score`: the loss around position 500 minus that around position 50 (Olsson et al. 2022).
    - `bigram`: cross-entropy of the model's predictions against the text's bigrams.
    - `trigram_loss`: the loss on tokens that the text's trigrams tell and its bigrams don't.
    - `previous_token` and `prefix_matching`: of the best head, on random tokens; `previous_token_head` and
      `prefix_matching_head` say which, counted through the layers.
    - `k_composition`: of the best pair of heads (Elhage et al. 2021); 0 with one layer.

    Args:
        data: the text.
        tokens: held-out windows, shape (sequence, T); the scores of single tokens are taken on the first
            `sequences`.
        sequences: see `tokens`; also so many of random tokens are taken.

    Attributes:
        by_head: the scores of every head at each step that the metrics were taken at, by name, in nested lists.
    """

    data: EnglishData
    tokens: Tensor
    sequences: int = 32
    by_head: dict[int, dict[str, list[list[float]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._taken: dict[str, float] = {}
        self._weights: Tensor | None = None
        self._of_heads: dict[str, list[list[float]]] = {}
        self._fixed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def metrics(self) -> "dict[str, LanguageMetric]":
        """For `Probe(metrics=...)`, by name."""
        names = ("icl_score", "bigram", "trigram_loss", "previous_token", "prefix_matching", "k_composition")
        return {name: LanguageMetric(self, name) for name in (*names, "previous_token_head", "prefix_matching_head")}

    def score(self, name: str, model: nn.Module, step: int | None) -> float:
        """One of the metrics: taken from the last measurement, if the weights are still those."""
        weights = torch.stack([(p.detach() * p.detach().abs()).sum() for p in model.parameters()]).cpu()
        if self._weights is None or not torch.equal(weights, self._weights):
            self._taken = self.measure(model)
            self._weights = weights
        if step is not None:
            self.by_head[step] = self._of_heads
        return self._taken[name]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """All scores of a model."""
        assert isinstance(model, LanguageModel)
        device = next(model.parameters()).device
        tokens = self.tokens.to(device)
        table, told = self._counted(tokens)
        by_position, bigram, on_told = [], [], []
        for some in tokens.split(AT_ONCE):
            by_position.append(token_losses(model, some))
        losses = torch.cat(by_position)
        for some in tokens[: self.sequences].split(AT_ONCE):
            bigram.append(-(table[some] * model(some).float().log_softmax(-1)).sum(-1).mean())
        on_told = losses[: self.sequences][told[:, 1:]]
        previous, matching = self._heads(model, device)
        composition = k_composition(model)
        self._of_heads = {
            "previous_token": previous.tolist(),
            "prefix_matching": matching.tolist(),
            "k_composition": composition.flatten(0, 1).flatten(1).tolist(),
        }
        at = losses.mean(0)
        return {
            "icl_score": (around(at, LATE) - around(at, EARLY)).item(),
            "bigram": torch.stack(bigram).mean().item(),
            "trigram_loss": on_told.mean().item() if len(on_told) else float("nan"),
            "previous_token": previous.max().item(),
            "prefix_matching": matching.max().item(),
            "k_composition": composition.max().item(),
            "previous_token_head": float(previous.argmax()),
            "prefix_matching_head": float(matching.argmax()),
        }

    def _counted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The text's bigrams, and which of the tokens its trigrams tell; counted once."""
        if tokens.device not in self._fixed:
            told = self.data.told_by_trigrams(tokens[: self.sequences])
            self._fixed[tokens.device] = self.data.bigrams(tokens.device), told
        return self._fixed[tokens.device]

    def _heads(self, model: LanguageModel, device: torch.device) -> tuple[Tensor, Tensor]:
        """Previous-token and prefix-matching scores, each of shape (layer, head)."""
        generator = Generator().manual_seed(0)
        size, context = self.data.vocabulary, self.data.context
        previous = torch.randint(size, (self.sequences, context), generator=generator).to(device)
        repeated = [part[: self.sequences].to(device) for part in tokens_with_one_repeat(size, context)]
        to_previous = [attention_to_previous(model.patterns(some)) for some in previous.split(AT_ONCE)]
        to_match = [
            attention_to_match(model.patterns(some), first, second)
            for some, first, second in zip(*(part.split(AT_ONCE) for part in repeated), strict=True)
        ]
        return _mean(to_previous), _mean(to_match)


@dataclass
class LanguageMetric:
    """One metric of `LanguageScores`.

    Attributes:
        scores: what it is of.
        name: its name.
        step: of the snapshot that it is taken at next, as the probe says before it.
    """

    scores: LanguageScores
    name: str
    step: int | None = None

    def at(self, step: int) -> None:
        """Be told the step of the snapshot that it is taken at next."""
        self.step = step

    def __call__(self, model: nn.Module, _: object) -> float:
        """Its value for a model."""
        return self.scores.score(self.name, model, self.step)


def around(by_position: Tensor, position: int) -> Tensor:
    """The mean loss around a position of a context of 1,024, or around the same share of a shorter one."""
    scale = min(1.0, (len(by_position) + 1) / 1024)
    middle, side = int(position * scale), max(1, int(SIDE * scale))
    return by_position[max(middle - side, 0) : middle + side].mean()


def k_composition(model: LanguageModel) -> Tensor:
    """How much each later head's keys read of what each earlier head writes, as `head_scores.k_composition_scores`.

    Args:
        model: any.

    Returns:
        Shape (layer, head, layer, head), the earlier head first; 0 where it isn't in an earlier layer.
    """
    gains, q, k, v, o = [], [], [], [], []
    for block in model.layers:
        attention = block.attention
        count = attention.num_heads
        gains.append(block.norm.weight.detach())
        for to, projection in ((q, attention.q_proj), (k, attention.k_proj), (v, attention.v_proj)):
            to.append(projection.weight.detach().unflatten(0, (count, -1)).mT)  # head, width, head size
        o.append(attention.o_proj.weight.detach().unflatten(1, (count, -1)).permute(1, 2, 0))
    gain = torch.stack(gains)[:, None, :, None]
    q, k, v, o = (torch.stack(some) for some in (q, k, v, o))
    ov = gain * v @ o
    qk = gain * q @ (gain * k).mT
    products = (qk.flatten(0, 1) @ ov.flatten(0, 1).mT.unsqueeze(1)).norm(dim=(-2, -1))  # (earlier, later)
    products = products.view(*ov.shape[:2], *qk.shape[:2])
    sizes = torch.einsum("lh,mg->lhmg", ov.norm(dim=(-2, -1)), qk.norm(dim=(-2, -1)))
    layers = torch.arange(len(ov), device=ov.device)
    return products / sizes * (layers[:, None] < layers)[:, None, :, None]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean(0)
