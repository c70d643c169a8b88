"""Attention-only transformers of one or two layers, their loss and training: the model of every induction task.

The tasks that it learns differ in their data alone: `induction`, `markov_chains` and `text`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from phasewatch.toy_tasks.steps import steps

Metric = Callable[[nn.Module, Tensor], float]


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


def training(model: nn.Module, data: Callable[[Generator, int], Tensor], *, seed: int = 0) -> Iterator[int]:
    """Train a model in place: AdamW, learning rate 1e-3, weight decay 0.01, batch 64.

    Args:
        model: such as `make_model` builds.
        data: where the batches are drawn from, as `data(generator, batch_size)`.
        seed: of the batches, which are drawn on the model's device.

    Yields:
        The number of steps taken so far, after each of them, without end.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    yield from steps(model, loss, data, optimizer, 64, seed)


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
        table: probabilities of the next token, a row for each token, shape (V, V).

    Returns:
        The metric; its least value is the entropy of the table's rows, and it rises again as predictions come to
        depend on the context.
    """

    def cross_entropy_of_bigrams(model: nn.Module, batch: Tensor) -> float:
        predicted = model(batch).log_softmax(-1)
        return -(table.to(batch.device)[batch] * predicted).sum(-1).mean().item()

    return cross_entropy_of_bigrams


def unigram_cross_entropy(frequencies: Tensor) -> Metric:
    """A metric: cross-entropy of the model's predictions against one distribution, whatever the token.

    Args:
        frequencies: of the tokens, shape (V,).

    Returns:
        The metric; its least value is the entropy of the frequencies.
    """
    return bigram_cross_entropy(frequencies.expand(len(frequencies), -1))
