"""A chain's step for all of its parameters as one kernel on a GPU, from the same equations as the plain step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor

from phasewatch.monitor.model.gradients import Vector
from phasewatch.monitor.model.weights import Mask, Weights
from phasewatch.monitor.sampling.layout import Layout
from phasewatch.monitor.sampling.position import AnchorOnDevice, DisplacementOnDevice, Position
from phasewatch.monitor.sampling.random_streams import chain_key, kernels_for
from phasewatch.monitor.sampling.settings import Sampler

NOTHING = -1
"""In the place of a mask's address, where nothing of a parameter moves."""


@dataclass(frozen=True)
class Coefficients:
    """A step that is linear in the displacement w − w*, the gradient, the velocity, and this and the last noise.

    Attributes:
        weights: what the new weights take of each, beside the old weights.
        velocity: what the new velocity takes of the first four.
        start: what the first weights take of the noise, beside w*.
    """

    weights: tuple[float, float, float, float, float]
    velocity: tuple[float, float, float, float]
    start: float

    @classmethod
    def of(cls, sampler: Sampler, eps: float) -> Self:
        """Those of a sampler's own step with step size ε, read off by asking for each term alone.

        Example:
            >>> sampler = Sampler.__subclasses__()[0](localization=4.0, nbeta=10.0)
            >>> [round(number, 9) for number in Coefficients.of(sampler, 0.01).weights]
            [-0.02, -0.05, 0.0, 0.1, 0.0]
        """
        kept = sampler.velocity_kept

        def step(w: float = 0, grad: float = 0, velocity: float = 0, noise: float = 0) -> tuple[float, float]:
            w_, grad_, velocity_, noise_ = torch.tensor([w, grad, velocity, noise], dtype=torch.float64)
            held = None if kept is None else velocity_
            after, moved = sampler.step(w_, held, torch.zeros_like(w_), grad_, noise_, eps)
            return float(after), 0.0 if moved is None else float(moved)

        terms = [step(w=1), step(grad=1), step(velocity=1) if kept is not None else (0.0, 0.0), step(noise=1)]
        (w, *others), moved = zip(*terms, strict=True)
        of_velocity, last = (0.0, others[1]) if kept == 0 else (others[1], 0.0)
        zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
        weights = (w - 1, others[0], of_velocity, others[2], last)
        return cls(weights, tuple(moved), float(sampler.start(zero, one, eps)))  # pyright: ignore[reportArgumentType]


class FusedStep:
    """Moves a chain's weights, with the noise made inside the kernel.

    Args:
        sampler: the settings.
        position: of the weights.
        vector: the weights as one vector.
        velocity: of each parameter, where chains keep one.
        masks: which weights move.
        seed: of the chains.
        chain: its number.
    """

    def __init__(
        self,
        sampler: Sampler,
        position: AnchorOnDevice | DisplacementOnDevice,
        vector: Vector,
        velocity: Weights | None,
        masks: Mask,
        seed: int,
        chain: int,
    ) -> None:
        kernels = kernels_for(position.weights[0].device)
        begins = vector.offsets
        assert kernels is not None
        assert begins is not None
        self._kernels = kernels
        self._sampler = sampler
        self._weights = position.weights
        self._rounded = isinstance(position, DisplacementOnDevice)
        sizes = [weight.numel() for weight in self._weights]
        self._layout = Layout.of(tuple(zip(sizes, begins, vector.sizes, strict=True)), self._weights[0].device)
        self._masks = None if masks is None else [None if m is None else m.contiguous() for m in masks]
        self._velocity = velocity
        self._key = chain_key(seed, chain)
        rounded = [None if p.dtype == torch.float32 else p for p in vector.parameters]
        self._half = any(parameter is not None for parameter in rounded)
        self._addresses = [self._table(_addresses(some)) for some in (self._weights, rounded, position.kept, velocity)]
        still = [NOTHING if mask is not None and mask.ndim == 0 else 0 for mask in self._masks or []]
        self._addresses.append(self._table([a or b for a, b in zip(still, _addresses(self._masks), strict=True)]))
        self._step, self._eps = 0, math.nan
        self._grads: tuple[list[int], Tensor] = ([], self._table([]))

    @staticmethod
    def fits(position: Position, vector: Vector) -> TypeGuard[AnchorOnDevice | DisplacementOnDevice]:
        """Whether the kernel can move these parameters, with what is kept of the anchor on the device."""
        device = vector.parameters[0].device
        if not isinstance(position, AnchorOnDevice | DisplacementOnDevice) or kernels_for(device) is None:
            return False
        if vector.offsets is None:
            return False
        return all(
            w.dtype == torch.float32
            and w.is_contiguous()
            and kept.is_contiguous()
            and p.is_contiguous()
            and (w.data_ptr() == p.data_ptr() or p.dtype == torch.bfloat16)
            for w, kept, p in zip(position.weights, position.kept, vector.parameters, strict=True)
        )

    def begin(self, eps: float) -> None:
        """Put the chain where it first asks for a gradient."""
        self._step = 0
        self._move(eps, self._table([]), start=True)

    def advance(self, eps: float, grads: Sequence[Tensor]) -> None:
        """Take a step.

        Args:
            eps: ε.
            grads: the gradient of each parameter, of the parameter's type.
        """
        grads = [grad.contiguous() for grad in grads]
        addresses = _addresses(grads)
        if addresses != self._grads[0]:
            self._grads = addresses, self._table(addresses)
        self._step += 1
        self._move(eps, self._grads[1], start=False)

    def _move(self, eps: float, grads: Tensor, *, start: bool) -> None:
        if eps != self._eps:
            self._eps, self._coefficients = eps, Coefficients.of(self._sampler, eps)
        c, layout = self._coefficients, self._layout
        weights, rounded, anchors, velocity, masks = self._addresses
        of_weights = (0.0, 0.0, 0.0, c.start, 0.0) if start else c.weights
        flags: dict[str, Any] = {
            "START": start,
            "VELOCITY": self._velocity is not None,
            "LAST": not start and c.weights[4] != 0,
            "HALF": self._half,
            "ROUNDED": self._rounded,
            "MASKED": self._masks is not None,
        }
        now = self._step * layout.chunks
        if not layout.programs:
            return
        with torch.cuda.device(self._weights[0].device):
            self._kernels.move[(layout.programs,)](
                weights, rounded, anchors, grads, velocity, masks, layout.sizes, layout.starts, layout.skips,
                layout.ahead, layout.owners, self._key, now, now - layout.chunks, *of_weights, *c.velocity, **flags,
            )  # fmt: skip

    def _table(self, addresses: Sequence[int]) -> Tensor:
        """Addresses on the device; 0 throughout without any. A copy from memory that isn't pinned waits for the GPU."""
        table = torch.tensor(addresses or [0] * len(self._weights), dtype=torch.int64, pin_memory=True)
        return table.to(self._weights[0].device, non_blocking=True)


def _addresses(tensors: Sequence[Tensor | None] | None) -> list[int]:
    """Where tensors lie, 0 where there is none."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors or []]
