"""Deep linear networks: the largest models whose learning coefficient is known exactly.

A network of widths H₁ … H_{L+1} without biases computes y = W_L ⋯ W₁ x, and learns a matrix of rank r from
x ~ N(0, I). Two values are known of its learning coefficient λ. `most_singular_llc` is the *least* over all optima, the
λ of Aoyagi (2024, arXiv 2303.15739), which `most_singular_point` attains. `local_llc` is the value at the optimum
where training ended, often a larger one.
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, pairwise

import torch
from torch import Generator, Tensor, nn

Batch = tuple[Tensor, Tensor]


class DeepLinear(nn.Sequential):
    """The network y = W_L ⋯ W₁ x, of linear layers without biases.

    Args:
        widths: H₁ … H_{L+1}, from the inputs to the outputs.
        dtype: of the weights.
    """

    def __init__(self, widths: Sequence[int], dtype: torch.dtype | None = None) -> None:
        super().__init__(*(nn.Linear(a, b, bias=False, dtype=dtype) for a, b in pairwise(widths)))

    def factors(self) -> list[Tensor]:
        """W₁ … W_L in float64, of shape (H_{i+1}, H_i) each."""
        return [weight.detach().double() for weight in self.parameters()]


def low_rank_matrix(outputs: int, inputs: int, rank: int, generator: Generator) -> Tensor:
    """A random true matrix whose singular values run evenly from 2 down to 1.

    Args:
        outputs: its rows.
        inputs: its columns.
        rank: r, from 0 to the smaller of the two.
        generator: the source of its singular vectors.

    Returns:
        Shape (outputs, inputs), float64.
    """
    left = torch.linalg.qr(torch.randn(outputs, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(inputs, rank, generator=generator, dtype=torch.float64)).Q
    return left * torch.linspace(2, 1, rank, dtype=torch.float64) @ right.mT


def regression_data(truth: Tensor, samples: int, generator: Generator, *, noise: float = 0.0) -> Batch:
    """Inputs x ~ N(0, I) and targets y = truth · x + noise · N(0, I).

    Args:
        truth: shape (output, input).
        samples: n.
        generator: the source of both; the inputs are the same for every noise.
        noise: standard deviation of each target.

    Returns:
        x of shape (sample, input) and y of shape (sample, output), in the dtype of the truth.
    """
    x = torch.randn(samples, truth.shape[1], generator=generator, dtype=truth.dtype)
    y = x @ truth.mT
    return x, y + noise * torch.randn(y.shape, generator=generator, dtype=truth.dtype)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Half the squared error summed over the outputs, mean over the samples: −log p of unit Gaussian noise."""
    x, y = batch
    return (model(x) - y).square().sum(-1).mean() / 2


def most_singular_llc(widths: Sequence[int], rank: int) -> float:
    """The learning coefficient: the least over the optimal set (Aoyagi 2024, theorem 1; Aoyagi & Watanabe 2005).

    Args:
        widths: H₁ … H_{L+1}.
        rank: r of the true matrix.

    Returns:
        λ.

    Raises:
        ValueError: if the network can't express the rank.
    """
    if not 0 <= rank <= min(widths):
        raise ValueError(
            f"most_singular_llc({tuple(widths)}, rank={rank}): the rank must lie from 0 to the least width."
        )
    excess = sorted(width - rank for width in widths)
    for size in range(2, len(excess) + 1):
        inside, outside, ell = excess[:size], [*excess[size:], math.inf], size - 1
        total = sum(inside)
        if inside[-1] < outside[0] and ell * inside[-1] <= total < ell * outside[0]:
            break
    else:
        raise AssertionError("one of the sets fulfils the conditions")
    a = total - (math.ceil(total / ell) - 1) * ell
    pairs = (total**2 - sum(value**2 for value in inside)) / 2
    regular = (rank * (widths[0] + widths[-1]) - rank**2) / 2
    return regular + pairs / 2 + (a * (ell - a) - (ell - 1) * total**2) / (4 * ell)


def local_llc(model: DeepLinear, tolerance: float = 1e-6) -> float:
    """Half the rank of the Jacobian of the product W_L ⋯ W₁: λ at an optimum near which that rank is constant.

    The Jacobian's range is Σᵢ col(W_L ⋯ W_{i+1}) ⊗ row(W_{i−1} ⋯ W₁). As i grows the first spaces each hold the one
    before and the second each lie in it, so that its dimension is Σᵢ (cᵢ − cᵢ₋₁) rᵢ with the ranks cᵢ and rᵢ of the
    partial products: no Jacobian is formed, whatever the size.

    Args:
        model: at an optimum, converged to well below the tolerance.
        tolerance: singular values below this share of a partial product's largest count as 0.

    Returns:
        λ.
    """
    sides = _partial_products(model.factors())
    ranks = [(_rank(above, tolerance), _rank(below, tolerance)) for above, below in sides]
    return sum((c - before) * r for (before, _), (c, r) in pairwise([(0, 0), *ranks])) / 2


def curvatures(model: DeepLinear, tolerance: float = 1e-12) -> Tensor:
    """The Hessian's eigenvalues that aren't 0, at an optimum of a loss without noise whose inputs are x ~ N(0, I).

    They are those of J Jᵀ = Σᵢ AᵢAᵢᵀ ⊗ BᵢᵀBᵢ, with J the Jacobian of the product W_L ⋯ W₁, Aᵢ = W_L ⋯ W_{i+1} and
    Bᵢ = W_{i−1} ⋯ W₁.

    Args:
        model: at an optimum.
        tolerance: eigenvalues below this share of the largest count as 0.

    Returns:
        Shape (eigenvalue,), ascending, float64; twice as many as `local_llc` says where the two tolerances agree. It
        costs the eigenvalues of a matrix of H₁ · H_{L+1} rows.
    """
    sides = _partial_products(model.factors())
    outer = torch.stack([torch.kron(above @ above.mT, below.mT @ below) for above, below in sides]).sum(0)
    values = torch.linalg.eigvalsh(outer)
    return values[values > tolerance * values[-1]]


def _partial_products(weights: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each Wᵢ the products W_L ⋯ W_{i+1} above it and W_{i−1} ⋯ W₁ below it, between which dWᵢ moves the whole."""
    outputs, inputs = (torch.eye(n).to(weights[0]) for n in (weights[-1].shape[0], weights[0].shape[1]))
    above = accumulate(reversed(weights[1:]), torch.matmul, initial=outputs)
    below = accumulate(weights[:-1], lambda product, weight: weight @ product, initial=inputs)
    return list(zip([*above][::-1], below, strict=True))


def _rank(matrix: Tensor, tolerance: float) -> int:
    values = torch.linalg.svdvals(matrix)
    return int((values > tolerance * values.max()).sum())


def train(model: DeepLinear, batch: Batch, *, learning_rate: float = 1e-2, tolerance: float = 1e-10) -> None:
    """Train a network to an optimum of its batch, in place: Adam until it is near, then Levenberg-Marquardt.

    Where it ends is decided by its initial weights and by Adam; the second part, damped by the squared distance,
    converges quadratically to a nearby optimum, at a minimum as flat as these are (Yamashita & Fukushima 2001). All
    of it runs on the batch's moments, so that the cost of a step doesn't depend on the number of samples.

    Args:
        model: in float64. A width below the rank of the least-squares solution is a bottleneck, and the optimum then
            the best matrix of that rank.
        batch: x of shape (sample, input), with no fewer samples than inputs, and y of shape (sample, output).
        learning_rate: Adam's.
        tolerance: distance of the product from the optimal matrix at which it ends, in Frobenius norm and as a share of
            the optimal matrix's (of 1, where that is less).

    Raises:
        RuntimeError: if it doesn't get there, as near a point more singular than its neighbours.
    """
    target, gram = _optimum(batch, min(len(weight) for weight in model.parameters()))
    scale = max(target.norm().item(), 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(5000):
        residual = _product(list(model.parameters())) - target
        if residual.norm() < 1e-2 * scale:
            break
        optimizer.zero_grad()
        ((residual @ gram) * residual).sum().div(2).backward()
        optimizer.step()
    weights, factor = model.factors(), 1.0
    residual = target - _product(weights)
    for _ in range(200):
        if (distance := residual.norm().item() / scale) <= tolerance:
            break
        sides = _partial_products(weights)
        dual = _damped_solution(sides, residual, damping=factor * distance**2)
        moved = [w + above.mT @ dual @ below.mT for w, (above, below) in zip(weights, sides, strict=True)]
        new_residual = target - _product(moved)
        if new_residual.norm() < residual.norm():
            weights, residual, factor = moved, new_residual, max(factor / 4, 1.0)
        else:
            factor *= 4
    else:
        distance = residual.norm().item() / scale
        raise RuntimeError(f"train: still {distance:.1e} from the optimum, above tolerance={tolerance:.1e}.")
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)


def _product(weights: Sequence[Tensor]) -> Tensor:
    return reduce(lambda product, weight: weight @ product, weights)


def _optimum(batch: Batch, rank: int) -> tuple[Tensor, Tensor]:
    """The best matrix of a rank, and the inputs' second moments that say what best is (reduced-rank regression)."""
    x, y = (part.double() for part in batch)
    gram = x.mT @ x / len(x)
    root = torch.linalg.cholesky(gram)
    moment = y.mT @ x / len(x)
    whitened = torch.linalg.solve_triangular(root, moment.mT, upper=False).mT
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    return torch.linalg.solve_triangular(root.mT, best.mT, upper=True).mT, gram


def _damped_solution(sides: list[tuple[Tensor, Tensor]], residual: Tensor, damping: float) -> Tensor:
    """V with (J Jᵀ + damping) V = residual, J the Jacobian of the product, by conjugate gradients.

    Two layers have a J Jᵀ that is diagonal in the eigenvectors of its two factors. More are nearly so after training,
    which balances the layers: its diagonal there is the preconditioner.
    """
    outer = [(above @ above.mT, below.mT @ below) for above, below in sides]
    left, right = torch.linalg.eigh(outer[0][0]).eigenvectors, torch.linalg.eigh(outer[-1][1]).eigenvectors
    outer = [(left.mT @ a @ left, right.mT @ b @ right) for a, b in outer]
    diagonal = sum(torch.outer(a.diagonal(), b.diagonal()) for a, b in outer) + damping
    remainder = left.mT @ residual @ right
    solution, aim = torch.zeros_like(remainder), 1e-4 * remainder.norm()
    direction = remainder / diagonal
    size = (remainder * direction).sum()
    for _ in range(1000):
        image = sum((a @ direction @ b for a, b in outer), damping * direction)
        step = size / (direction * image).sum()
        solution, remainder = solution + step * direction, remainder - step * image
        if remainder.norm() <= aim:
            break
        better = remainder / diagonal
        size, before = (remainder * better).sum(), size
        direction = better + size / before * direction
    return left @ solution @ right.mT


def most_singular_point(widths: Sequence[int], truth: Tensor, generator: Generator) -> DeepLinear:
    """A network whose every factor has the rank of the truth, and whose product is the truth.

    Args:
        widths: H₁ … H_{L+1}.
        truth: shape (H_{L+1}, H₁).
        generator: the source of the hidden layers' bases.

    Returns:
        The network, float64, balanced: every factor has the L-th roots of the truth's singular values.
    """
    left, values, right = torch.linalg.svd(truth.double(), full_matrices=False)
    rank = _rank(truth.double(), 1e-12)
    hidden = [torch.randn(width, rank, generator=generator, dtype=torch.float64) for width in widths[1:-1]]
    bases = [right[:rank].mT, *(torch.linalg.qr(basis).Q for basis in hidden), left[:, :rank]]
    model = DeepLinear(widths, dtype=torch.float64)
    roots = values[:rank] ** (1 / (len(widths) - 1))
    with torch.no_grad():
        for weight, (below, above) in zip(model.parameters(), pairwise(bases), strict=True):
            weight.copy_(above * roots @ below.mT)
    return model
