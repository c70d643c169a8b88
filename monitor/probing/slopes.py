"""Whether a gradient is that of its loss: compared with the loss's own differences along a few directions."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Generator, Tensor

from phasewatch.monitor.errors import PhasewatchError, warn
from phasewatch.monitor.model.loss import ModelLoss
from phasewatch.monitor.model.outputs import scalar_of
from phasewatch.monitor.snapshots.transfers import transfer

REACH = 1e-3
"""Length of the differences, relative to the weights' root mean square in each parameter. Shorter ones drown in the
rounding of float32, over longer ones the loss curves."""

LEAST_SCALE = 0.01
"""A parameter whose weights are smaller than this, such as a bias of zeros, is moved as if they were as large."""

OFF = 0.01
"""Share of the slope by which the gradient may miss it, beside what rounding and curvature explain: that half of
the gradient of one of eight like layers is missing is seen."""

BEYOND = 4.0
"""How many times over rounding and curvature may explain a deviation."""

AT_A_MINIMUM = 1000.0
"""Slopes are rounding where they change the loss by less than so many times the rounding of its curvature."""

MOST_ROWS = 8
"""Rows without a gradient of their own that are looked for. Each takes about 2 log2 of the number of rows passes."""

SHARE_OF_FREE = 0.5
"""Share of a GPU's free memory for copies of the weights. Others are on the host, and come back for each difference."""

HALVINGS = 5
"""How often the parameters are halved to name the one whose gradient is off. Each takes a pass."""


def check_gradient(loss: ModelLoss, batch: Any, name: str, *, rough: bool) -> None:
    """Compare the gradient that the parameters hold with the loss's differences along it, and with signs drawn for it.

    Args:
        loss: whose parameters hold the gradient; they are left as they are.
        batch: a minibatch.
        name: of the loss.
        rough: whether it computes in half precision, whose rounding hides all but the coarsest deviation.

    Raises:
        PhasewatchError: if the loss doesn't move with the weights.
    """
    line = _Line(loss, batch, rough)
    try:
        off = _off_along_gradient(line, name) or _off_along_weights(line)
        off = None if off and line.at_a_minimum() else off
        where = line.worst(off[0] - off[1]) if off else ""
    finally:
        line.restore()
    if off:
        warn(
            f"Probe(loss={name}): the gradient isn't that of the loss. Along one direction the loss changes by "
            f"{off[0]:.3g} and the gradient says {off[1]:.3g}, most of all in {where}. Straight-through estimators, "
            "gradient hooks and detached paths do this. Chains follow the gradient, so λ̂ isn't that of the loss; hold "
            "such parameters fast with parts=..., or give a loss that is differentiated as it is."
        )


def _off_along_gradient(line: "_Line", name: str) -> tuple[float, float] | None:
    """The slope and what the gradient says of it, if they don't agree in two directions made of it."""
    everything = [1] * len(line.parameters)
    drawn = torch.randint(2, (len(everything),), generator=Generator().manual_seed(0)) * 2 - 1
    first, error = line.slope(everything)
    for sign in (everything, drawn.tolist()):
        slope = first if sign is everything else line.far(sign)
        predicted = line.predicted(sign)
        if slope == 0 and predicted != 0 and not line.moves(sign):
            raise PhasewatchError(
                f"Probe(loss={name}): {name}(model, batch) doesn't change when the weights do, though it has a "
                "gradient. Something made from the weights is kept between calls: a cache, an attribute, or a "
                "graph with constants in it. Compute it anew in each call, at least in evaluation mode."
            )
        if not abs(slope - predicted) > OFF * line.size + BEYOND * error:
            return None
    return first, line.predicted(everything)


def _off_along_weights(line: "_Line") -> tuple[float, float] | None:
    """The same along the weights themselves, where a gradient that lacks a norm's share is off the most."""
    line.turn_to_weights()
    everything = [1] * len(line.parameters)
    slope, predicted = line.far(everything), line.predicted(everything)
    if not abs(slope - predicted) > OFF * line.size + BEYOND * line.rounding:
        return None
    slope, error = line.slope(everything)  # near a minimum, the loss of a product curves more than it slopes
    return (slope, predicted) if abs(slope - predicted) > OFF * line.size + BEYOND * error else None


def undifferentiated(loss: ModelLoss, batch: Any, reached: Collection[str]) -> set[str]:
    """The parameters that the loss depends on though no gradient reaches them.

    Args:
        loss: its parameters are left as they are.
        batch: a minibatch.
        reached: those that a gradient reaches.
    """
    others = {n: p for n, p in zip(loss.model.names, loss.model.parameters, strict=True) if n not in reached}
    if not others:
        return set()
    with torch.no_grad():
        still = loss.value(batch)
    if not _moves(loss, batch, list(others.values()), still):
        return set()
    if len(others) == 1:
        return set(others)
    return {name for name, parameter in others.items() if _moves(loss, batch, [parameter], still)}


@torch.no_grad()
def _moves(loss: ModelLoss, batch: Any, parameters: Sequence[Tensor], still: Tensor) -> bool:
    before = [parameter.clone() for parameter in parameters]
    generator = Generator(before[0].device).manual_seed(0)
    for parameter in parameters:
        parameter.add_(torch.empty_like(parameter).normal_(generator=generator), alpha=10 * REACH * _scale(parameter))
    moved = loss.value(batch)
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
    return not torch.equal(still, moved)


def unreached_rows(loss: ModelLoss, batch: Any, value: float, *, rough: bool) -> dict[str, list[int]]:
    """Rows of parameters that the loss depends on and whose own gradient is zero, as of `F.embedding(padding_idx=...)`.

    A loss with a slope there is told from one that only curves, such as at weights of zero, by going both ways.

    Args:
        loss: whose parameters hold the gradient; they are left as they are.
        batch: a minibatch.
        value: the loss on it.
        rough: whether it computes in half precision, which hides such rows.

    Returns:
        For each such parameter, its rows, `MOST_ROWS` at most.
    """
    if rough:
        return {}
    parameters = dict(zip(loss.model.names, loss.model.parameters, strict=True))
    zero = {
        name: (parameter.grad == 0).reshape(len(parameter), -1).all(1).nonzero().flatten().tolist()
        for name, parameter in parameters.items()
        if parameter.grad is not None and parameter.ndim and parameter.numel()
    }
    waiting = [[(name, row) for name, rows in zero.items() for row in rows]]
    found: list[tuple[str, int]] = []
    for group in waiting:
        if not group or len(found) == MOST_ROWS or not _has_slope(loss, batch, value, parameters, group):
            continue
        if len(group) == 1:
            found += group
        else:
            waiting += [group[: len(group) // 2], group[len(group) // 2 :]]
    return {name: sorted(row for of, row in found if of == name) for name in dict.fromkeys(of for of, _ in found)}


@torch.no_grad()
def _has_slope(
    loss: ModelLoss, batch: Any, value: float, parameters: Mapping[str, Tensor], group: Sequence[tuple[str, int]]
) -> bool:
    rows: dict[str, list[int]] = {}
    for name, row in group:
        rows.setdefault(name, []).append(row)
    before = {name: parameters[name][some].clone() for name, some in rows.items()}
    ends = []
    for sign in (1, -1):
        generator = Generator().manual_seed(0)
        for name, some in rows.items():
            noise = torch.empty(before[name].shape).normal_(generator=generator).to(before[name])
            parameters[name][some] = before[name] + sign * 10 * REACH * _scale(parameters[name]) * noise
        ends.append(float(loss.value(batch)))
    for name, some in rows.items():
        parameters[name][some] = before[name]
    return abs(ends[0] - ends[1]) > BEYOND * (abs(ends[0] + ends[1] - 2 * value) + 1e-6 * abs(value))


class _Line:
    """The loss along combinations of the parameters' own gradients, each as long as the weights are large."""

    def __init__(self, loss: ModelLoss, batch: Any, rough: bool) -> None:
        self._loss = loss
        self._batch = batch
        self._full = getattr(loss.loss, "in_full_precision", None)
        self.parameters = [parameter for parameter in loss.model.parameters if parameter.grad is not None]
        self._names = [n for n, p in zip(loss.model.names, loss.model.parameters, strict=True) if p.grad is not None]
        self._own = _copies(self.parameters)
        exact = min(parameter.dtype.itemsize for parameter in self.parameters) > 2
        exact &= self.parameters[0].device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
        coarse = rough and self._full is None
        double = all(parameter.dtype is torch.float64 for parameter in self.parameters)
        self._rounding = 1e-15 if double else 1e-2 if coarse or not exact else 3e-7
        self._along, self._slopes = [], []
        for parameter in self.parameters:
            grad = parameter.grad
            assert grad is not None
            length = float(grad.double().square().mean().sqrt())
            factor = _scale(parameter) / length if length > 0 else 0.0
            self._along.append(factor)
            self._slopes.append(factor * length**2 * grad.numel())
        self.size = sum(self._slopes)
        self.at_anchor = math.nan
        self._by_weights = False

    def turn_to_weights(self) -> None:
        """From now on, take the weights themselves for the direction."""
        self._by_weights = True
        grads = [cast(Tensor, parameter.grad) for parameter in self.parameters]
        self._slopes = [float((g.double() * own.to(g).double()).sum()) for g, own in zip(grads, self._own, strict=True)]
        self.size = sum(map(abs, self._slopes))

    def predicted(self, signs: Sequence[int]) -> float:
        """The slope by the gradient."""
        return sum(sign * slope for sign, slope in zip(signs, self._slopes, strict=True))

    def slope(self, signs: Sequence[int]) -> tuple[float, float]:
        """The slope by differences of the loss, and what rounding and curvature make of it."""
        (near, _), (far, self.at_anchor) = self._difference(signs, REACH / 2), self._difference(signs, REACH)
        return far, abs(far - near) + self.rounding

    @property
    def rounding(self) -> float:
        """What rounding makes of a slope."""
        return 4 * self._rounding * abs(self.at_anchor) / REACH

    def at_a_minimum(self) -> bool:
        """Whether the loss slopes by no more than rounding makes of its curvature."""
        curved = self.at_anchor - self._at([0] * len(self.parameters), 0.0)
        return max(map(abs, self._slopes)) * REACH < AT_A_MINIMUM * self._rounding * curved

    def far(self, signs: Sequence[int]) -> float:
        """The slope by differences of the loss, alone."""
        return self._difference(signs, REACH)[0]

    def moves(self, signs: Sequence[int]) -> bool:
        """Whether the loss changes with a long step; at a minimum it may change by as much both ways."""
        return self._at(signs, 100 * REACH) != self._at([0] * len(signs), 0.0)

    def worst(self, whole: float) -> str:
        """The parameter whose gradient is off, or one of them.

        Args:
            whole: by how much all of them together are.
        """
        chosen = list(range(len(self.parameters)))
        for _ in range(HALVINGS):
            if len(chosen) == 1:
                break
            half = chosen[: len(chosen) // 2]
            part = self._deviation(half)
            if abs(part) >= abs(whole - part):
                chosen, whole = half, part
            else:
                chosen, whole = chosen[len(half) :], whole - part
        return " or ".join(self._names[k] for k in chosen[:2])

    def restore(self) -> None:
        """Put the parameters back."""
        with torch.no_grad():
            for parameter, own in zip(self.parameters, self._own, strict=True):
                transfer(parameter, own)

    def _deviation(self, chosen: Sequence[int]) -> float:
        signs = [1 if k in set(chosen) else 0 for k in range(len(self.parameters))]
        return (self._at(signs, REACH) - self.at_anchor) / REACH - self.predicted(signs)

    def _difference(self, signs: Sequence[int], reach: float) -> tuple[float, float]:
        """The slope over twice the reach, and the mean of both ends."""
        there, back = self._at(signs, reach), self._at(signs, -reach)
        return (there - back) / (2 * reach), (there + back) / 2

    @torch.no_grad()
    def _at(self, signs: Sequence[int], reach: float) -> float:
        for parameter, own, sign, factor in zip(self.parameters, self._own, signs, self._along, strict=True):
            transfer(parameter, own)
            if sign and self._by_weights:
                parameter.add_(parameter * (parameter.grad != 0), alpha=reach * sign)  # pyright: ignore[reportOptionalOperand]
            elif sign:
                parameter.add_(parameter.grad, alpha=reach * sign * factor)  # pyright: ignore[reportArgumentType]
        return self._value()

    def _value(self) -> float:
        if self._full is None:
            return float(self._loss.value(self._batch))
        return float(scalar_of(self._full(self._loss.model.module, self._batch)))


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copies of parameters, on their own GPU as far as there's room for them beside a pass, else on the host."""
    device, copies = parameters[0].device, []
    room = 0 if device.type != "cuda" else SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]
    for parameter in parameters:
        own = parameter.detach()
        if stays := own.nbytes <= room:
            room -= own.nbytes
        copies.append(torch.empty_like(own, device=device if stays else "cpu"))
        transfer(copies[-1], own)
    return copies


def _scale(parameter: Tensor) -> float:
    return max(float(parameter.detach().double().square().mean().sqrt()), LEAST_SCALE)
