"""Models that are awkward to load, to copy or to vectorise, one loss for all of them, and their gradients by torch."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

BATCHES = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def loss(model, x):
    return model(x).square().mean()


class Tied(nn.Module):
    """Two tied weights, one frozen, and a module reachable by two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.again = nn.ModuleDict({"inner": nn.ModuleList([self.first, nn.Linear(4, 2)])})

    def forward(self, x):
        x = self.second(self.first(x).tanh()).tanh()
        return self.again["inner"][1](self.again["inner"][0](self.frozen(x)).tanh())


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.symmetric = nn.Linear(4, 4)
        parametrize.register_parametrization(self.symmetric, "weight", Symmetric())
        self.direct = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(()))])

    def forward(self, x):
        return self.symmetric(self.normed(x).tanh() * self.direct[0]) + self.direct[1]


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


class Buffers(nn.Module):
    """BatchNorm, dropout, a non-persistent buffer, one that is expanded and one that isn't a number with a gradient."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        self.register_buffer("shift", torch.full((3,), 0.3), persistent=False)
        self.register_buffer("ids", torch.arange(3).unsqueeze(0).expand(5, 3))
        self.net[1].running_mean.fill_(0.4)

    def forward(self, x):
        return self.net(x) + self.shift + self.ids


class OldWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.layer = nn.utils.weight_norm(nn.Linear(4, 3))

    def forward(self, x):
        return self.layer(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(0))[0]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return y if y.sum() > 0 else 2 * y


class Noisy(nn.Module):
    """Draws from the global stream in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) + torch.randn(3)


class Counting(nn.Module):
    """Changes a buffer in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + 0.1 * self.calls


def seeded(make, dtype=torch.float64):
    torch.manual_seed(0)
    return make().to(dtype)


def obvious(make, weights, batches, dtype=torch.float64) -> tuple[Tensor, list[Tensor]]:
    """Losses of shape (row,), and gradients of the weights' shapes, (row, ...), by torch's own backward pass."""
    losses, grads = [], []
    for row, batch in enumerate(batches):
        model = seeded(make, dtype).eval()
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, weight in zip(trained, weights, strict=True):
                parameter.copy_(weight[row])
        value = loss(model, batch)
        value.backward()
        losses.append(value.detach())
        grads.append([p.grad for p in trained])
    return torch.stack(losses), [torch.stack(of_one) for of_one in zip(*grads, strict=True)]
