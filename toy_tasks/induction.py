"""Induction: a transformer that learns to repeat what followed a token before in its sequence (Olsson et al. 2022).

Tokens follow a fixed table of bigrams, except after the trigger tokens of a sequence, each of which is followed by one
and the same token all through that sequence (as in Bietti et al. 2023). Two layers of attention learn it in stages of
the order that arXiv 2402.02364 finds in natural text: the bigrams, then previous-token heads and induction heads that
compose them, which one layer can't.

Measured with the defaults and `training` (experiments/smooth_curves.py): the loss is 2.25 at step 700, about what the
bigrams give, and 1.91 at 1,300, while the best previous-token head goes from 0.12 to 0.66 and the best prefix-matching
head from 0.06 to 0.60; by step 2,800 the loss is 1.84. λ̂ rises by 55 % over that fall, a transition of type A, half of
it by step 900: it is 110, 139, 171, 170 and 162 at steps 700, 900, 1,300, 2,000 and 2,800. Whether its slow fall
afterwards is a type B is not known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Metric = Callable[[nn.Module, Tensor], float]

PROBE_SEQUENCES = 64
"""Fixed sequences that attention is looked at on."""


@dataclass(frozen=True)
class InductionData:
    """Sequences of bigrams in which a few trigger tokens are always followed by the same token.

    Called as `data(generator, batch_size)`, it returns tokens of shape (batch, context). A sequence draws its triggers
    without replacement, and for each of them, uniformly, the token that follows it. That may be a trigger again, or
    the same one: with the defaults one sequence in seven ends in such a circle.

    Attributes:
        vocabulary: V, the number of tokens.
        context: T, the length of a sequence.
        triggers: trigger tokens of a sequence, at most V.
        table_seed: of the table of bigrams.
    """

    vocabulary: int = 32
    context: int = 48
    triggers: int = 8
    table_seed: int = 0

    @cached_property
    def table(self) -> Tensor:
        """Probabilities of the next token, a row for each token: softmax(2·N(0, 1)), shape (V, V)."""
        generator = Generator().manual_seed(self.table_seed)
        return (2 * torch.randn(self.vocabulary, self.vocabulary, generator=generator)).softmax(-1)

    def __call__(self, generator: Generator, batch_size: int) -> Tensor:
        """Draw a batch on the generator's device."""
        device = generator.device

        def token(*shape: int) -> Tensor:
            return torch.randint(self.vocabulary, shape, generator=generator, device=device)

        shuffled = torch.rand(batch_size, self.vocabulary, generator=generator, device=device).argsort(-1)
        triggers = shuffled[:, : self.triggers]
        follower = torch.full_like(shuffled, -1).scatter(-1, triggers, token(*triggers.shape))
        thresholds = self.table.to(device).cumsum(-1)[:, :-1].contiguous()  # the last is 1, but for rounding
        uniform = torch.rand(self.context, batch_size, 1, generator=generator, device=device)
        tokens = [token(batch_size)]
        for u in uniform[1:]:
            last = tokens[-1]
            fixed = follower.gather(-1, last.unsqueeze(-1)).squeeze(-1)
            bigram = (u > thresholds[last]).sum(-1)
            tokens.append(torch.where(fixed < 0, bigram, fixed))
        return torch.stack(tokens, dim=-1)


def make_model(
    seed: int = 0, *, layers: int = 2, heads: int = 4, width: int = 64, vocabulary: int = 32, context: int = 48
) -> nn.Module:
    """An attention-only transformer with layer norm: a `TransformerBridge`, 40,832 parameters with the defaults.

    Args:
        seed: of its initialisation; torch's own stream is left alone.
        layers: of attention. One can't form induction heads.
        heads: in a layer; must divide `width`.
        width: of the residual stream.
        vocabulary: V, the number of tokens.
        context: T, the longest sequence.

    Returns:
        A model from tokens of shape (batch, position) to logits of shape (batch, position, V), whose attention is at
        the hook points `blocks.0.attn.hook_pattern` and so on.

    Raises:
        ValueError: if the heads don't divide the width.
    """
    if width % heads:
        raise ValueError(f"make_model(width={width}, heads={heads}): the heads must divide the width.")
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(  # pyright: ignore[reportAttributeAccessIssue]
        TransformerBridgeConfig(
            n_layers=layers,
            d_model=width,
            n_ctx=context,
            d_head=width // heads,
            n_heads=heads,
            d_vocab=vocabulary,
            act_fn="relu",
            attn_only=True,
            normalization_type="LN",
            seed=seed,
            architecture="TransformerLensNative",
        )
    )


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token, shape (batch, T − 1)."""
    return F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    return token_losses(model, batch).mean()


def training(model: nn.Module, data: InductionData, *, seed: int = 0) -> Iterator[int]:
    """Train a model in place: AdamW, learning rate 1e-3, weight decay 0.01, batch 64.

    Args:
        model: such as `make_model` builds.
        data: where the batches are drawn from.
        seed: of the batches.

    Yields:
        The number of steps taken so far, after each of them, without end.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    generator = Generator().manual_seed(seed)
    for step in count(1):
        optimizer.zero_grad()
        loss(model, data(generator, 64)).backward()
        optimizer.step()
        yield step


def icl_score(model: nn.Module, batch: Tensor) -> float:
    """In-context learning score (Olsson et al. 2022): late loss minus early loss, a quarter of the positions each.

    More negative is more learning.
    """
    by_position = token_losses(model, batch).mean(0)
    quarter = max(len(by_position) // 4, 1)
    return (by_position[-quarter:].mean() - by_position[:quarter].mean()).item()


def bigram_cross_entropy(table: Tensor) -> Metric:
    """A metric: cross-entropy of the model's predictions against the table's, however the sequence goes on.

    Args:
        table: probabilities of the next token, shape (V, V).

    Returns:
        The metric; its least value is the entropy of the table's rows, and it rises again as predictions come to
        depend on the context.
    """

    def cross_entropy_of_bigrams(model: nn.Module, batch: Tensor) -> float:
        predicted = model(batch).log_softmax(-1)
        return -(table.to(batch.device)[batch] * predicted).sum(-1).mean().item()

    return cross_entropy_of_bigrams


def attention_patterns(model: nn.Module, tokens: Tensor) -> Tensor:
    """Attention of every head, shape (layer, head, batch, position, position): from the last but one axis to the last.

    Args:
        model: with hook points `blocks.N.attn.hook_pattern`.
        tokens: shape (batch, position).

    Returns:
        The patterns.
    """
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("attn.hook_pattern"))  # pyright: ignore
    return torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(len(cache))]).transpose(1, 2)


def attention_to_previous(patterns: Tensor) -> Tensor:
    """Mean attention from each position to the one before it.

    Args:
        patterns: shape (..., batch, position, position).

    Returns:
        Scores of shape (...), 0 to 1.
    """
    return patterns.diagonal(-1, dim1=-2, dim2=-1).mean((-2, -1))


def attention_to_match(patterns: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Mean attention from a token's second occurrence to the token after its first.

    Args:
        patterns: shape (..., batch, position, position).
        first: where the token stands first in each sequence, shape (batch,).
        second: where it stands again, shape (batch,).

    Returns:
        Scores of shape (...), 0 to 1.
    """
    sequence = torch.arange(len(first), device=patterns.device)
    return patterns[..., sequence, second, first + 1].mean(-1)


def random_tokens(vocabulary: int, context: int, *, seed: int = 0) -> Tensor:
    """Sequences of uniform random tokens, for previous-token scores, shape (PROBE_SEQUENCES, context)."""
    return torch.randint(vocabulary, (PROBE_SEQUENCES, context), generator=Generator().manual_seed(seed))


def tokens_with_one_repeat(vocabulary: int, context: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of random tokens in which one token occurs twice and every other once, for prefix-matching scores.

    Args:
        vocabulary: V, at least 4.
        context: T, at least 4; the sequences are as long as it and V allow.
        seed: of the draw.

    Returns:
        Tokens of shape (PROBE_SEQUENCES, min(V, T)), and the places of the first and the second occurrence, each of
        shape (PROBE_SEQUENCES,). Another token comes before the first, and at least one between them.
    """
    generator = Generator().manual_seed(seed)
    tokens = torch.rand(PROBE_SEQUENCES, vocabulary, generator=generator).argsort(-1)[:, :context]
    length = tokens.shape[1]
    first = torch.randint(1, length - 2, (PROBE_SEQUENCES,), generator=generator)
    gap = torch.rand(PROBE_SEQUENCES, generator=generator) * (length - 2 - first)
    second = first + 2 + gap.long()
    return tokens.scatter(-1, second.unsqueeze(-1), tokens.gather(-1, first.unsqueeze(-1))), first, second


def previous_token_scores(model: nn.Module, data: InductionData) -> Tensor:
    """Each head's attention to the token before, on fixed random tokens (arXiv 2402.02364).

    Args:
        model: with hook points, as `make_model` builds.
        data: the training data, for its vocabulary and its context.

    Returns:
        Scores of shape (layer, head), 0 to 1.
    """
    tokens = random_tokens(data.vocabulary, data.context).to(_device(model))
    return attention_to_previous(attention_patterns(model, tokens))


def prefix_matching_scores(model: nn.Module, data: InductionData) -> Tensor:
    """Each head's attention from a token to what followed its earlier occurrence, on fixed tokens (Olsson et al. 2022).

    Args:
        model: with hook points, as `make_model` builds.
        data: the training data, for its vocabulary and its context.

    Returns:
        Scores of shape (layer, head), 0 to 1.
    """
    tokens, first, second = (part.to(_device(model)) for part in tokens_with_one_repeat(data.vocabulary, data.context))
    return attention_to_match(attention_patterns(model, tokens), first, second)


def published_metrics(data: InductionData) -> dict[str, Metric]:
    """The scores of arXiv 2402.02364 as metrics of a probe, by name.

    Args:
        data: the training data.

    Returns:
        Metrics for `Probe(metrics=...)`: in-context score, bigram cross-entropy, and the best head's previous-token and
        prefix-matching scores.
    """
    return {
        "icl_score": icl_score,
        "bigram": bigram_cross_entropy(data.table),
        "previous_token": lambda model, batch: previous_token_scores(model, data).max().item(),
        "prefix_matching": lambda model, batch: prefix_matching_scores(model, data).max().item(),
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
