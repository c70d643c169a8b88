"""Small models of torch's own layers and of the kinds that people write by hand, each with a loss and data."""

import warnings

import torch
from awkward_models import Symmetric
from law_models import PERCEPTRON, TRANSFORMER, Case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int):
    return lambda: torch.randn(*shape, generator=generator(1))


def tokens(length: int = 5, vocabulary: int = 7):
    return lambda: torch.randint(1, vocabulary, (32, length), generator=generator(1))


def mean_square(model, x):
    output = model(x)
    output = output[0] if isinstance(output, tuple) else output
    return (output - 0.5).square().mean()


class First(nn.Module):
    """A module whose output is the first of several."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: complex weights for the lowest frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(1, 3)
        self.weight = nn.Parameter(torch.randn(3, 3, 3, dtype=torch.complex64) / 3)
        self.local = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x.unsqueeze(-1))
        modes = torch.fft.rfft(h, dim=1)
        mixed = torch.einsum("bki,kio->bko", modes[:, :3], self.weight)
        back = torch.fft.irfft(F.pad(mixed, (0, 0, 0, modes.shape[1] - 3)), n=h.shape[1], dim=1)
        return self.head((back + self.local(h)).tanh()).squeeze(-1)


class Graph(nn.Module):
    """Messages along edges, summed by `index_add`."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(3, 4), nn.Linear(7, 1)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]]))

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.edges
        sent = self.message(x[:, source]).tanh()
        received = torch.zeros(x.shape[0], x.shape[1], 4, dtype=x.dtype).index_add(1, target, sent)
        return self.update(torch.cat([x, received], -1))


class Mixture(nn.Module):
    """Experts chosen by the input, with outputs written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            out[rows] = expert(x[rows]) * weight[rows, None]
        return out


class LoRA(nn.Module):
    """A frozen layer with a trained update of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class UNet(nn.Module):
    """Down, a block with group norm, and up again with a skip connection and a time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.norm, self.middle = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.time = nn.Linear(4, 8)
        self.up, self.leave = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.silu(self.enter(x))
        time = torch.cat([torch.sin(x.mean((1, 2, 3))[:, None] * f) for f in (1.0, 2.0, 4.0, 8.0)], -1)
        h = self.down(first)
        h = h + self.middle(F.silu(self.norm(h) + self.time(time)[:, :, None, None]))
        return self.leave(torch.cat([first, self.up(h)], 1))


class Patches(nn.Module):
    """A vision transformer as timm writes it: patches by a convolution, a class token, and drop path."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, stride=4)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.scale1, self.scale2 = nn.Parameter(torch.full((8,), 0.5)), nn.Parameter(torch.full((8,), 0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        q, k, v = self.qkv(self.norm1(x)).reshape(len(x), 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        x = x + self.scale1 * self.proj(attended.transpose(1, 2).reshape(len(x), 5, 8))
        return self.head(self.norm(x + self.scale2 * self.mlp(self.norm2(x)))[:, 0])


class Padded(nn.Module):
    """An embedding with a padding row, in half of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3, padding_idx=0), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).mean(1))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.enter, self.block, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.enter(x).tanh(), use_reentrant=self.reentrant).tanh())


class Tensorised(nn.Module):
    """Weights in a list and in a dict, one of them used twice, one of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ParameterList([torch.randn(4, 4) / 2, torch.randn(4, 2) / 2])
        self.named = nn.ParameterDict({"gain": nn.Parameter(torch.tensor(0.7))})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.many[0]).tanh() @ self.many[0] @ self.many[1] * self.named["gain"]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Translating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(4, 2, 1, 1, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x[:, 1:])


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    model[1].register_forward_hook(lambda module, inputs, output: 3 * output)
    return model


def patched() -> nn.Module:
    """A block's `forward` is wrapped on the instance, as timers and compilers do."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    for layer in model:
        inner = layer.forward
        layer.forward = lambda x, inner=inner: inner(x) * 1.5
    return model


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))


def norms_by_hooks() -> nn.Module:
    """The older weight and spectral norms, which set the weight in a hook before `forward`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight = nn.utils.weight_norm(nn.Linear(4, 4))
        return nn.Sequential(weight, nn.Tanh(), nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 1))


def masked() -> nn.Module:
    """A pruned layer, and one whose weight is symmetric by a parametrization."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
    prune.random_unstructured(model[0], "weight", amount=0.3)
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    return model


def orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))


def spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(27, 2),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2, padding_mode="circular", padding=1), nn.PReLU(), nn.Conv1d(4, 1, 1)
    )


X = numbers(32, 4)
LAYERS = {
    "linear": Case(lambda: nn.Linear(4, 2), mean_square, X),
    "mlp with batch norm and dropout": PERCEPTRON,
    "conv2d": Case(convolutional, mean_square, numbers(32, 1, 8, 8)),
    "depthwise conv1d": Case(depthwise, mean_square, numbers(32, 2, 6)),
    "conv3d": Case(lambda: nn.Conv3d(1, 2, 2), mean_square, numbers(32, 1, 3, 3, 3)),
    "rnn": Case(lambda: First(nn.RNN(4, 3, batch_first=True)), mean_square, numbers(32, 5, 4)),
    "gru": Case(lambda: First(nn.GRU(4, 3, batch_first=True)), mean_square, numbers(32, 5, 4)),
    "lstm, both ways": Case(
        lambda: First(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)), mean_square, numbers(32, 5, 4)
    ),
    "lstm cell": Case(lambda: First(nn.LSTMCell(4, 3)), mean_square, X),
    "transformer encoder": TRANSFORMER,
    "transformer": Case(Translating, mean_square, numbers(32, 4, 4)),
    "multi-head attention": Case(Attending, mean_square, numbers(32, 5, 4)),
    "embedding": Case(lambda: nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 1)), mean_square, tokens()),
    "embedding bag": Case(lambda: nn.Sequential(nn.EmbeddingBag(7, 3), nn.Linear(3, 1)), mean_square, tokens()),
    "sparse embedding": Case(
        lambda: nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Linear(3, 1)), mean_square, tokens()
    ),
    "padded embedding": Case(Padded, mean_square, lambda: tokens()() * (torch.arange(5) < 3)),
    "weight norm": Case(weight_norm, mean_square, X),
    "norms by hooks": Case(norms_by_hooks, mean_square, X),
    "pruned and parametrized": Case(masked, mean_square, X),
    "spectral norm": Case(spectral_norm, mean_square, X),
    "orthogonal": Case(orthogonal, mean_square, X),
    "layer, group and rms norm": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.Linear(4, 1)),
        mean_square,
        X,
    ),
    "bilinear": Case(lambda: nn.Bilinear(4, 4, 2), lambda m, x: (m(x, x) - 0.5).square().mean(), X),
    "lists of parameters": Case(Tensorised, mean_square, X),
    "checkpointed": Case(lambda: Checkpointed(reentrant=False), mean_square, X),
    "checkpointed, reentrant": Case(lambda: Checkpointed(reentrant=True), mean_square, X),
    "complex FNO": Case(Spectral, mean_square, numbers(32, 8)),
    "graph by index_add": Case(Graph, mean_square, numbers(32, 4, 3)),
    "mixture in place": Case(Mixture, mean_square, X),
    "LoRA by hand": Case(LoRA, mean_square, X),
    "UNet block": Case(UNet, mean_square, numbers(32, 1, 8, 8)),
    "vision transformer": Case(Patches, mean_square, numbers(32, 1, 8, 8)),
    "hook that changes the output": Case(hooked, mean_square, X),
    "patched forward": Case(patched, mean_square, X),
}
