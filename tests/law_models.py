"""Small models with their data and loss, each a way for a monitor to leave a trace."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    data: Callable[[], Any]
    """All the samples, first axis the sample."""


class Perceptron(nn.Module):
    """Dropout, BatchNorm, a frozen layer, and a part of the network that training keeps in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.body[0].bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)).relu())


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def labelled() -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return x, x[:, :3].argmax(-1)


class Transformer(nn.Module):
    """A causal transformer encoder with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.unembed = nn.Linear(8, 7)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.encoder(self.embed(tokens), mask=self.mask[: tokens.shape[1], : tokens.shape[1]]))


def next_token(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def sequences() -> torch.Tensor:
    start = torch.randint(0, 7, (64, 1), generator=torch.Generator().manual_seed(2))
    return (start + torch.arange(7) * 3) % 7


def make_bridge() -> nn.Module:
    from phasewatch.toy_tasks import induction  # with TransformerLens, which takes seconds

    return induction.make_model(3, heads=2, width=8, vocabulary=7, context=8)


def make_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def gpt2_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that `state_dict` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh() * self.scale)[:, :3]


class Holder(nn.Module):
    """A model whose only child is called `module`, as a wrapper's is."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Tied()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def make_plain() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3))


def make_compiled_block() -> nn.Module:
    model = make_plain()
    model[0] = torch.compile(model[0], backend="eager")
    return model


def make_compiled() -> nn.Module:
    return torch.compile(make_plain(), backend="eager")  # pyright: ignore[reportReturnType]


def make_data_parallel() -> nn.Module:
    return nn.DataParallel(make_plain())


PERCEPTRON = Case(Perceptron, classify, labelled)
TRANSFORMER = Case(Transformer, next_token, sequences)
BRIDGE = Case(make_bridge, next_token, sequences)
TIED = Case(Tied, classify, labelled)
HOLDER = Case(Holder, classify, labelled)
PLAIN = Case(make_plain, classify, labelled)
COMPILED_BLOCK = Case(make_compiled_block, classify, labelled)
COMPILED = Case(make_compiled, classify, labelled)
DATA_PARALLEL = Case(make_data_parallel, classify, labelled)
GPT2 = Case(make_gpt2, gpt2_loss, lambda: {"input_ids": sequences()})
