"""The attention-only language model of Hoogland et al. (arXiv 2402.02364), as a plain module that trains fast on a GPU.

One or two layers, width 256, 8 heads, 1,024 tokens of context, a vocabulary of 5,000: 3.36 million parameters with two
layers. Positions are added to what queries and keys read and to nothing else (shortformer; Press et al. 2021), so that
they never reach the residual stream. Training is AdamW with a constant learning rate of 1e-3 and weight decay 0.05, on
batches of 100 sequences.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

PUBLISHED_BATCH = 100


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        layers: of attention.
        heads: in a layer; must divide the width.
        width: of the residual stream.
        vocabulary: V, the number of tokens.
        context: T, the longest sequence.
    """

    layers: int = 2
    heads: int = 8
    width: int = 256
    vocabulary: int = 5_000
    context: int = 1_024


class Attention(nn.Module):
    """Causal attention whose queries and keys read positions too.

    Args:
        shape: of the model.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(shape.width, shape.width) for _ in range(4))

    def queries_and_keys(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Each of shape (batch, head, position, width / heads)."""
        placed = x + positions
        return self._by_head(self.q_proj(placed)), self._by_head(self.k_proj(placed))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """What is added to the residual stream, of the shape (batch, position, width) of `x`."""
        q, k = self.queries_and_keys(x, positions)
        mixed = F.scaled_dot_product_attention(q, k, self._by_head(self.v_proj(x)), is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def pattern(self, x: Tensor, positions: Tensor) -> Tensor:
        """How much each position attends to each, shape (batch, head, position, position)."""
        q, k = self.queries_and_keys(x, positions)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A layer norm and the attention behind it.

    Args:
        shape: of the model.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)


class LanguageModel(nn.Module):
    """The model, from tokens of shape (batch, position) to logits of shape (batch, position, V).

    Every matrix starts from N(0, 0.64 / width) and every bias from 0, as in TransformerLens, which was published with.

    Args:
        shape: its size.
        seed: of its initialisation; torch's own stream is left alone.

    Raises:
        ValueError: if the heads don't divide the width.
    """

    def __init__(self, shape: Shape | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        if shape.width % shape.heads:
            raise ValueError(f"Shape(width={shape.width}, heads={shape.heads}): the heads must divide the width.")
        with torch.device("meta"):
            self.embed = nn.Embedding(shape.vocabulary, shape.width)
            self.positions = nn.Embedding(shape.context, shape.width)
            self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
            self.norm = nn.LayerNorm(shape.width)
            self.unembed = nn.Linear(shape.width, shape.vocabulary)
        self.to_empty(device="cpu")
        generator = Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.8 / math.sqrt(shape.width), generator=generator)
                else:
                    parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)

    @property
    def layers(self) -> list[Block]:
        """Its layers, the first one first."""
        return cast(list[Block], list(self.blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x, positions = self.embed(tokens), self.positions.weight[: tokens.shape[1]]
        for block in self.layers:
            x = x + block.attention(block.norm(x), positions)
        return self.unembed(self.norm(x))

    def patterns(self, tokens: Tensor) -> Tensor:
        """Attention of every head, shape (layer, head, batch, position, position): from the last axis but one on."""
        x, positions = self.embed(tokens), self.positions.weight[: tokens.shape[1]]
        found = []
        for block in self.layers:
            normed = block.norm(x)
            found.append(block.attention.pattern(normed, positions).transpose(0, 1))
            x = x + block.attention(normed, positions)
        return torch.stack(found)


def targets(tokens: Tensor) -> Tensor:
    """The token after each position, with −100, which cross-entropy leaves out, after the last; the shape of tokens."""
    return F.pad(tokens[:, 1:], (0, 1), value=-100)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats.

    Args:
        model: from tokens to logits, or to an object that has them as `logits`.
        tokens: shape (batch, position).
    """
    logits = logits_of(model, tokens)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets(tokens).flatten())


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token, shape (batch, T − 1)."""
    logits = logits_of(model, tokens)[:, :-1]
    return F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits, of a plain module or one of Hugging Face's."""
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def published_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the published learning rate and weight decay, constant all through."""
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=on_gpu)
