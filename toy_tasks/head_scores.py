"""What the heads of an attention-only transformer attend to, on fixed sequences, and how they compose.

An induction head attends from a token to what followed it before. It needs an earlier head that moves each token's
predecessor into its keys: a previous-token head whose output the induction head's keys read (K-composition; Elhage et
al. 2021, Olsson et al. 2022).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from phasewatch.toy_tasks.attention_only import Metric

PROBE_SEQUENCES = 64
"""Fixed sequences that attention is looked at on."""


class Sequences(Protocol):
    """Data of sequences, such as `InductionData`."""

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens."""
        ...

    @property
    def context(self) -> int:
        """T, the length of a sequence."""
        ...


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


def previous_token_scores(model: nn.Module, data: Sequences) -> Tensor:
    """Each head's attention to the token before, on fixed random tokens (arXiv 2402.02364).

    Args:
        model: with hook points, as `make_model` builds.
        data: the training data, or anything with its vocabulary and its context.

    Returns:
        Scores of shape (layer, head), 0 to 1.
    """
    tokens = random_tokens(data.vocabulary, data.context).to(_device(model))
    return attention_to_previous(attention_patterns(model, tokens))


def prefix_matching_scores(model: nn.Module, data: Sequences) -> Tensor:
    """Each head's attention from a token to what followed its earlier occurrence, on fixed tokens (Olsson et al. 2022).

    Args:
        model: with hook points, as `make_model` builds.
        data: the training data, or anything with its vocabulary and its context.

    Returns:
        Scores of shape (layer, head), 0 to 1.
    """
    tokens, first, second = (part.to(_device(model)) for part in tokens_with_one_repeat(data.vocabulary, data.context))
    return attention_to_match(attention_patterns(model, tokens), first, second)


def k_composition_scores(model: nn.Module) -> Tensor:
    """How much each later head's keys read of what each earlier head writes (Elhage et al. 2021).

    ‖W_QK W_OV‖ / (‖W_QK‖ ‖W_OV‖) in Frobenius norms, with W_QK = W_Qᵀ W_K of the later head and W_OV = W_O W_V of the
    earlier one. The gain of the layer norm that a head reads through counts as part of its weights. Of two heads at
    random it is about 1/√width, which Elhage et al. subtract and this doesn't.

    Args:
        model: as `make_model` builds.

    Returns:
        Scores of shape (layer, head, layer, head), the earlier head first; 0 where it isn't in an earlier layer.
    """
    gains = torch.stack([block.ln1.weight.detach() for block in model.blocks])[:, None, :, None]  # pyright: ignore
    q, k, v, o = (getattr(model, name).detach() for name in ("W_Q", "W_K", "W_V", "W_O"))
    ov = gains * v @ o  # from a row of the residual stream to what is added to it
    qk = gains * q @ (gains * k).mT
    products = torch.einsum("lhij,mgkj->lhmgik", ov, qk).norm(dim=(-2, -1))
    sizes = torch.einsum("lh,mg->lhmg", ov.norm(dim=(-2, -1)), qk.norm(dim=(-2, -1)))
    layers = torch.arange(len(ov), device=ov.device)
    earlier = layers[:, None] < layers
    return products / sizes * earlier[:, None, :, None]


def best_head_metrics(data: Sequences) -> dict[str, Metric]:
    """The best head's previous-token and prefix-matching scores and the best pair's K-composition, as metrics, by name.

    Args:
        data: the training data.

    Returns:
        Metrics for `Probe(metrics=...)`, which look at the model alone.
    """
    return {
        "previous_token": lambda model, batch: previous_token_scores(model, data).max().item(),
        "prefix_matching": lambda model, batch: prefix_matching_scores(model, data).max().item(),
        "k_composition": lambda model, batch: k_composition_scores(model).max().item(),
    }


def head_metrics(data: Sequences, *, layers: int = 2, heads: int = 4) -> dict[str, Metric]:
    """Each head's own previous-token and prefix-matching scores as metrics of a probe, by name.

    Args:
        data: the training data.
        layers: of the model.
        heads: in a layer.

    Returns:
        Metrics for `Probe(metrics=...)`, such as "previous_token/L0H3", TransformerLens's label of head 3 in layer 0.
    """

    def of_head(scores: Callable[[nn.Module, Sequences], Tensor], layer: int, head: int) -> Metric:
        return lambda model, batch: scores(model, data)[layer, head].item()

    return {
        f"{name}/L{layer}H{head}": of_head(scores, layer, head)
        for name, scores in (("previous_token", previous_token_scores), ("prefix_matching", prefix_matching_scores))
        for layer in range(layers)
        for head in range(heads)
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
