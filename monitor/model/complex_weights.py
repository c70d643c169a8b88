"""Complex parameters as their real and imaginary parts, which is how they are sampled."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ORIGINAL = "parametrizations.{}.original"


def in_real_parts(model: nn.Module) -> dict[str, str]:
    """Hold each trainable complex parameter of a model as a real one, with a last axis (real, imaginary).

    The model computes with complex numbers as before. A gradient, a step and the noise are then those of real numbers.

    Args:
        model: it is changed.

    Returns:
        For each such parameter, its name before to its name now.

    Example:
        >>> model = nn.Module()
        >>> model.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        >>> in_real_parts(model), model.weight.dtype
        ({'weight': 'parametrizations.weight.original'}, torch.complex64)
        >>> [tuple(parameter.shape) for parameter in model.parameters()]
        [(3, 2)]
    """
    renamed: dict[str, str] = {}
    reals: dict[int, nn.Parameter] = {}
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_complex() or not parameter.requires_grad:
                continue
            real = reals.setdefault(id(parameter), nn.Parameter(torch.view_as_real(parameter.detach()).clone()))
            parametrize.register_parametrization(module, name, _Complex(), unsafe=True)
            parametrizations = cast(nn.ModuleDict, module.parametrizations)[name]
            parametrizations.original = real
            before = f"{prefix}.{name}" if prefix else name
            renamed[before] = f"{prefix}.{_ORIGINAL.format(name)}" if prefix else _ORIGINAL.format(name)
    return renamed


def masks_in_real_parts(masks: Mapping[str, Tensor], renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """Masks by parameter name, of a model before `in_real_parts`, for the model after it.

    Args:
        masks: booleans of the parameters' shapes.
        renamed: what `in_real_parts` returned.
    """
    return {
        renamed.get(name, name): mask.unsqueeze(-1).expand(*mask.shape, 2) if name in renamed else mask
        for name, mask in masks.items()
    }


class _Complex(nn.Module):
    def forward(self, real: Tensor) -> Tensor:
        return torch.view_as_complex(real)
